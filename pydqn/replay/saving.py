"""A replay memory as a folder on disk, and as a state that other programs' own formats can carry."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pydqn import _core
from pydqn._util.checks import dtype_name, integer
from pydqn._util.files import Damaged
from pydqn.replay.chunks import Piece, Saver, Store

Kind = TypeVar("Kind", bound="Stored")

_FILE_KIND = "pydqn-replay"
_FILE_VERSION = 3
_SETTINGS = ("capacity", "stack", "n_step", "gamma", "num_envs", "padding", "prioritized", "alpha", "max_transitions")
_BYTES_PER_PIECE = 32 << 20  # saving and loading hold a few of these at a time, however large the ring


class BeyondMemoryError(MemoryError):
    """More than any machine can address, so that nothing of that size was ever saved."""


class Stored:
    """What `pydqn.FrameReplay` needs in order to be saved, loaded, copied and pickled."""

    _core: _core.FrameReplay
    capacity: int
    num_envs: int
    frame_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    prioritized: bool
    beta: float

    def __init__(self, *_: Any, **__: Any) -> None:
        """Made by whoever inherits."""
        self._saver = Saver(max(1, _BYTES_PER_PIECE // self._tick_bytes()))

    def save(self, path: str | os.PathLike[str], progress: Callable[[float], None] | None = None) -> None:
        """Write the whole memory, its generator included, to a folder: atomically, with checksums, without pickle.

        Saving again writes only what is new: frames that this memory has saved, or was loaded from, are linked (unless
        lanes have got different numbers of frames: then everything is written). Takes some 100 MB beside the memory,
        however large that is.

        Args:
            path: a folder, made if it is not there. What was saved there before counts until all is written.
            progress: told the share that is done, now and then, up to 1.

        Raises:
            RuntimeError: another thread appended meanwhile; what was saved before, if anything, is still there.
        """
        ticks, held = self._ticks_and_held()
        end, uneven = max(ticks), len(set(ticks)) > 1
        header = {"version": _FILE_VERSION, **self.settings, **self._moving(), "ticks": ticks if uneven else end}
        priorities = None
        if self.prioritized:
            priorities = b"".join(self._core.export_priorities(*lane).tobytes() for lane in enumerate(ticks))

        def read(start: int, stop: int) -> bytes:
            lanes = []
            for lane, count in enumerate(held):
                missing = min(max(0, end - count - start), stop - start)  # rows before what this lane holds
                position = max(0, start - (end - count))
                columns = self._export(lane, position, stop - start - missing, ticks[lane])
                lanes.append([_behind(missing, column) for column in columns] if missing else columns)
            return b"".join(column.tobytes() for columns in zip(*lanes, strict=True) for column in columns)

        # Rows of the file are counted from the lanes' common end. Where that moves against their own ticks, pieces
        # of an earlier save hold other rows.
        if uneven:
            self._saver.known.clear()
        rows = (end - max(held), end)
        self._saver.save(Path(path).absolute(), _FILE_KIND, header, rows, read, priorities, progress)
        if uneven:
            self._saver.known.clear()

    @property
    def settings(self) -> dict[str, Any]:
        """What the memory was made with and keeps for good, as JSON can hold it."""
        others = {name: getattr(self, name) for name in _SETTINGS}
        return {**others, "frame_shape": list(self.frame_shape), "dtype": self.dtype.name}

    @classmethod
    def load(cls: type[Kind], path: str | os.PathLike[str], expected: dict[str, Any] | None = None) -> Kind:
        """Read what `save` wrote; the loaded memory samples the very batches that the saved one would have.

        Args:
            path: the folder.
            expected: `settings` that the memory has to have; others are refused before any memory is taken for them.

        Raises:
            ValueError: the folder holds no replay memory, is damaged (`pydqn._util.files.Damaged`, which names the file), or
                is of another version.
            MemoryError: there is too little memory for what it holds.
        """
        return cls._load(path, expected)

    @classmethod
    def _load(cls: type[Kind], path: str | os.PathLike[str], expected: dict[str, Any] | None, **settings: Any) -> Kind:
        store = Store(Path(path).absolute(), _FILE_KIND)
        header = store.header
        if header.pop("version", None) != _FILE_VERSION:
            raise ValueError(f"{path}: expected format version {_FILE_VERSION}")
        for name, ours in (expected or {}).items():
            if header.get(name) != ours:
                raise ValueError(f"{path}: the replay memory has {name} {header.get(name)}, expected {ours}")
        try:
            ticks, generator, largest = (header.pop(name) for name in ("ticks", "generator", "largest_priority"))
            if unknown := header.keys() - {*_SETTINGS, "frame_shape", "dtype", "beta"}:
                raise ValueError(f"unknown: {', '.join(unknown)}")
            dtype_name("dtype", header["dtype"])
            replay = cls(**header, **settings)
            replay._core.generator_state, replay._core.largest_priority = generator, largest
            given = ticks if isinstance(ticks, list) else [ticks] * replay.num_envs
            replay._core.set_ticks([integer("ticks", count, 0) for count in given])
            ticks, held = replay._ticks_and_held()
            store.check(max(ticks) - max(held), max(ticks), replay._saver.length)
            for piece in store.pieces:
                replay._read(store, piece, max(ticks), held)
            if replay.prioritized:
                values = np.frombuffer(store.changing(8 * sum(held)), np.float64)
                for lane, part in enumerate(np.split(values, np.cumsum(held)[:-1])):
                    replay._core.import_priorities(lane, part)
            replay._core.end_import()
            if len(set(ticks)) > 1:
                replay._saver.known.clear()
        except Damaged:
            raise
        except MemoryError as error:  # nothing is wrong with the files
            if isinstance(error, BeyondMemoryError):
                raise Damaged(f"{path}: what it holds is no replay memory ({error})") from None
            reason = str(error) or "an allocation failed"
            raise MemoryError(f"{path}: too little memory to load it ({reason})") from None
        except (KeyError, TypeError, ValueError) as error:
            raise Damaged(f"{path}: what it holds is no replay memory ({error})") from None
        return replay

    def _read(self, store: Store, piece: Piece, end: int, held: list[int]) -> None:
        """Take over a piece, of which the first frames of a lane may be too old to be held."""
        count = piece.stop - piece.start
        data = store.read(piece, count * self._tick_bytes())
        columns, start = [], 0
        for axes, dtype in ((self.frame_shape, self.dtype), ((), np.float32), ((), np.int32), ((), np.uint8)):
            shape = (self.num_envs, count, *axes)
            column = np.frombuffer(data, dtype, math.prod(shape), start).reshape(shape)
            columns.append(np.require(column, requirements="A"))  # it may begin at any byte
            start += column.nbytes
        for lane, kept in enumerate(held):
            skip = min(max(0, end - kept - piece.start), count)
            position = max(0, piece.start - (end - kept))
            self._import(lane, position, *(column[lane, skip:] for column in columns))
        self._saver.known[piece.start // self._saver.length] = (store.folder / piece.name, piece)

    def __getstate__(self) -> dict[str, Any]:
        """Return everything, in arrays, for `copy.deepcopy` and other programs' pickles; `save` needs no such copy."""
        ticks, held = self._ticks_and_held()
        lanes = range(self.num_envs)
        return {
            "settings": {**self.settings, **self._elsewhere()},
            "ticks": ticks,
            **self._moving(),
            "lanes": [self._export(lane, 0, held[lane], ticks[lane]) for lane in lanes],
            "priorities": [self._core.export_priorities(lane, ticks[lane]) for lane in lanes if self.prioritized],
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Become what `__getstate__` told."""
        type(self).__init__(self, **state["settings"], beta=state["beta"])
        core = self._core
        core.generator_state, core.largest_priority = state["generator"], state["largest_priority"]
        core.set_ticks(state["ticks"])
        for lane, columns in enumerate(state["lanes"]):
            self._import(lane, 0, *columns)
        for lane, values in enumerate(state["priorities"]):
            core.import_priorities(lane, values)
        core.end_import()

    def _moving(self) -> dict[str, Any]:
        core = self._core
        return {"beta": self.beta, "largest_priority": core.largest_priority, "generator": core.generator_state}

    def _ticks_and_held(self) -> tuple[list[int], list[int]]:
        """How many frames each lane has got, and how many of them it holds."""
        ticks = self._core.lane_ticks
        return ticks, [min(count, self.capacity // self.num_envs) for count in ticks]

    def _tick_bytes(self) -> int:
        return self.num_envs * (math.prod(self.frame_shape) * self.dtype.itemsize + 9)

    # --- what a memory that keeps its frames elsewhere does in its own way ---

    def _elsewhere(self) -> dict[str, Any]:
        """Settings that say where."""
        return {}

    def _export(self, lane: int, position: int, count: int, ticks: int) -> tuple[NDArray[Any], ...]:
        """Return frames, rewards, actions and flags of `count` held ticks of a lane, from the `position`th on."""
        columns: tuple[NDArray[Any], ...] = self._core.export_run(lane, position, count, ticks)
        return columns

    def _import(self, lane: int, position: int, frames: NDArray[Any], *rest: NDArray[Any]) -> None:
        """Put back what `_export` gave."""
        self._core.import_run(lane, position, frames, *rest)


def saved_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the `settings` that a saved memory says it has, as they stand there. Loads nothing."""
    return dict(Store(Path(path), _FILE_KIND).header)


def verify_saved(path: str | os.PathLike[str]) -> None:
    """Raise `pydqn._util.files.Damaged` unless all files of a saved memory are what was written. Loads nothing."""
    Store(Path(path), _FILE_KIND).verify()


def _behind(missing: int, column: NDArray[Any]) -> NDArray[Any]:
    """Return the column behind so many rows of zeros."""
    return np.concatenate([np.zeros((missing, *column.shape[1:]), column.dtype), column])

"""A replay buffer as a folder on disk, and as a state that other programs' own formats can carry."""

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
from pydqn.replay.chunks import Chunk, ChunkReader, ChunkWriter

Kind = TypeVar("Kind", bound="Stored")

_FILE_KIND = "pydqn-replay"
_FILE_VERSION = 3
_SETTINGS = ("capacity", "stack", "n_step", "gamma", "num_envs", "padding", "prioritized", "alpha", "max_transitions")
_BYTES_PER_CHUNK = 32 << 20  # saving and loading hold a few of these at a time, however large the ring


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
        self._saver = ChunkWriter(max(1, _BYTES_PER_CHUNK // self._bytes_per_time_step()))

    def save(self, path: str | os.PathLike[str], progress: Callable[[float], None] | None = None) -> None:
        """Write the whole memory, its generator included, to a folder: atomically, with checksums, without pickle.

        Saving again writes only what is new: frames that this memory has saved, or was loaded from, are linked (unless
        environments have got different numbers of frames: then everything is written). Takes some 100 MB beside the memory,
        however large that is.

        Args:
            path: a folder, made if it is not there. What was saved there before counts until all is written.
            progress: told the share that is done, now and then, up to 1.

        Raises:
            RuntimeError: another thread appended meanwhile; what was saved before, if anything, is still there.
        """
        time_steps, held = self._time_steps_and_held()
        end, uneven = max(time_steps), len(set(time_steps)) > 1
        header = {
            "version": _FILE_VERSION,
            **self.settings,
            **self._moving(),
            "time_steps": time_steps if uneven else end,
        }
        priorities = None
        if self.prioritized:
            priorities = b"".join(
                self._core.export_priorities(*env_index).tobytes() for env_index in enumerate(time_steps)
            )

        def read(start: int, stop: int) -> bytes:
            env_indices = []
            for env_index, count in enumerate(held):
                missing = min(max(0, end - count - start), stop - start)  # rows before what this environment holds
                position = max(0, start - (end - count))
                columns = self._export(env_index, position, stop - start - missing, time_steps[env_index])
                env_indices.append([_behind(missing, column) for column in columns] if missing else columns)
            return b"".join(column.tobytes() for columns in zip(*env_indices, strict=True) for column in columns)

        # Rows of the file are counted from the environments' common end. Where that moves against their own time steps, chunks
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
            ValueError: the folder holds no replay buffer, is damaged (`pydqn._util.files.Damaged`, which names the file), or
                is of another version.
            MemoryError: there is too little memory for what it holds.
        """
        return cls._load(path, expected)

    @classmethod
    def _load(cls: type[Kind], path: str | os.PathLike[str], expected: dict[str, Any] | None, **settings: Any) -> Kind:
        store = ChunkReader(Path(path).absolute(), _FILE_KIND)
        header = store.header
        if header.pop("version", None) != _FILE_VERSION:
            raise ValueError(f"{path}: expected format version {_FILE_VERSION}")
        for name, ours in (expected or {}).items():
            if header.get(name) != ours:
                raise ValueError(f"{path}: the replay buffer has {name} {header.get(name)}, expected {ours}")
        try:
            time_steps, generator, largest = (
                header.pop(name) for name in ("time_steps", "generator", "largest_priority")
            )
            if unknown := header.keys() - {*_SETTINGS, "frame_shape", "dtype", "beta"}:
                raise ValueError(f"unknown: {', '.join(unknown)}")
            dtype_name("dtype", header["dtype"])
            replay = cls(**header, **settings)
            replay._core.generator_state, replay._core.largest_priority = generator, largest
            given = time_steps if isinstance(time_steps, list) else [time_steps] * replay.num_envs
            replay._core.set_time_steps([integer("time_steps", count, 0) for count in given])
            time_steps, held = replay._time_steps_and_held()
            store.check(max(time_steps) - max(held), max(time_steps), replay._saver.length)
            for chunk in store.chunks:
                replay._read(store, chunk, max(time_steps), held)
            if replay.prioritized:
                values = np.frombuffer(store.changing(8 * sum(held)), np.float64)
                for env_index, part in enumerate(np.split(values, np.cumsum(held)[:-1])):
                    replay._core.import_priorities(env_index, part)
            replay._core.end_import()
            if len(set(time_steps)) > 1:
                replay._saver.known.clear()
        except Damaged:
            raise
        except MemoryError as error:  # nothing is wrong with the files
            if isinstance(error, BeyondMemoryError):
                raise Damaged(f"{path}: what it holds is no replay buffer ({error})") from None
            reason = str(error) or "an allocation failed"
            raise MemoryError(f"{path}: too little memory to load it ({reason})") from None
        except (KeyError, TypeError, ValueError) as error:
            raise Damaged(f"{path}: what it holds is no replay buffer ({error})") from None
        return replay

    def _read(self, store: ChunkReader, chunk: Chunk, end: int, held: list[int]) -> None:
        """Take over a chunk, of which the first frames of an environment may be too old to be held."""
        count = chunk.stop - chunk.start
        data = store.read(chunk, count * self._bytes_per_time_step())
        columns, start = [], 0
        for axes, dtype in ((self.frame_shape, self.dtype), ((), np.float32), ((), np.int32), ((), np.uint8)):
            shape = (self.num_envs, count, *axes)
            column = np.frombuffer(data, dtype, math.prod(shape), start).reshape(shape)
            columns.append(np.require(column, requirements="A"))  # it may begin at any byte
            start += column.nbytes
        for env_index, kept in enumerate(held):
            skip = min(max(0, end - kept - chunk.start), count)
            position = max(0, chunk.start - (end - kept))
            self._import(env_index, position, *(column[env_index, skip:] for column in columns))
        self._saver.known[chunk.start // self._saver.length] = (store.folder / chunk.name, chunk)

    def __getstate__(self) -> dict[str, Any]:
        """Return everything, in arrays, for `copy.deepcopy` and other programs' pickles; `save` needs no such copy."""
        time_steps, held = self._time_steps_and_held()
        env_indices = range(self.num_envs)
        return {
            "settings": {**self.settings, **self._elsewhere()},
            "time_steps": time_steps,
            **self._moving(),
            "env_indices": [
                self._export(env_index, 0, held[env_index], time_steps[env_index]) for env_index in env_indices
            ],
            "priorities": [
                self._core.export_priorities(env_index, time_steps[env_index])
                for env_index in env_indices
                if self.prioritized
            ],
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Become what `__getstate__` told."""
        type(self).__init__(self, **state["settings"], beta=state["beta"])
        core = self._core
        core.generator_state, core.largest_priority = state["generator"], state["largest_priority"]
        core.set_time_steps(state["time_steps"])
        for env_index, columns in enumerate(state["env_indices"]):
            self._import(env_index, 0, *columns)
        for env_index, values in enumerate(state["priorities"]):
            core.import_priorities(env_index, values)
        core.end_import()

    def _moving(self) -> dict[str, Any]:
        core = self._core
        return {"beta": self.beta, "largest_priority": core.largest_priority, "generator": core.generator_state}

    def _time_steps_and_held(self) -> tuple[list[int], list[int]]:
        """How many frames each environment has got, and how many of them it holds."""
        time_steps = self._core.env_time_steps
        return time_steps, [min(count, self.capacity // self.num_envs) for count in time_steps]

    def _bytes_per_time_step(self) -> int:
        return self.num_envs * (math.prod(self.frame_shape) * self.dtype.itemsize + 9)

    # --- what a memory that keeps its frames elsewhere does in its own way ---

    def _elsewhere(self) -> dict[str, Any]:
        """Settings that say where."""
        return {}

    def _export(self, env_index: int, position: int, count: int, time_steps: int) -> tuple[NDArray[Any], ...]:
        """Return frames, rewards, actions and flags of `count` held time steps of an environment, from the `position`th on."""
        columns: tuple[NDArray[Any], ...] = self._core.export_run(env_index, position, count, time_steps)
        return columns

    def _import(self, env_index: int, position: int, frames: NDArray[Any], *rest: NDArray[Any]) -> None:
        """Put back what `_export` gave."""
        self._core.import_run(env_index, position, frames, *rest)


def saved_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the `settings` that a saved memory says it has, as they stand there. Loads nothing."""
    return dict(ChunkReader(Path(path), _FILE_KIND).header)


def verify_saved(path: str | os.PathLike[str]) -> None:
    """Raise `pydqn._util.files.Damaged` unless all files of a saved memory are what was written. Loads nothing."""
    ChunkReader(Path(path), _FILE_KIND).verify()


def _behind(missing: int, column: NDArray[Any]) -> NDArray[Any]:
    """Return the column behind so many rows of zeros."""
    return np.concatenate([np.zeros((missing, *column.shape[1:]), column.dtype), column])

"""A replay buffer as a folder on the disk, and as a state that other programs' own formats can carry."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pydqn import _core
from pydqn._util.checks import dtype_name, integer
from pydqn._util.files import Damaged
from pydqn.replay.chunks import Chunk, ChunkReader, ChunkWriter
from pydqn.replay.store import FrameStore

SETTINGS = ("capacity", "stack", "n_step", "gamma", "num_envs", "padding", "prioritized", "alpha", "max_transitions")

_KIND = "pydqn-replay"
_VERSION = 4
_BYTES_PER_CHUNK = 32 << 20  # saving and loading hold a few chunks at a time, however large the ring is


class BeyondMemoryError(MemoryError):
    """More than any machine can address, so that nothing of that size was ever saved."""


class Contents(NamedTuple):
    """What a replay buffer holds: an index core, and the frames that it refers to."""

    core: _core.FrameReplay
    store: FrameStore
    capacity: int  # frames per environment
    prioritized: bool

    def save(
        self, path: Path, settings: dict[str, Any], writer: ChunkWriter, progress: Callable[[float], None] | None
    ) -> None:
        """Write everything to a folder. `settings` are for `SavedReplay.settings`."""
        time_steps, held = self._time_steps_and_held()
        end, uneven = max(time_steps), len(set(time_steps)) > 1
        header = {"version": _VERSION, **settings, **self._state(), "time_steps": time_steps if uneven else end}
        priorities = b"".join(values.tobytes() for values in self._priorities(time_steps))

        def read(start: int, stop: int) -> bytes:
            parts = []
            for env_index, count in enumerate(held):
                missing = min(max(0, end - count - start), stop - start)  # rows before what this environment holds
                position = max(0, start - (end - count))
                columns = self._export(env_index, position, stop - start - missing, time_steps[env_index])
                parts.append([_behind(missing, column) for column in columns] if missing else columns)
            return b"".join(column.tobytes() for columns in zip(*parts, strict=True) for column in columns)

        # Rows of the file are counted from the environments' common end. Where that moves against their own time
        # steps, the chunks of an earlier save hold other rows.
        if uneven:
            writer.known.clear()
        rows = (end - max(held), end)
        writer.save(path, _KIND, header, rows, read, priorities if self.prioritized else None, progress)
        if uneven:
            writer.known.clear()

    def export(self) -> dict[str, Any]:
        """Return everything, in arrays."""
        time_steps, held = self._time_steps_and_held()
        columns = [
            self._export(env_index, 0, *counts) for env_index, counts in enumerate(zip(held, time_steps, strict=True))
        ]
        priorities = self._priorities(time_steps)
        return {**self._state(), "time_steps": time_steps, "columns": columns, "priorities": priorities}

    def fill(self, state: dict[str, Any]) -> None:
        """Take over what `export` returned. Nothing is held yet."""
        self._start(state, state["time_steps"])
        for env_index, columns in enumerate(state["columns"]):
            self._import(env_index, 0, *columns)
        for env_index, values in enumerate(state["priorities"]):
            self.core.import_priorities(env_index, values)
        self.core.end_import()

    def fill_from(self, reader: ChunkReader, state: dict[str, Any], length: int) -> dict[int, tuple[Path, Chunk]]:
        """Take over what `save` wrote. Nothing is held yet.

        Args:
            reader: of the folder.
            state: the header but for the settings.
            length: rows of a chunk.

        Returns:
            The chunks, for `ChunkWriter.known`.
        """
        given, num_envs = state["time_steps"], len(self.core.env_time_steps)
        given = given if isinstance(given, list) else [given] * num_envs
        self._start(state, [integer("time_steps", count, 0) for count in given])
        time_steps, held = self._time_steps_and_held()
        end = max(time_steps)
        reader.check(end - max(held), end, length)
        for chunk in reader.chunks:
            self._read(reader, chunk, end, held)
        if self.prioritized:
            values = np.frombuffer(reader.changing(8 * sum(held)), np.float64)
            for env_index, part in enumerate(np.split(values, np.cumsum(held)[:-1])):
                self.core.import_priorities(env_index, part)
        self.core.end_import()
        uneven = len(set(time_steps)) > 1  # see `save`
        chunks = () if uneven else reader.chunks
        return {chunk.start // length: (reader.folder / chunk.name, chunk) for chunk in chunks}

    def _read(self, reader: ChunkReader, chunk: Chunk, end: int, held: list[int]) -> None:
        """Take over a chunk, of which an environment's first frames may be too old to be held."""
        num_envs, count = len(held), chunk.stop - chunk.start
        data = reader.read(chunk, count * bytes_per_time_step(num_envs, self.store))
        frames = (self.store.frame_shape, self.store.dtype)
        columns, start = [], 0
        for axes, dtype in (frames, ((), np.float32), ((), np.int32), ((), np.uint8)):
            shape = (num_envs, count, *axes)
            column = np.frombuffer(data, dtype, math.prod(shape), start).reshape(shape)
            columns.append(np.require(column, requirements="A"))  # it may begin at any byte
            start += column.nbytes
        for env_index, kept in enumerate(held):
            skip = min(max(0, end - kept - chunk.start), count)
            position = max(0, chunk.start - (end - kept))
            self._import(env_index, position, *(column[env_index, skip:] for column in columns))

    def _start(self, state: dict[str, Any], time_steps: list[int]) -> None:
        self.core.generator_state, self.core.largest_priority = state["generator"], state["largest_priority"]
        self.core.set_time_steps(time_steps)

    def _state(self) -> dict[str, Any]:
        return {"largest_priority": self.core.largest_priority, "generator": self.core.generator_state}

    def _time_steps_and_held(self) -> tuple[list[int], list[int]]:
        """Return how many frames each environment has got, and how many of them it holds."""
        time_steps = self.core.env_time_steps
        return time_steps, [min(count, self.capacity) for count in time_steps]

    def _priorities(self, time_steps: list[int]) -> list[NDArray[np.float64]]:
        return [self.core.export_priorities(*each) for each in enumerate(time_steps)] if self.prioritized else []

    def _export(self, env_index: int, position: int, count: int, time_steps: int) -> tuple[NDArray[Any], ...]:
        """Return frames, rewards, actions and flags of `count` held time steps, from the `position`th oldest on."""
        with self.store.lock:  # from the cells to their frames
            cells, *rest = self.core.export_run(env_index, position, count, time_steps)
            return self.store.read(cells), *rest

    def _import(self, env_index: int, position: int, frames: NDArray[Any], *rest: NDArray[Any]) -> None:
        """Put back what `_export` returned."""
        # A store appends for all environments at once, so its time steps are those of the newest.
        time_step = self.core.time_steps - self.core.stored(env_index) + position
        self.core.import_run(env_index, position, self.store.write(env_index, time_step, frames), *rest)


class SavedReplay:
    """A saved replay buffer, of which the index has been read.

    Args:
        path: the folder.
        expected: settings that it must have.

    Attributes:
        settings: arguments with which to make the buffer anew.

    Raises:
        ValueError: the folder holds no replay buffer, or one of another version or with other settings.
    """

    def __init__(self, path: str | os.PathLike[str], expected: dict[str, Any] | None) -> None:
        self._path = path
        self._reader = ChunkReader(Path(path).absolute(), _KIND)
        header = dict(self._reader.header)
        if (version := header.pop("version", None)) != _VERSION:
            raise ValueError(
                f"{path}: expected a replay buffer of format version {_VERSION}, got version {version!r}; read it with "
                "the release of pydqn that wrote it, or fill a new one"
            )
        for name, value in (expected or {}).items():
            if header.get(name) != value:
                raise ValueError(f"{path}: the replay buffer has {name} {header.get(name)}, expected {value}")
        with self.errors_named():
            self._state = {name: header.pop(name) for name in ("time_steps", "generator", "largest_priority")}
            if unknown := header.keys() - {*SETTINGS, "frame_shape", "dtype", "beta", "uniform_share"}:
                raise ValueError(f"unknown: {', '.join(unknown)}")
            dtype_name("dtype", header["dtype"])
        self.settings = header

    def read_into(self, contents: Contents, length: int) -> dict[int, tuple[Path, Chunk]]:
        """Fill an empty buffer; return what `ChunkWriter.known` should be. `length` is that of its chunks."""
        return contents.fill_from(self._reader, self._state, length)

    def verify(self) -> None:
        """Raise `pydqn._util.files.Damaged` unless all files are what was written."""
        self._reader.verify()

    @contextmanager
    def errors_named(self) -> Iterator[None]:
        """Let errors within the block say which folder it was, and whether that is damaged."""
        try:
            yield
        except Damaged:
            raise
        except MemoryError as error:  # nothing is wrong with the files
            if isinstance(error, BeyondMemoryError):
                raise Damaged(f"{self._path}: what it holds is no replay buffer ({error})") from None
            reason = str(error) or "an allocation failed"
            raise MemoryError(f"{self._path}: too little memory to load it ({reason})") from None
        except (KeyError, TypeError, ValueError) as error:
            raise Damaged(f"{self._path}: what it holds is no replay buffer ({error})") from None


def chunk_writer(num_envs: int, store: FrameStore) -> ChunkWriter:
    """Return a writer whose chunks are of a size that memory has room for."""
    return ChunkWriter(max(1, _BYTES_PER_CHUNK // bytes_per_time_step(num_envs, store)))


def bytes_per_time_step(num_envs: int, store: FrameStore) -> int:
    """Return the bytes of a row: of each environment a frame, a reward, an action and flags."""
    return num_envs * (math.prod(store.frame_shape) * store.dtype.itemsize + 9)


def saved_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what the index of a saved replay buffer says, unchecked. Loads nothing."""
    return dict(ChunkReader(Path(path), _KIND).header)


def verify_saved(path: str | os.PathLike[str]) -> None:
    """Raise `pydqn._util.files.Damaged` unless all files of a saved buffer are what was written. Loads nothing."""
    ChunkReader(Path(path), _KIND).verify()


def _behind(missing: int, column: NDArray[Any]) -> NDArray[Any]:
    """Return the column behind so many rows of zeros."""
    return np.concatenate([np.zeros((missing, *column.shape[1:]), column.dtype), column])

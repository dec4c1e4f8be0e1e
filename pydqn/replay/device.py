"""A replay buffer whose frames are on the learner's device (see `DeviceReplay`)."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pydqn.replay.base import BaseReplay
from pydqn.replay.lookup import as_words, look_up
from pydqn.replay.saving import SavedReplay
from pydqn.replay.uploads import Uploads

_MOST_ROWS = 2**31 - 1  # rows are int32
_SHARE = 0.8  # of a GPU's free memory that frames may take; the rest is for networks, graphs and others


class Storage(NamedTuple):
    """Where a run keeps its frames."""

    where: str  # host | device
    why: str


def resolve_storage(name: str, device: torch.device, nbytes: int) -> Storage:
    """Turn "auto", "host" or "device" into one of the last two, for so many bytes of frames."""
    size = f"{nbytes / 1e9:.1f} GB of frames"
    if name != "auto":
        return Storage(name, f"as asked for, {size}")
    if device.type != "cuda":
        return Storage("host", f"no GPU, {size}")
    free, _ = torch.cuda.mem_get_info(device)
    # Memory that PyTorch keeps for later allocations is given back where an allocation would fail.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    where = "device" if nbytes <= _SHARE * free else "host"
    return Storage(where, f"{size}, {free / 1e9:.1f} GB free on {device}")


class FramesOnDevice:
    """A `FrameStore` of one tensor on a device, whose cells are numbers of rows.

    At time step t, frames are written to the rows from 1 + t % slots * num_envs on, one for each environment.

    Args:
        slots: time steps that the tensor holds.
        num_envs: environments.
        frame_shape: of one frame.
        dtype: of the frames.
        device: where the tensor is.
    """

    cell_shape: tuple[int, ...] = ()
    cell_dtype = np.dtype(np.int32)

    def __init__(
        self, slots: int, num_envs: int, frame_shape: tuple[int, ...], dtype: np.dtype[Any], device: torch.device
    ) -> None:
        self.frame_shape, self.dtype = frame_shape, dtype
        self._slots, self._num_envs = slots, num_envs
        try:
            kind = torch.from_numpy(np.empty(0, dtype)).dtype
        except TypeError:
            raise ValueError(f"dtype: expected one that PyTorch has, too, got {dtype}") from None
        rows = 1 + slots * num_envs
        if rows > _MOST_ROWS:
            capacity = (slots - 1) * num_envs
            raise ValueError(f"capacity: expected at most {_MOST_ROWS} frames on a device, got {capacity}")
        self.frames = torch.empty((rows, *frame_shape), dtype=kind, device=device)
        as_words(self.frames)[0] = 0
        self.lock = threading.RLock()
        self.uploads = Uploads(self.frames, num_envs) if device.type == "cuda" else None

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self.frames.nbytes

    def rows(self, time_step: int) -> NDArray[np.int32]:
        """Return (num_envs,): the rows of the frames of a time step."""
        start = 1 + time_step % self._slots * self._num_envs
        return np.arange(start, start + self._num_envs, dtype=np.int32)

    def slot(self, time_step: int) -> NDArray[Any]:
        """Return memory for the frames of a time step, (num_envs, *frame_shape), free to be written."""
        if self.uploads is not None:
            return self.uploads.slot(time_step)
        start = self.rows(time_step)[0]
        slot: NDArray[Any] = self.frames[start : start + self._num_envs].numpy()
        return slot

    def send(self, time_step: int) -> None:
        """Launch the copy of what `slot` holds to its rows."""
        if self.uploads is not None:
            self.uploads.send(time_step, int(self.rows(time_step)[0]))

    def wait(self) -> None:
        """Let the current stream wait for all frames: `append` may run on another stream."""
        if self.uploads is not None:
            self.uploads.wait()

    def let_finish(self) -> None:
        """Let later frames wait for what the current stream has launched by now."""
        if self.uploads is not None:
            self.uploads.let_finish()

    def read(self, cells: NDArray[Any]) -> NDArray[Any]:
        """Return the frames of (n,) rows."""
        self.wait()
        frames: NDArray[Any] = look_up(self.frames, torch.from_numpy(cells).to(self.frames.device)).cpu().numpy()
        return frames

    def write(self, env_index: int, time_step: int, frames: NDArray[Any]) -> NDArray[Any]:
        """Store frames of one environment, which are rows apart from each other; return the rows."""
        rows = 1 + np.arange(time_step, time_step + len(frames)) % self._slots * self._num_envs + env_index
        device = self.frames.device
        values = as_words(torch.from_numpy(frames.copy()).to(device))
        self._synchronize()  # other streams may still read what these rows held, or bring frames there
        as_words(self.frames).index_copy_(0, torch.from_numpy(rows).to(device), values)
        self._synchronize()
        return rows.astype(np.int32)

    def _synchronize(self) -> None:
        if self.frames.device.type == "cuda":
            torch.cuda.synchronize(self.frames.device)


class DeviceReplay(BaseReplay):
    """A replay buffer like `FrameReplay` that keeps its frames in one tensor on a device.

    Each step sends only the new frames there (7 KB per Atari environment). The index core holds, in place of each
    frame, the number of its row in that tensor, so validity, stacks, n-step windows and priorities are those of
    `FrameReplay`. Batches (and `latest`) hold rows, too: `obs` and `next_obs` are (B, stack) int32, to be looked up in
    `frames` on the device, as `Learner(frames=)` and `Actor(frames=)` do.

    The thread that appends has to launch what reads rows of `frames` before the next `append`, on its current stream:
    later appends overwrite the oldest frames, behind what has been launched, not behind what is launched later.
    Other threads may call every method at any time. While they use rows, they keep the frames in place by `reading`.

    Args:
        capacity: see `FrameReplay`.
        frame_shape: see `FrameReplay`.
        device: where the frames are kept. On a CPU, `append` writes into the tensor itself.
        settings: all others of `FrameReplay`.

    Raises:
        ValueError: an argument is out of range; the message names it.
        RuntimeError: the device has not enough memory (`torch.OutOfMemoryError`).
    """

    _store: FramesOnDevice

    def __init__(
        self, capacity: int, frame_shape: tuple[int, ...] = (84, 84), *, device: torch.device | str, **settings: Any
    ) -> None:
        self.device = torch.device(device)
        super().__init__(capacity, frame_shape, **settings)
        self.device = self.frames.device  # "cuda" is whichever is current: from now on that one

    @property
    def frames(self) -> Tensor:
        """(1 + (capacity // num_envs + 1) * num_envs, *frame_shape). Row 0 is zero: it pads stacks."""
        return self._store.frames

    def append(
        self,
        frame: NDArray[Any],
        action: ArrayLike,
        reward: ArrayLike,
        terminated: ArrayLike,
        truncated: ArrayLike,
        first: ArrayLike,
    ) -> None:
        """See `FrameReplay.append`. The frames may still be on their way when it returns."""
        frames, expected = np.asarray(frame), (self.num_envs, *self.frame_shape)
        if frames.shape != expected:
            raise ValueError(f"frame: expected shape {expected}, got shape {frames.shape}")
        if frames.dtype != self.dtype:
            raise ValueError(f"frame: expected dtype {self.dtype}, got dtype {frames.dtype}")
        with self._store.lock:
            time_step = self._core.time_steps
            slot = self._store.slot(time_step)
            if frames.ctypes.data != slot.ctypes.data or frames.strides != slot.strides:
                np.copyto(slot, frames)
            self._store.send(time_step)
            # Once this returns, others see the rows, so the frames come first. If it raises, they are in a spare slot.
            self._core.append(self._store.rows(time_step), action, reward, terminated, truncated, first, None, None)

    def append_to(self, env_indices: ArrayLike, *columns: Any, **named: Any) -> None:
        """Raise RuntimeError: frames are sent to the device for all environments at once."""
        raise RuntimeError("append_to: a DeviceReplay takes the frames of all environments at once (append)")

    def next_slot(self) -> NDArray[Any]:
        return self._store.slot(self._core.time_steps)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Keep all frames that can be read in place, for threads that do not append themselves.

        Within the block, `append` waits. What the block launches on its current stream is done before a later append
        overwrites what it reads::

            with replay.reading():
                batch = replay.sample(32)
                obs = look_up(replay.frames, torch.from_numpy(batch.obs).to(replay.device))
        """
        with self._store.lock:
            try:
                yield
            finally:
                self._store.let_finish()

    def clear(self) -> None:
        """See `FrameReplay.clear`."""
        with self._store.lock:
            super().clear()
            self._store.let_finish()

    def _take(self, saved: SavedReplay) -> None:
        with self._store.lock:
            if self._core.time_steps:
                saved.verify()  # before rows that are held are overwritten
            self.clear()
            super()._take(saved)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        expected: dict[str, Any] | None = None,
        *,
        device: torch.device | str = "cpu",
    ) -> DeviceReplay:
        """See `FrameReplay.load`; reads what either kind has saved."""
        return cls._load(path, expected, device=device)

    def __getstate__(self) -> dict[str, Any]:
        """See `FrameReplay.__getstate__`."""
        state = super().__getstate__()
        state["settings"]["device"] = str(self.device)
        return state

    def _make_store(self) -> FramesOnDevice:
        slots = self.capacity // self.num_envs + 1
        return FramesOnDevice(slots, self.num_envs, self.frame_shape, self.dtype, self.device)

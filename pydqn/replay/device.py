"""A replay buffer whose frames lie on the learner's device; everything else about it stays in the C++ core."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pydqn._util.cuda import on
from pydqn.replay.frames import Batch, FrameReplay
from pydqn.replay.lookup import as_words, look_up

Rows = TypeVar("Rows")

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
    # What PyTorch keeps for later allocations, it gives back where one would fail.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    where = "device" if nbytes <= _SHARE * free else "host"
    return Storage(where, f"{size}, {free / 1e9:.1f} GB free on {device}")


class DeviceReplay(FrameReplay):
    """A `FrameReplay` that keeps its frames in one tensor on a device.

    Each step sends only the new frames there (7 KB per Atari environment). The core stores, in place of a frame, the number of
    its row in that tensor, so validity, stacks, n-step windows and priorities are the very same code as on the host.
    Batches (and `latest`) hold rows, too: `obs` and `next_obs` are (B, stack) int32, to be looked up in `frames` on the
    device, as `Learner(frames=)` and `Actor(frames=)` do.

    The thread that appends has to launch what reads rows of `frames` before the next `append`, on its current stream:
    later appends write frames over the oldest ones, behind what has been launched, not behind what is launched later.
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

    frames: Tensor
    """(1 + (capacity // num_envs + 1) * num_envs, *frame_shape): row 0 is zero, what stands before an episode."""

    def __init__(
        self, capacity: int, frame_shape: tuple[int, ...] = (84, 84), *, device: torch.device | str, **settings: Any
    ) -> None:
        super().__init__(capacity, frame_shape, **settings)
        self.device = torch.device(device)
        try:
            dtype = torch.from_numpy(np.empty(0, self.dtype)).dtype
        except TypeError:
            raise ValueError(f"dtype: expected one that PyTorch has, too, got {self.dtype}") from None
        self._lock = threading.RLock()  # held while an append brings its frames, and by readers
        self._slots = self.capacity // self.num_envs + 1
        rows = 1 + self._slots * self.num_envs
        if rows > _MOST_ROWS:
            raise ValueError(f"capacity: expected at most {_MOST_ROWS} frames on a device, got {self.capacity}")
        self.frames = torch.empty((rows, *self.frame_shape), dtype=dtype, device=self.device)
        self.device = self.frames.device  # "cuda" is whichever is current: from now on that one
        as_words(self.frames)[0] = 0
        self._uploads = Uploads(self.frames, self.num_envs) if self.device.type == "cuda" else None

    @property
    def nbytes(self) -> int:
        """Bytes held, on the host and on the device."""
        return self._core.nbytes + self.frames.nbytes

    def append(
        self,
        frame: NDArray[Any],
        action: ArrayLike,
        reward: ArrayLike,
        terminated: ArrayLike,
        truncated: ArrayLike,
        first: ArrayLike,
    ) -> None:
        """See `FrameReplay.append`. The frames are on their way when it returns."""
        frames, expected = np.asarray(frame), (self.num_envs, *self.frame_shape)
        if frames.shape != expected:
            raise ValueError(f"frame: expected shape {expected}, got shape {frames.shape}")
        if frames.dtype != self.dtype:
            raise ValueError(f"frame: expected dtype {self.dtype}, got dtype {frames.dtype}")
        with self._lock:
            time_step = self._core.time_steps
            rows = self._rows(np.array([time_step]), slice(None))
            slot = self.next_slot()
            if frames.ctypes.data != slot.ctypes.data or frames.strides != slot.strides:
                np.copyto(slot, frames)
            if self._uploads is not None:
                self._uploads.send(time_step, int(rows[0, 0]))
            # From here on others see the rows, so the frames come first. Where this raises, they lie in a spare slot.
            self._core.append(rows[0], action, reward, terminated, truncated, first, None, None)

    def append_to(self, env_indices: ArrayLike, *columns: Any, **named: Any) -> None:
        """Not offered: frames are sent to the device for all environments at once."""
        raise RuntimeError("append_to: a DeviceReplay takes the frames of all environments at once (append)")

    def next_slot(self) -> NDArray[Any]:
        """See `FrameReplay.next_slot`."""
        time_step = self._core.time_steps
        if self._uploads is not None:
            return self._uploads.slot(time_step)
        start = int(self._rows(np.array([time_step]), 0)[0])
        slot: NDArray[Any] = self.frames[start : start + self.num_envs].numpy()
        return slot

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Keep all frames that can be read in their places, for threads that do not append themselves.

        Within the block, `append` waits. What the block launches on its current stream is done before a later append
        writes over what it reads::

            with replay.reading():
                batch = replay.sample(32)
                obs = look_up(replay.frames, torch.from_numpy(batch.obs).to(replay.device))
        """
        with self._lock:
            try:
                yield
            finally:
                if self._uploads is not None:
                    self._uploads.let_finish()

    def sample(self, batch_size: int, out: Batch | None = None) -> Batch:
        """See `FrameReplay.sample`."""
        return self._arrived(super().sample(batch_size, out))

    def gather(self, index: ArrayLike, out: Batch | None = None) -> Batch:
        """See `FrameReplay.gather`."""
        return self._arrived(super().gather(index, out))

    def latest(self, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """See `FrameReplay.latest`."""
        return self._arrived(super().latest(out))

    def _arrived(self, rows: Rows) -> Rows:
        """Let the current stream wait for the frames of these rows: `append` may run on another stream."""
        if self._uploads is not None:
            self._uploads.wait()
        return rows

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

    def _elsewhere(self) -> dict[str, Any]:
        return {"device": str(self.device)}

    def _cell(self) -> tuple[tuple[int, ...], np.dtype[Any]]:
        return (), np.dtype(np.int32)

    def _rows(self, time_steps: NDArray[np.int64], env_index: int | slice) -> NDArray[np.int32]:
        """Rows of the frames that were, or will be, appended at these time steps: (T,), or (T, num_envs) for a slice."""
        env_indices = np.arange(self.num_envs)[env_index]
        starts = 1 + time_steps % self._slots * self.num_envs
        return (starts[:, None] + env_indices if isinstance(env_index, slice) else starts + env_indices).astype(
            np.int32
        )

    def _export(self, env_index: int, position: int, count: int, time_steps: int) -> tuple[NDArray[Any], ...]:
        with self._lock:
            rows, *rest = self._arrived(super()._export(env_index, position, count, time_steps))
            return look_up(self.frames, torch.from_numpy(rows).to(self.device)).cpu().numpy(), *rest

    def _import(self, env_index: int, position: int, frames: NDArray[Any], *rest: NDArray[Any]) -> None:
        first = self._core.time_steps - self._core.stored(env_index) + position
        rows = self._rows(np.arange(first, first + len(frames)), env_index)
        # Rows of one environment lie apart: sent in one write, and put in their places there.
        to = torch.from_numpy(rows).to(self.device, torch.int64)
        as_words(self.frames).index_copy_(0, to, as_words(torch.from_numpy(frames.copy()).to(self.device)))
        super()._import(env_index, position, rows, *rest)


class Uploads:
    """New frames on their way from pinned memory to their rows, on a stream of their own.

    Three rules keep them apart from readers:

    * Whatever is launched on the current stream after `send` waits until its frames are there. Other streams, those of
      other threads, `wait`.
    * The row that is written at time step t held a frame that batches could name until time step t - 1 was appended. So the copy
      waits for all that had been launched on the current stream by then, and for nothing younger: it runs beside the
      updates of its own step.
    * It waits for all that other streams had launched when they called `let_finish`.

    Args:
        frames: (R, *frame_shape) on the device.
        num_envs: rows that are sent at a time.
        cuda: what makes streams and events.
    """

    def __init__(self, frames: Tensor, num_envs: int, cuda: Any = torch.cuda) -> None:
        self._frames, self._cuda = frames, cuda
        pinned = frames.device.type == "cuda"
        shape = (2, num_envs, *frames.shape[1:])  # one is filled while the other may still be read
        self._staging = torch.empty(shape, dtype=frames.dtype, device="cpu", pin_memory=pinned)
        self._readers: dict[int, Any] = {}  # the newest event of each stream
        with on(frames.device):
            self._stream = cuda.Stream(frames.device)
            self._arrived = [cuda.Event(), cuda.Event()]  # per half of the staging memory
            self._newest = self._arrived[0]
            self._launched = cuda.Event()  # all that was launched when the previous frames were sent
            self._launched.record(cuda.current_stream(frames.device))

    def slot(self, time_step: int) -> NDArray[Any]:
        """Return the pinned memory for the frames of `time_step`, (num_envs, *frame_shape), free to be written."""
        self._arrived[time_step % 2].synchronize()
        half: NDArray[Any] = self._staging[time_step % 2].numpy()
        return half

    def send(self, time_step: int, row: int) -> None:
        """Launch the copy of what `slot(time_step)` holds to the rows from `row` on."""
        half, arrived = self._staging[time_step % 2], self._arrived[time_step % 2]
        with on(self._frames.device):
            current = self._cuda.current_stream(self._frames.device)
            for event in (self._launched, *self._readers.values()):
                self._stream.wait_event(event)
            self._readers.clear()
            with self._cuda.stream(self._stream):
                self._frames[row : row + len(half)].copy_(half, non_blocking=True)
                arrived.record(self._stream)
            current.wait_event(arrived)
            self._launched.record(current)
            self._newest = arrived

    def wait(self) -> None:
        """Let the current stream wait for the frames that were sent last, and so for all before them."""
        with on(self._frames.device):
            self._cuda.current_stream(self._frames.device).wait_event(self._newest)

    def let_finish(self) -> None:
        """Let what is sent later wait for all that the current stream has launched by now."""
        with on(self._frames.device):
            stream = self._cuda.current_stream(self._frames.device)
            event = self._cuda.Event()
            event.record(stream)
            self._readers[stream.cuda_stream] = event

"""Copies of new frames from pinned memory to a device, while other frames are read (see `Uploads`)."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from pydqn._util.cuda import on


class Uploads:
    """Copies new frames from pinned memory to their rows, on a stream of its own.

    Three rules keep the copies apart from what reads frames:

    * What is launched on the current stream after `send` waits until its frames are there. Other streams, those of
      other threads, `wait`.
    * The row that is written at time step t held a frame that batches could name until time step t - 1 was appended.
      So the copy waits for all that had been launched on the current stream by then, and for nothing later: it runs
      beside the updates of its own step.
    * The copy waits for all that other streams had launched when they called `let_finish`.

    Args:
        frames: (R, *frame_shape) on the device.
        num_envs: rows that are sent at a time.
        cuda: makes streams and events (for tests).
    """

    def __init__(self, frames: Tensor, num_envs: int, cuda: Any = torch.cuda) -> None:
        self._frames, self._cuda = frames, cuda
        pinned = frames.device.type == "cuda"
        shape = (2, num_envs, *frames.shape[1:])  # one is filled while the other may still be read
        self._staging = torch.empty(shape, dtype=frames.dtype, device="cpu", pin_memory=pinned)
        self._readers: dict[int, Any] = {}  # the newest event of each stream
        with on(frames.device):
            self._stream = cuda.Stream(frames.device)
            self._arrived = [cuda.Event(), cuda.Event()]  # one for each half of the pinned memory
            self._newest = self._arrived[0]
            self._launched = cuda.Event()  # all that was launched when the previous frames were sent
            self._launched.record(cuda.current_stream(frames.device))

    def slot(self, time_step: int) -> NDArray[Any]:
        """Return the pinned memory for the frames of `time_step`, (num_envs, *frame_shape), free to be written."""
        self._arrived[time_step % 2].synchronize()
        half: NDArray[Any] = self._staging[time_step % 2].numpy()
        return half

    def send(self, time_step: int, row: int) -> None:
        """Launch the copy of `slot(time_step)` to the rows from `row` on."""
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

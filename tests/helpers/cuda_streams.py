"""CUDA streams without a GPU: work is queued, and done in any order that streams and events allow."""

from __future__ import annotations

import numpy as np
import torch

from pydqn.replay.lookup import look_up
from pydqn.replay.uploads import Uploads


class FakeCuda:
    """Stands for `torch.cuda`. Work is kept in queues, from which `run` takes it in an order drawn at random."""

    def __init__(self, seed):
        self.main, self._active = self._Stream(self), None
        self.queues = [self.main]
        self._choose = np.random.default_rng(seed)

    class _Stream:
        def __init__(self, owner):
            self.owner, self.work, self.cuda_stream = owner, [], id(self)

        def wait_event(self, event):
            recorded = event.times
            self.work.append((lambda: event.passed >= recorded, lambda: None))

    class _Event:
        def __init__(self, owner):
            self.owner, self.times, self.passed = owner, 0, 0

        def record(self, stream):
            self.times += 1
            time = self.times

            def passes():
                self.passed = time

            stream.work.append((lambda: True, passes))

        def synchronize(self):
            self.owner.run(until=lambda: self.passed >= self.times)

    def Stream(self, device):
        stream = self._Stream(self)
        self.queues.append(stream)
        return stream

    def Event(self):
        return self._Event(self)

    def current_stream(self, device):
        return self._active or self.main

    def stream(self, stream):
        owner = self

        class Within:
            def __enter__(self):
                owner._active = stream

            def __exit__(self, *error):
                owner._active = None

        return Within()

    def launch(self, work):
        (self._active or self.main).work.append((lambda: True, work))

    def run(self, until=lambda: False):
        """Do queued work until the condition holds, one item at a time, from a queue drawn at random."""
        while not until():
            ready = [queue for queue in self.queues if queue.work and queue.work[0][0]()]
            if not ready:
                assert not any(queue.work for queue in self.queues), "the streams wait for each other"
                return
            _, work = ready[self._choose.integers(len(ready))].work.pop(0)
            work()


class QueuedTensor:
    """A tensor whose copies are queued on the current stream of a `FakeCuda`."""

    def __init__(self, tensor, cuda):
        self._tensor, self._cuda = tensor, cuda
        self.device, self.shape, self.dtype = tensor.device, tensor.shape, tensor.dtype

    def __getitem__(self, rows):
        return QueuedTensor(self._tensor[rows], self._cuda)

    def copy_(self, source, non_blocking):
        assert non_blocking
        self._cuda.launch(lambda: self._tensor.copy_(source))


def upload_through(replay, cuda):
    """Let a `DeviceReplay` with one environment on a CPU upload its frames through a `FakeCuda`; return the uploads."""
    replay._store.uploads = Uploads(QueuedTensor(replay.frames, cuda), 1, cuda=cuda)
    return replay._store.uploads


def launch_check(replay, cuda, rows, expected, wrong):
    """Launch a comparison of the first numbers of these rows' frames; `wrong` gets what was expected and not found."""

    def check():
        if not np.array_equal(looked_up(replay, rows)[..., 0], expected):
            wrong.append(expected)

    cuda.launch(check)


def looked_up(replay, rows):
    """Return the frames of rows of a `DeviceReplay`."""
    return look_up(replay.frames, torch.from_numpy(rows).to(replay.device)).cpu().numpy()

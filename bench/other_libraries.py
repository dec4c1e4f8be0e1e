"""Replay buffers of other libraries and our own with one interface: `add` an Atari transition, `sample` 32 of them.

Each gets transitions in its usual form: most take two stacks of four frames, some only the newest frame.
"""

from __future__ import annotations

import ctypes
import mmap

import numpy as np

FRAMES = np.random.default_rng(0).integers(0, 256, (260, 84, 84), dtype=np.uint8)
BATCH = 32
_OFF = np.zeros(1, bool)


class Pydqn:
    """Takes single frames."""

    def __init__(self, size, prioritized=False):
        from pydqn import FrameReplay

        self.replay = FrameReplay(size, prioritized=prioritized)
        self.batch = self.replay.empty_batch(BATCH)
        self.frames = FRAMES[:, None]
        self.action, self.reward = np.ones(1, np.int64), np.ones(1)
        self.replay.append(self.frames[0], self.action, self.reward, _OFF, _OFF, ~_OFF)
        self.priority = np.random.default_rng(0).uniform(0.1, 2.0, BATCH)

    def add(self, i):
        self.replay.append(self.frames[i % 250], self.action, self.reward, _OFF, _OFF, _OFF)

    def sample(self):
        return self.replay.sample(BATCH, self.batch).obs

    def sample_and_update(self):
        batch = self.replay.sample(BATCH, self.batch)
        self.replay.update_priorities(batch.index, self.priority)


class _Stacks:
    """A buffer that takes the stacks before and after a step, (4, 84, 84) each."""

    def __init__(self):
        self.stacks = [np.ascontiguousarray(FRAMES[i : i + 4]) for i in range(251)]
        self.priority = np.random.default_rng(0).uniform(0.1, 2.0, BATCH)


class StableBaselines3(_Stacks):
    def __init__(self, size, **kwargs):
        from gymnasium.spaces import Box, Discrete
        from stable_baselines3.common.buffers import ReplayBuffer

        super().__init__()
        box = Box(0, 255, (4, 84, 84), np.uint8)
        self.buffer = ReplayBuffer(size, box, Discrete(6), "cpu", handle_timeout_termination=False, **kwargs)
        self.action, self.reward = np.ones((1, 1), np.int64), np.ones(1, np.float32)

    def add(self, i):
        before, after = self.stacks[i % 250][None], self.stacks[i % 250 + 1][None]
        self.buffer.add(before, after, self.action, self.reward, np.zeros(1, np.float32), [{}])

    def sample(self):
        return self.buffer.sample(BATCH).observations


def stable_baselines3_optimized(size):
    return StableBaselines3(size, optimize_memory_usage=True)


class Cpprb(_Stacks):
    def __init__(self, size, compressed=True, prioritized=False):
        import cpprb

        super().__init__()
        stack = {"shape": (84, 84, 4), "dtype": np.uint8}
        spec = {"obs": stack, "act": {"dtype": np.int64}, "rew": {}, "done": {}}
        kind = cpprb.PrioritizedReplayBuffer if prioritized else cpprb.ReplayBuffer
        options = {"alpha": 0.6} if prioritized else {}
        if compressed:
            options |= {"next_of": "obs", "stack_compress": "obs"}
        else:
            spec["next_obs"] = stack
        self.buffer = kind(size, spec, **options)
        self.stacks = [np.ascontiguousarray(stack.transpose(1, 2, 0)) for stack in self.stacks]

    def add(self, i):
        self.buffer.add(obs=self.stacks[i % 250], act=1, rew=1.0, next_obs=self.stacks[i % 250 + 1], done=0.0)

    def sample(self):
        return self.buffer.sample(BATCH)["obs"]

    def sample_and_update(self):
        self.buffer.update_priorities(self.buffer.sample(BATCH, beta=0.4)["indexes"], self.priority)


def cpprb_plain(size):
    return Cpprb(size, compressed=False)


class TorchRL(_Stacks):
    def __init__(self, size, prioritized=False):
        import torch
        from tensordict import TensorDict
        from torchrl.data import LazyTensorStorage, TensorDictPrioritizedReplayBuffer, TensorDictReplayBuffer

        super().__init__()
        storage = LazyTensorStorage(size)
        if prioritized:
            self.buffer = TensorDictPrioritizedReplayBuffer(alpha=0.6, beta=0.4, storage=storage, batch_size=BATCH)
        else:
            self.buffer = TensorDictReplayBuffer(storage=storage, batch_size=BATCH)
        stacks = [torch.from_numpy(stack) for stack in self.stacks]
        rest = {"action": torch.tensor(1), "reward": torch.tensor(1.0), "done": torch.tensor(False)}
        self.items = [TensorDict({"obs": stacks[i], "next_obs": stacks[i + 1], **rest}, []) for i in range(250)]
        self.td_error = torch.from_numpy(self.priority)

    def add(self, i):
        self.buffer.add(self.items[i % 250])

    def sample(self):
        return self.buffer.sample()["obs"]

    def sample_and_update(self):
        batch = self.buffer.sample()
        batch["td_error"] = self.td_error
        self.buffer.update_tensordict_priority(batch)


class Tianshou:
    """Takes single frames and stacks them in `sample`."""

    def __init__(self, size, prioritized=False):
        from tianshou.data import Batch, PrioritizedReplayBuffer, ReplayBuffer

        options = {"stack_num": 4, "ignore_obs_next": True}
        self.buffer = (
            PrioritizedReplayBuffer(size, alpha=0.6, beta=0.4, **options)
            if prioritized
            else ReplayBuffer(size, **options)
        )
        rest = {"act": 1, "rew": 1.0, "terminated": False, "truncated": False, "info": {}}
        self.items = [Batch(obs=FRAMES[i], obs_next=FRAMES[i + 1], **rest) for i in range(250)]
        self.priority = np.random.default_rng(0).uniform(0.1, 2.0, BATCH)

    def add(self, i):
        self.buffer.add(self.items[i % 250])

    def sample(self):
        return self.buffer.sample(BATCH)[0].obs

    def sample_and_update(self):
        _, index = self.buffer.sample(BATCH)
        self.buffer.update_weight(index, self.priority)


# By name: a function that makes the buffer, its approximate bytes per transition, whether it has priorities.
BUFFERS = {
    "pydqn": (Pydqn, 7_100, True),
    "stable-baselines3": (StableBaselines3, 56_500, False),
    "stable-baselines3, optimized": (stable_baselines3_optimized, 28_300, False),
    "cpprb": (cpprb_plain, 56_500, False),
    "cpprb, compressed": (Cpprb, 8_000, True),
    "torchrl": (TorchRL, 56_500, True),
    "tianshou": (Tianshou, 7_100, True),
}


class PlainCopy:
    """A lower bound of sampling: runs of five frames from random slots of a ring, one memcpy for each."""

    def __init__(self, size, huge_pages):
        self.memory = mmap.mmap(-1, size * 84 * 84, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.memory.madvise(mmap.MADV_HUGEPAGE if huge_pages else mmap.MADV_NOHUGEPAGE)
        array = np.frombuffer(self.memory, np.uint8)
        array[::4096] = 1
        self._copy_from(array.ctypes.data, size)

    def _copy_from(self, address, size):
        self.address, self.size = address, size
        self.out = np.empty((BATCH, 5 * 84 * 84), np.uint8)
        self.generator = np.random.default_rng(0)

    def sample(self):
        target, run = self.out.ctypes.data, 5 * 84 * 84
        for i, slot in enumerate(self.generator.integers(self.size - 5, size=BATCH).tolist()):
            ctypes.memmove(target + i * run, self.address + slot * 84 * 84, run)
        return self.out


class RingCopy(PlainCopy):
    """The same with the memory of a full `FrameReplay` of one environment."""

    def __init__(self, replay):
        self.replay = replay
        slots = replay.capacity + 1
        self._copy_from(replay.next_slot().ctypes.data - replay._core.time_steps % slots * 84 * 84, slots)
        before, batch = replay.latest()[0, -1], self.out
        slot = (replay._core.time_steps - 1) % slots
        ctypes.memmove(batch.ctypes.data, self.address + slot * 84 * 84, 84 * 84)
        np.testing.assert_array_equal(batch[0, : 84 * 84].reshape(84, 84), before)  # the address is right

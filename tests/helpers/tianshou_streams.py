"""What the tests of the Tianshou adapter share: random environments, transitions, and equality."""

from __future__ import annotations

import copy

import numpy as np
import torch
from tianshou.algorithm.algorithm_base import Algorithm
from tianshou.data import Batch

ATARI = {"stack_num": 4, "save_only_last_obs": True, "ignore_obs_next": True}  # as in Tianshou's Atari examples
# Name: the buffer's options, shape of a frame, dtype, frames in observations that are added and in those that are
# returned (0: no axis of frames), and paddings.
KINDS = {
    "vectors": ({}, (3,), "float32", 0, 0, ["first"]),
    "numbers": ({}, (), "int64", 0, 0, ["first"]),
    "stacks": ({}, (6, 5), "uint8", 4, 4, ["first", "zero"]),
    "planes": ({}, (4, 6, 5), "uint8", 0, 0, ["first"]),  # not stacks, but of their shape
    "colours": ({"stack": 1}, (3, 6, 5), "uint8", 0, 0, ["first"]),
    "Atari": (ATARI, (6, 5), "uint8", 4, 4, ["first", "zero"]),
    "vectors in stacks": (ATARI, (3,), "float32", 4, 4, ["first"]),
    "shorter stacks": (ATARI, (6, 5), "uint8", 2, 4, ["first"]),
    "newest of stacks": ({"save_only_last_obs": True}, (6, 5), "uint8", 4, 0, ["first"]),
    "frames": ({"stack_num": 4}, (6, 5), "uint8", 0, 4, ["first"]),
    "stacked vectors": ({"stack_num": 3, "ignore_obs_next": True}, (3,), "float32", 0, 3, ["first"]),
    "stacked numbers": ({"stack_num": 2}, (), "float64", 0, 2, ["first"]),
}


class World:
    """Environments of random frames; `expected` is the reference for what each position has to hold."""

    def __init__(self, kind, num_envs, size_per_env, seed, breaks=0.0, ends=0.1, frame=None):
        self.options, self.frame, self.dtype, self.given, self.out, paddings = KINDS[kind]
        self.frame = frame or self.frame
        self.padding = paddings[seed % len(paddings)]
        self.random = np.random.default_rng(seed)
        self.size_per_env, self.breaks, self.ends = size_per_env, breaks, ends
        self.frames = [None] * num_envs
        self.counts = [0] * num_envs
        self.expected = {}
        self.after = {}  # the position of the next step of the same episode
        for env_index in range(num_envs):
            self._reset(env_index)

    def _new(self):
        return np.asarray(self.random.integers(256 if self.dtype == "uint8" else 1 << 24, size=self.frame)).astype(
            self.dtype
        )

    def _reset(self, env_index):
        frame = self._new()
        before = frame if self.padding == "first" else np.zeros_like(frame)
        self.frames[env_index] = [*[before] * 3, frame]
        self.last = {**getattr(self, "last", {}), env_index: None}

    def _seen(self, env_index, depth):
        return np.stack(self.frames[env_index][-depth:]) if depth else self.frames[env_index][-1].copy()

    def step(self, env_indices):
        """Return a batch for `add`."""
        rows = []
        for env_index in env_indices:
            given, out = self._seen(env_index, self.given), self._seen(env_index, self.out)
            self.frames[env_index].append(self._new())
            terminated, truncated = self.random.random(2) < self.ends
            row = {
                "act": int(self.random.integers(5)),
                "rew": float(self.random.normal()),
                "terminated": bool(terminated),
                "truncated": bool(truncated),
                "info": {"lives": int(self.random.integers(9)), "deep": {"x": float(self.random.normal())}},
                "policy": {},
            }
            rows.append({"obs": given, "obs_next": self._seen(env_index, self.given), **row})
            position = env_index * self.size_per_env + self.counts[env_index] % self.size_per_env
            self.counts[env_index] += 1
            self.expected.pop(position, None)
            done = bool(terminated or truncated)
            self.expected[position] = {"obs": out, "obs_next": self._seen(env_index, self.out), "done": done, **row}
            if self.last[env_index] is not None:
                self.after[self.last[env_index]] = position
            self.last[env_index] = position
            self.after.pop(position, None)
            if done or self.random.random() < self.breaks:
                self._reset(env_index)
        return Batch(rows)

    def returns(self, position, n_step):
        path = [position]
        while len(path) < n_step and path[-1] in self.after:
            path.append(self.after[path[-1]])
        last = self.expected[path[-1]]
        total = float(weigh(last["obs_next"][None])) * (not last["terminated"])
        for place in reversed(path):
            total = self.expected[place]["rew"] + 0.9 * total
        return total

    def play(self, buffers, steps, check=lambda: None, some=True):
        count = len(self.frames)
        for step in range(steps):
            env_indices = (
                self.random.permutation(count)[: self.random.integers(1, count + 1)] if some else np.arange(count)
            )
            batch = self.step(env_indices)
            added = [buffer.add(copy.copy(batch), env_indices if some else None) for buffer in buffers]
            for one in added:
                same(one, added[0])
            if step % 13 == 0:
                check()
        check()


def same(one, other):
    """Assert that both are equal, bit for bit."""
    if isinstance(one, Batch):
        assert isinstance(other, Batch)
        assert set(one.get_keys()) == set(other.get_keys())
        for key in one.get_keys():
            same(one[key], other[key])
    else:
        np.testing.assert_array_equal(one, other)
        assert np.asarray(one).dtype == np.asarray(other).dtype


def weigh(seen):
    """Return values that depend on every number in the observations, in place of a target network."""
    flat = seen.reshape(len(seen), -1).astype(np.float64)
    return torch.from_numpy(flat @ np.arange(1.0, flat.shape[1] + 1))


def returns(buffer, indices, n_step):
    def target(buffer, indices):
        return weigh(buffer[indices].obs_next)

    return Algorithm.compute_nstep_return(buffer[indices], buffer, indices, target, 0.9, n_step).returns.flatten()


def rows(obs, obs_next, terminated=False, truncated=False, rew=1.0):
    obs, obs_next = np.asarray(obs), np.asarray(obs_next)
    count = len(obs)
    flags = {"terminated": np.full(count, terminated), "truncated": np.full(count, truncated)}
    return Batch(obs=obs, obs_next=obs_next, act=np.zeros(count, int), rew=np.full(count, rew), info=Batch(), **flags)


def counting(make, num_envs, steps, cut=(), broken=(), **options):
    """Return a buffer of environments that count, environment i from 100 i on.

    Episodes are truncated at the steps `cut`, and end without a flag at the steps `broken`.
    """
    buffer = make(10 * num_envs, num_envs, **options)
    for step in range(steps):
        seen = 100.0 * np.arange(num_envs)[:, None] + step + 50 * sum(step > other for other in (*cut, *broken))
        buffer.add(rows(seen, seen + 1, truncated=step in cut))
    return buffer

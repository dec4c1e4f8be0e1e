"""What the tests of the TorchRL adapter share: environments, what collectors return of them, and equality."""

from __future__ import annotations

import functools

import gymnasium as gym
import numpy as np
import torch
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import (
    CatFrames,
    GymWrapper,
    RewardSum,
    SerialEnv,
    StepCounter,
    TransformedEnv,
    UnsqueezeTransform,
)
from torchrl.modules import RandomPolicy


class RandomFrames(gym.Env):
    """Random frames; terminates at random, and is truncated after 30 steps."""

    action_space = gym.spaces.Discrete(3)

    def __init__(self, seed, shape=(9, 8), dtype=np.uint8):
        self.random, self.steps, most = np.random.default_rng(seed), 0, 255 if dtype == np.uint8 else 1
        self.observation_space = gym.spaces.Box(0, most, shape, dtype)
        self._scale = 255 // most

    def _frame(self):
        frame = self.random.integers(1, 256, self.observation_space.shape)
        return (frame / self._scale).astype(self.observation_space.dtype)

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return self._frame(), {}

    def step(self, action):
        self.steps += 1
        return self._frame(), float(self.random.normal()), self.random.random() < 0.05, self.steps == 30, {}


def stack_of_frames(seed, dim=-3, dtype=np.uint8):
    env = TransformedEnv(GymWrapper(RandomFrames(seed, dtype=dtype)), UnsqueezeTransform(dim, in_keys=["observation"]))
    env.append_transform(CatFrames(N=4, dim=dim, in_keys=["observation"]))
    env.append_transform(RewardSum())
    return env


def cartpole(seed, one_hot=True):
    env = GymWrapper(gym.make("CartPole-v1"), categorical_action_encoding=not one_hot)
    env = TransformedEnv(env, StepCounter(max_steps=12))
    env.append_transform(RewardSum())
    env.set_seed(seed)
    return env


@functools.cache
def collected(make, envs, batches, per_batch):
    """Return the batches of a collector, in which each transition has a number."""
    torch.manual_seed(0)
    env = make(0) if envs == 1 else SerialEnv(envs, [lambda seed=seed: make(seed) for seed in range(envs)])
    total = batches * per_batch
    collector = Collector(env, RandomPolicy(env.action_spec), frames_per_batch=per_batch, total_frames=total)
    found = []
    for number, batch in enumerate(collector):
        batch["number"] = (torch.arange(batch.numel()) + number * batch.numel()).reshape(batch.shape)
        found.append(batch.clone())
    collector.shutdown()
    return found


def stream(make, envs=1, batches=28, per_batch=21):
    return [batch.clone() for batch in collected(make, envs, batches, per_batch * envs)]


def own(capacity, **settings):
    return TensorDictReplayBuffer(storage=LazyTensorStorage(capacity), batch_size=32, **settings)


def assert_same(ours, theirs, leave_out=("index",)):
    keys = set(theirs.keys(True, True)) - set(leave_out)
    assert set(ours.keys(True, True)) == keys
    assert ours.shape == theirs.shape
    assert ours.device in (theirs.device, torch.device("cpu"))
    for key in keys:
        assert ours[key].dtype == theirs[key].dtype, key
        assert ours[key].is_contiguous(), key
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=0, msg=str(key))


def rows(count=5, shape=(4,), key="observation", **others):
    """Return rows of one episode that does not end."""
    states = torch.rand(count + 1, *shape)
    flags = {name: torch.zeros(count, 1, dtype=torch.bool) for name in ("done", "terminated", "truncated")}
    after = {key: states[1:], "reward": torch.ones(count, 1), **flags}
    return TensorDict({key: states[:-1], "action": torch.arange(count), "next": after, **others}, [count])

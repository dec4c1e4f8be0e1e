"""What the tests of the Stable-Baselines3 adapter share: a small model, and a buffer of numbered transitions."""

from __future__ import annotations

import numpy as np
from gymnasium import spaces
from stable_baselines3 import DQN

from pydqn.adapters.sb3 import ReplayBuffer


def model_of(kind=DQN, env="CartPole-v1", **settings):
    defaults = {"buffer_size": 500, "policy_kwargs": {"net_arch": [8]}, "seed": 0, "device": "cpu"}
    return kind("MlpPolicy", env, **{**defaults, **settings})


def learner_of(kind=DQN, env="CartPole-v1", **settings):
    """Return a model with our buffer that begins to learn after 50 steps."""
    defaults = {"replay_buffer_class": ReplayBuffer, "learning_starts": 50, "policy_kwargs": {"net_arch": [16]}}
    return model_of(kind, env, **{**defaults, **settings})


def numbered(n_steps, length, done_at=None, truncated_at=None, gamma=0.98):
    """Return a buffer of ten with observations 0, 1, 2, ... and rewards of 1."""
    buffer = ReplayBuffer(10, spaces.Box(0, 1, (4,)), spaces.Discrete(2), "cpu", n_steps=n_steps, gamma=gamma)
    for step in range(length):
        obs = np.full((1, 4), step, np.float32)
        done = np.array([float(step == done_at)])
        infos = [{"TimeLimit.truncated": step == truncated_at}]
        buffer.add(obs, obs + 1, np.zeros((1, 1), int), np.ones(1), done, infos)
    return buffer

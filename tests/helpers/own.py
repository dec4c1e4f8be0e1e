"""An environment that a function makes, and a short run in it."""

from __future__ import annotations

import gymnasium
from gymnasium.wrappers import TimeLimit

import pydqn

QUICK = pydqn.Config(
    env_id="CartPole-v1",
    **{"network": "auto", "hidden_units": (16,), "stack": 2, "num_envs": 2, "device": "cpu", "torch_threads": 1},
    **{"learning_starts_steps": 40, "batch_size": 8, "replay_capacity_frames": 500, "total_steps": 200},
)


def short_poles(length=20, render_mode=None):
    """Make an environment that nobody has registered."""
    return TimeLimit(gymnasium.make("CartPole-v1", render_mode=render_mode), length)


def own_ids():
    return [env_id for env_id in gymnasium.registry if env_id.startswith("own/")]

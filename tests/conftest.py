"""Fixtures of several test files."""

from __future__ import annotations

import gymnasium
import pytest

from pydqn import preset
from tests.helpers.odd_envs import ID, Counted, Odd

# Episodes end after 400 frames, so that a run of a few hundred steps has whole ones.
TINY = {
    "num_envs": 2,
    "total_steps": 400,
    "replay_capacity_frames": 1000,
    "learning_starts_steps": 50,
    "train_period_steps": 4.0,
    "n_step": 3,
    "prioritized": False,
    "stop_return": float("inf"),
    "network": "small",
    "hidden_units": (32,),
    "batch_size": 8,
    "max_episode_frames": 400,
    "target_update_period": 20,
    "epsilon_decay_steps": 200,
    "log_every_steps": 100,
    "mean_episodes": 2,
    "device": "cpu",
    "torch_threads": 1,
}


@pytest.fixture
def tiny():
    """The config of a pong run that takes seconds."""
    return preset("pong", **TINY)


@pytest.fixture
def odd():
    """A subclass of `Odd`, registered for one test."""
    Odd.made, Odd.rendered = 0, []
    kind = type("Odd", (Odd,), {})
    gymnasium.register(ID, kind)
    yield kind
    del gymnasium.registry[ID]


@pytest.fixture
def counted():
    """A subclass of `Counted`, registered for one test."""
    Odd.made, Odd.rendered = 0, []
    Counted.made = Counted.alive = Counted.most = 0
    kind = type("Counted", (Counted,), {})
    gymnasium.register(ID, kind)
    yield kind
    del gymnasium.registry[ID]

"""Exploration and targets beside plain epsilon-greedy ones: ladder, Boltzmann, epsilon off, soft target updates."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pydqn import Config, LearnerSettings
from pydqn.learning.policy import Policy
from pydqn.learning.records import MASKED
from pydqn.learning.schedules import epsilon, epsilons
from tests.helpers.learners import make


def test_the_ladder_is_the_published_one():
    config = Config(num_envs=5, epsilon_start=0.4, epsilon_end=0.4, epsilon_ladder=7.0)
    np.testing.assert_allclose(epsilons(config, 100), [0.4 ** (1 + 7 * i / 4) for i in range(5)])
    assert epsilons(Config(num_envs=3, epsilon_start=0.4, epsilon_end=0.4), 0).tolist() == [0.4] * 3
    assert epsilons(Config(num_envs=1, epsilon_start=0.4, epsilon_end=0.4, epsilon_ladder=7.0), 0).tolist() == [0.4]


def test_each_environment_explores_with_its_own_epsilon():
    values = np.tile(np.float32([0, 0, 1]), (3, 1))
    chosen = np.stack(
        [
            Policy.choose(values, np.array([0.0, 0.3, 1.0]), g, 0.0)
            for g in [np.random.default_rng(0)]
            for _ in range(3000)
        ]
    )
    shares = (chosen != 2).mean(axis=0)
    np.testing.assert_allclose(shares, [0, 0.2, 2 / 3], atol=0.03)


def test_epsilon_goes_off():
    config = Config(epsilon_start=0.5, epsilon_end=0.5, epsilon_off_steps=1000)
    assert [epsilon(config, step) for step in (0, 999, 1000, 5000)] == [0.5, 0.5, 0.0, 0.0]
    assert epsilon(Config(epsilon_start=0.5, epsilon_end=0.5), 10**6) == 0.5


@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_boltzmann_exploration_draws_from_the_softmax(temperature):
    values = np.float32([[0.1, 0.0, 0.15, MASKED]])
    allowed = np.exp(values[0, :3].astype(float) / temperature)
    chosen = Policy.choose(np.repeat(values, 40_000, axis=0), 0.0, np.random.default_rng(0), temperature)
    shares = np.bincount(chosen, minlength=4) / 40_000
    np.testing.assert_allclose(shares[:3], allowed / allowed.sum(), atol=0.01)
    assert shares[3] == 0


def test_soft_updates_move_the_target_by_a_share():
    learner, replay, _ = make(target_update_period=1, target_update_rate=0.25)
    expected = [parameter.detach().clone() for parameter in learner.target.parameters()]
    for _ in range(5):
        learner.update(replay.sample(32))
        for average, online in zip(expected, learner.online.parameters(), strict=True):
            average += 0.25 * (online.detach() - average)
    for average, target in zip(expected, learner.target.parameters(), strict=True):
        torch.testing.assert_close(target, average)
    assert not torch.equal(next(learner.target.parameters()), next(learner.online.parameters()))


def test_small_moves_are_not_rounded_away():
    """In bfloat16, a step of 0.005 of the way would often be none."""
    with pytest.raises(ValueError, match="^target_update_rate: expected 1 with precision 'bfloat16'"):
        make(target_update_rate=0.005, precision="bfloat16")
    learner, _, _ = make(target_update_rate=0.005, precision="auto")
    assert learner.policy.dtype == torch.float32


@pytest.mark.parametrize(
    "wrong", [{"target_update_rate": 1.5}, {"epsilon_ladder": -1.0}, {"boltzmann_temperature": -1.0}]
)
def test_bad_settings(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        Config(**wrong)
    assert LearnerSettings().target_update_rate == 1

"""What the learner gets for rewards: the environment's own, their sign, or 1 for a long enough episode."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pydqn import Config
from pydqn.envs.base import Episode, Step
from pydqn.envs.rewards import learner_rewards
from tests.helpers.stepping import reset_envs, step

NO = np.zeros(3, bool)
STEP = Step(np.array([-100.0, 0.0, 0.5]), NO, NO, NO, [Episode(0, 3.0, 189), Episode(2, 5.0, 190)], 3)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"clip_rewards": False}, [-100, 0, 0.5]),
        ({"clip_rewards": True}, [-1, 0, 1]),
        ({"env_id": "ALE/Pong-v5"}, [-1, 0, 1]),
        ({"env_id": "CartPole-v1"}, [-100, 0, 0.5]),
        ({"success_steps": 190}, [0, 0, 1]),
        ({"success_steps": 189, "clip_rewards": False}, [1, 0, 1]),
    ],
)
def test_rewards_of_the_learner(settings, expected):
    before = STEP.reward.copy()
    reward = learner_rewards(Config(**settings), STEP)
    assert reward.dtype == np.float64
    assert reward.tolist() == expected
    np.testing.assert_array_equal(STEP.reward, before)


@pytest.mark.parametrize("clip_rewards", [False, True])
def test_environments_return_raw_rewards(clip_rewards):
    """In CliffWalking, action 1 leads off the cliff; the bottom row of Space Invaders is worth 5."""
    envs, frames = reset_envs(env_id="CliffWalking-v1", clip_rewards=clip_rewards)
    assert step(envs, frames, [1]).reward[0] == -100
    envs, frames = reset_envs(env_id="space_invaders", clip_rewards=clip_rewards)
    config = dataclasses.replace(Config(), clip_rewards=clip_rewards)
    generator = np.random.default_rng(0)
    rewards, learned, totals = [], set(), []
    while not totals:
        result = step(envs, frames, generator.integers(envs.num_actions, size=1))
        rewards.append(result.reward[0])
        learned |= set(learner_rewards(config, result).tolist())
        totals = [episode.total for episode in result.episodes]
    assert totals == [sum(rewards)]
    assert 5.0 in rewards
    assert learned == ({0.0, 1.0} if clip_rewards else set(rewards))

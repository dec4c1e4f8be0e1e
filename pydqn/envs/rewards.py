"""The rewards that the learner gets instead of those that the environments gave."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pydqn.config import Config
from pydqn.envs.base import Step
from pydqn.envs.tasks import resolved


def learner_rewards(config: Config, step: Step) -> NDArray[np.float64]:
    """Return the rewards of `step` for the learner, (num_envs,).

    With `success_steps`, the reward is 1 at the end of an episode of at least so many steps, else 0. Otherwise it is
    the environment's own, or its sign where `clip_rewards` says so.
    """
    if config.success_steps:
        reward = np.zeros_like(step.reward)
        for episode in step.episodes:
            reward[episode.env_index] = episode.steps >= config.success_steps
        return reward
    return np.sign(step.reward) if resolved(config).clip_rewards else step.reward

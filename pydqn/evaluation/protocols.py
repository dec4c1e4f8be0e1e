"""Evaluation protocols: the settings that each fixes, and how they are applied."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any, NamedTuple

from pydqn.config import Config
from pydqn.envs.tasks import episode_limit


class Protocol(NamedTuple):
    """An evaluation protocol."""

    summary: str
    source: str
    episodes: int
    settings: dict[str, Any]  # fields of Config that it fixes


# Settings with which the network was trained (its actions, frame skip and images) are in no protocol.
PROTOCOLS: dict[str, Protocol] = {
    "own": Protocol("the run's own settings", "the run's config", 30, {}),
    "nature": Protocol(
        "30 episodes of at most 5 minutes after up to 30 no-ops, with 5% random actions",
        "Mnih et al. 2015, Nature 518",
        30,
        {"evaluation_epsilon": 0.05, "noop_max_frames": 30, "sticky_actions": 0.0, "max_episode_frames": 18_000},
    ),
    # The paper does not evaluate apart from training: it averages the last 100 training episodes, at epsilon 0.01.
    # The limit of 30 minutes is Dopamine's; in the first author's published code an episode ends after 5.
    "machado2018": Protocol(
        "sticky actions and whole episodes of at most 30 minutes, at the final epsilon of their DQN's training "
        "(the paper itself reports the last training episodes)",
        "Machado et al. 2018, JAIR 61; the time limit as in Dopamine (Castro et al. 2018)",
        30,
        {
            "evaluation_epsilon": 0.01,
            "noop_max_frames": 0,
            "sticky_actions": 0.25,
            "terminal_on_life_loss": False,
            "max_episode_frames": 108_000,
        },
    ),
}


def under_protocol(config: Config) -> Config:
    """Return `config` with the settings of its protocol, and a limit of steps per episode where it has none."""
    config = dataclasses.replace(config, **PROTOCOLS[config.evaluation_protocol].settings)
    if episode_limit(config) is None:  # a policy may never end its episode
        config = dataclasses.replace(config, max_episode_steps=config.evaluation_max_episode_steps)
    return config


def warn_if_cut(config: Config, steps: int) -> None:
    """Warn if an episode of `steps` steps, played `under_protocol(config)`, was cut by the limit added there."""
    if episode_limit(config) is None and 0 < config.evaluation_max_episode_steps <= steps:
        warnings.warn(
            f"evaluation_max_episode_steps: {config.env_id} has no limit of steps of its own, and an evaluation cut "
            f"an episode after {steps:,}; its return so far counts (set 0 for no limit)",
            stacklevel=2,
        )

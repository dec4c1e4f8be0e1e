"""Protocols under which scores are compared: which settings they fix, and how evaluation applies them."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any, NamedTuple

from pydqn.config import Config
from pydqn.envs.tasks import episode_limit


class Protocol(NamedTuple):
    """A way to evaluate."""

    summary: str
    source: str
    episodes: int
    settings: dict[str, Any]  # fields of Config that it fixes


# What a trained network has settled already (its actions, frame skip and images) is in no protocol's settings.
PROTOCOLS: dict[str, Protocol] = {
    "own": Protocol("the run's own settings", "the run's config", 30, {}),
    "nature": Protocol(
        "30 episodes of at most 5 minutes after up to 30 no-ops, with 5% random actions",
        "Mnih et al. 2015, Nature 518",
        30,
        {"evaluation_epsilon": 0.05, "noop_max_frames": 30, "sticky_actions": 0.0, "max_episode_frames": 18_000},
    ),
    # The paper has no evaluation apart from training: it averages the last 100 training episodes, played at epsilon 0.01.
    # The limit of 30 minutes is Dopamine's; in the first author's published code an episode ends after 5.
    "machado2018": Protocol(
        "sticky actions and whole episodes of at most 30 minutes, at the epsilon with which their DQN ends its training "
        "(the paper itself reports the training's last episodes)",
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
    """Return `config` as evaluation plays: with what its protocol fixes, and a limit of steps where it has none."""
    config = dataclasses.replace(config, **PROTOCOLS[config.evaluation_protocol].settings)
    if episode_limit(config) is None:  # a policy may go on for ever
        config = dataclasses.replace(config, max_episode_steps=config.evaluation_max_episode_steps)
    return config


def warn_if_cut(config: Config, steps: int) -> None:
    """Warn when an episode of `steps` steps, played `under_protocol(config)`, was cut for want of another limit."""
    if episode_limit(config) is None and 0 < config.evaluation_max_episode_steps <= steps:
        warnings.warn(
            f"evaluation_max_episode_steps: {config.env_id} has no limit of steps of its own, and an episode of an "
            f"evaluation was cut after {steps:,}; its return counts as it is (0 for no cut)",
            stacklevel=2,
        )

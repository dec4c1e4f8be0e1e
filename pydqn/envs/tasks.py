"""What the settings of a `Config` mean for its environment, and which of them are for that environment alone."""

from __future__ import annotations

import dataclasses
from typing import Any

from pydqn.config import Config
from pydqn.envs.base import Envs
from pydqn.envs.frames import UNIT_RANGE, Part
from pydqn.envs.ids import rom_of, spec_of


def resolved(config: Config) -> Config:
    """Return `config` with "auto" replaced by its meaning for the environment: only Atari rewards are clipped.

    Raises:
        ValueError: see `rom_of`.
    """
    if config.clip_rewards != "auto":
        return config
    return dataclasses.replace(config, clip_rewards=rom_of(config.env_id) is not None)


def settings_to_reset(config: Config, env_id: str) -> dict[str, Any]:
    """Return the fields of `config` that do not apply to another environment, with their default values.

    These are the fields that are `bound_to` their environment and, if `env_id` is not an Atari game, those that are
    `bound_to` Atari games. `clip_rewards` stays if it is what "auto" means for `env_id`. Nothing is reset if both ids
    name the same game.

    Raises:
        ValueError: see `rom_of`.
    """
    if env_id == config.env_id:
        return {}
    rom = rom_of(env_id)
    if rom is not None and rom == rom_of(config.env_id):
        return {}
    bound_to = ("environment", "Atari") if rom is None else ("environment",)
    fields = (field for field in dataclasses.fields(Config) if field.metadata["bound_to"] in bound_to)
    defaults = {field.name: field.default for field in fields if getattr(config, field.name) != field.default}
    if config.clip_rewards == (rom is not None):  # the value that `resolved` would give
        defaults.pop("clip_rewards", None)
    return defaults


def with_overrides(config: Config, whose: str, overrides: dict[str, Any]) -> tuple[Config, str]:
    """Return `config` with fields replaced, and a note for people that says what was reset ("" if nothing was).

    Another environment (`env_id`) resets the settings that do not apply to it (see `settings_to_reset`), except those
    that are among the overrides.

    Args:
        config: the settings so far.
        whose: their owner, for the note: "the run's", for example.
        overrides: new values by field name.
    """
    env_id = overrides.get("env_id")
    reset = settings_to_reset(config, env_id) if isinstance(env_id, str) and ":" not in env_id else {}
    reset = {name: value for name, value in reset.items() if name not in overrides}
    changes = ", ".join(f"{name} {_text(getattr(config, name))} -> {_text(value)}" for name, value in reset.items())
    note = f"{env_id} is another environment than {whose} {config.env_id}, whose settings were reset: {changes}"
    return dataclasses.replace(config, **reset, **overrides), note if reset else ""


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def episode_limit(config: Config) -> int | None:
    """Return the number of steps after which an episode is truncated, or None if there is no limit.

    In an Atari game, `max_episode_frames` is a limit, too.

    Raises:
        ValueError: there is no such environment.
    """
    if rom_of(config.env_id) is not None:
        frames = max(1, config.max_episode_frames // config.frame_skip)
        return min(config.max_episode_steps or frames, frames)
    limit: int | None = config.max_episode_steps or spec_of(config.env_id).max_episode_steps
    return limit


def inputs_of(config: Config, envs: Envs) -> str:
    """Describe for people the shapes of observations and how a network scales them before its first layer."""
    texts = [_described_part(config, part) for part in envs.layout.parts]
    return ", ".join([*texts, *(["actions masked"] if envs.layout.masked_actions else [])])


def _described_part(config: Config, part: Part) -> str:
    shape, (low, high) = "x".join(map(str, part.shape)), part.input_range
    scaled = f"/ {high:g}" if low == 0 else f"from {low:g}..{high:g} to 0..1"
    scaled = "as they are" if part.input_range == UNIT_RANGE else scaled
    convolved = part.channels and config.network != "mlp"
    if convolved and (config.pixel_mean, config.pixel_std) != (0, 1):
        scaled += f" then (x - {config.pixel_mean:g}) / {config.pixel_std:g}"
    channels = f" (channels {part.channels})" if convolved and part.channels != "none" else ""
    name = f"{part.name} " if part.name else ""
    return f"{name}{shape}{channels} {part.dtype} {scaled}"


def described(config: Config, inputs: str) -> dict[str, str]:
    """Describe for people the kind of environment, its inputs (see `inputs_of`), rewards and limit of an episode.

    Raises:
        ValueError: there is no such environment.
    """
    rom, limit, cut = rom_of(config.env_id), episode_limit(config), config.evaluation_max_episode_steps
    rewards = "as they are"  # always so in tabular learning
    if config.agent != "tabular" and config.success_steps:
        rewards = f"1 at the end of an episode of at least {config.success_steps:,} steps, else 0"
    elif config.agent != "tabular" and resolved(config).clip_rewards:
        rewards = "clipped to their sign"
    if rom is not None:
        steps = [f"{config.max_episode_steps:,} steps"] if config.max_episode_steps else []
        episodes = "of at most " + " or ".join([*steps, f"{config.max_episode_frames:,} frames"])
    elif limit is not None:
        episodes = f"of at most {limit:,} steps"
    else:
        episodes = "as the environment ends them"  # it may have a limit of its own
        episodes += f" (in evaluation {cut:,}: evaluation_max_episode_steps)" if cut else ""
    arguments = "" if config.env_kwargs == "{}" else f" with {config.env_kwargs}"
    environment = f"{config.env_id}{arguments} ({'Gymnasium' if rom is None else 'Atari'})"
    return {"environment": environment, "inputs": inputs, "rewards": rewards, "episodes": episodes}

"""What the settings of a run mean for the environment that its `env_id` names."""

from __future__ import annotations

import dataclasses
from typing import Any

from pydqn.config import Config
from pydqn.envs.base import UNIT_RANGE, Envs
from pydqn.envs.ids import rom_of, spec_of


def resolved(config: Config) -> Config:
    """Return `config` with what "auto" means for its environment: rewards are clipped in Atari games alone.

    Raises:
        ValueError: see `rom_of`.
    """
    if config.clip_rewards != "auto":
        return config
    return dataclasses.replace(config, clip_rewards=rom_of(config.env_id) is not None)


def unbound(config: Config, env_id: str) -> dict[str, Any]:
    """Return the settings of `config` that belong to its own environment and not to `env_id`, with neutral values.

    They are fields of `Config` that are `bound_to` their environment, or to Atari games where `env_id` is of another
    kind; but for `clip_rewards` where it is already what "auto" means there. Two ids of one game name one environment.

    Raises:
        ValueError: see `rom_of`.
    """
    if env_id == config.env_id:
        return {}
    rom = rom_of(env_id)
    if rom is not None and rom == rom_of(config.env_id):
        return {}
    lost = ("environment", "Atari") if rom is None else ("environment",)
    fields = (field for field in dataclasses.fields(Config) if field.metadata["bound_to"] in lost)
    reset = {field.name: field.default for field in fields if getattr(config, field.name) != field.default}
    if config.clip_rewards == (rom is not None):  # as `resolved` has it
        reset.pop("clip_rewards", None)
    return reset


def with_overrides(own: Config, whose: str, overrides: dict[str, Any]) -> tuple[Config, str]:
    """Return `own` with fields replaced, and what was reset with that, for a person: "" where nothing was.

    With another environment (`env_id`), settings that belong to its own become neutral ones, unless they are replaced,
    too (see `unbound`).

    Args:
        own: the settings so far.
        whose: they are, as in "the run's".
        overrides: by the fields' names.
    """
    env_id = overrides.get("env_id")
    reset = unbound(own, env_id) if isinstance(env_id, str) and ":" not in env_id else {}
    reset = {field: value for field, value in reset.items() if field not in overrides}
    changes = ", ".join(f"{field} {_text(getattr(own, field))} -> {_text(value)}" for field, value in reset.items())
    note = f"{env_id} is another environment than {whose} {own.env_id}, whose settings were reset: {changes}"
    return dataclasses.replace(own, **reset, **overrides), note if reset else ""


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def episode_limit(config: Config) -> int | None:
    """Return after how many steps an episode is truncated; None where neither the config nor Gymnasium limits it.

    (An Atari game is limited in frames, too: `config.max_episode_frames`.)

    Raises:
        ValueError: no such environment.
    """
    if rom_of(config.env_id) is not None:
        frames = max(1, config.max_episode_frames // config.frame_skip)
        return min(config.max_episode_steps or frames, frames)
    limit: int | None = config.max_episode_steps or spec_of(config.env_id).max_episode_steps
    return limit


def inputs_of(config: Config, envs: Envs) -> str:
    """Return for a person what a network makes of frames before its first layer."""
    shape, (low, high) = "x".join(map(str, envs.frame_shape)), envs.input_range
    scaled = f"/ {high:g}" if low == 0 else f"from {low:g}..{high:g} to 0..1"
    scaled = "as they are" if envs.input_range == UNIT_RANGE else scaled
    if config.network != "mlp" and (config.pixel_mean, config.pixel_std) != (0, 1):
        scaled += f" then (x - {config.pixel_mean:g}) / {config.pixel_std:g}"
    return f"{shape} {envs.dtype} {scaled}"


def described(config: Config, inputs: str) -> dict[str, str]:
    """Return for a person what the id was taken for, what becomes of frames and rewards, and what limits an episode.

    Raises:
        ValueError: no such environment.
    """
    rom, limit, cut = rom_of(config.env_id), episode_limit(config), config.evaluation_max_episode_steps
    rewards = "as they are"  # in a table always
    if config.agent != "tabular" and config.success_steps:
        rewards = f"1 at the end of an episode of at least {config.success_steps:,} steps, else 0"
    elif config.agent != "tabular" and resolved(config).clip_rewards:
        rewards = "clipped to their sign"
    if rom is not None:
        most = [f"{config.max_episode_steps:,} steps"] if config.max_episode_steps else []
        episodes = "of at most " + " or ".join([*most, f"{config.max_episode_frames:,} frames"])
    elif limit is not None:
        episodes = f"of at most {limit:,} steps"
    else:
        episodes = "without a limit of steps"
        episodes += f" (in evaluation {cut:,}: evaluation_max_episode_steps)" if cut else ""
    kind = "Gymnasium" if rom is None else "Atari"
    environment = f"{config.env_id} ({kind})"
    return {"environment": environment, "inputs": inputs, "rewards": rewards, "episodes": episodes}

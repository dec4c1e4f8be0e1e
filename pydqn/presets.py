"""Presets: the published settings and our own, and how one is chosen and changed."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable
from typing import Any

from pydqn._util.hints import did_you_mean
from pydqn.config import Config
from pydqn.envs.tasks import with_overrides
from pydqn.published import PUBLISHED, Preset

# For any task: no clipping, no rule at which the run ends early, evaluations on.
_NEUTRAL = Config(
    num_envs=4,
    network="auto",
    stack=1,
    double=True,
    max_grad_norm=10.0,
    mean_episodes=100,
    evaluation_episodes=10,
    evaluation_epsilon=0.0,
    log_every_steps=1_000,
)

OURS: dict[str, Preset] = {
    "dqn": Preset(
        dataclasses.replace(
            _NEUTRAL,
            env_id="CartPole-v1",
            total_steps=100_000,
            hidden_units=(256, 256),
            batch_size=128,
            learning_rate=5e-4,
            learning_rate_end=5e-5,  # with a constant rate, CartPole was learned and forgotten again (one seed)
            learning_rate_decay_steps=100_000,
            optimizer_epsilon=1e-8,
            learning_starts_steps=1_000,
            train_period_steps=1.0,
            target_update_period=250,
            epsilon_end=0.05,
            epsilon_decay_steps=10_000,
            evaluation_every_steps=10_000,
        ),
        "Any task with vectors (--env-id); CartPole by default",
        "Neutral settings for tasks that we do not know",
    ),
    "dqn-image": Preset(
        dataclasses.replace(
            _NEUTRAL,
            env_id="ALE/Pong-v5",
            stack=4,
            learning_rate=1e-4,
            target_update_period=500,
            epsilon_end=0.05,
            epsilon_decay_steps=100_000,
            evaluation_every_steps=50_000,
        ),
        "Any task with images (--env-id); Pong by default",
        "Neutral settings for tasks that we do not know",
    ),
    "pong": Preset(
        Config(
            env_id="ALE/Pong-v5",
            num_envs=8,
            total_steps=500_000,
            stop_return=18.0,
            replay_capacity_frames=100_000,
            prioritized=True,
            network="small",
            hidden_units=(256,),
            dueling=True,
            pixel_mean=0.34,  # Pong's background: the torso gets zeros except for ball, paddles and score
            pixel_std=0.15,
            n_step=5,
            double=True,
            learning_rate=5e-4,
            learning_rate_end=1e-4,
            learning_rate_decay_steps=250_000,
            learning_starts_steps=3_000,
            train_period_steps=4.0,
            target_update_period=250,
            epsilon_decay_steps=30_000,
            checkpoint_every_steps=250_000,  # rarely, since episodes are cut off there
        ),
        "Atari Pong from pixels, to a mean return of 18",
        "Tuned by us for wall-clock time on two CPU cores",
    ),
}

PRESETS = {**OURS, **PUBLISHED}


def preset(name: str, **overrides: Any) -> Config:
    """Return the named preset's `Config`, with fields replaced by `overrides`.

    Another environment (`env_id`) resets the settings that do not apply to it, except those among the overrides, and a
    UserWarning names them: goals at which runs end, shaped and clipped rewards, limits of steps, statistics of pixels,
    and Atari options outside of Atari (see `bound_to` in `Config`).

    Raises:
        ValueError: there is no such preset or field (similar names are given), or a value is out of range.
    """
    config, note = preset_and_note(name, overrides)
    if note:
        warnings.warn(note, stacklevel=2)
    return config


def preset_and_note(name: str, overrides: dict[str, Any]) -> tuple[Config, str]:
    """Return the result of `preset`, and the text of its warning ("" if nothing was reset) instead of the warning."""
    if name not in PRESETS:
        raise ValueError(f"preset: {_unknown(name, PRESETS)}")
    fields = [field.name for field in dataclasses.fields(Config)]
    for field in overrides:
        if field not in fields:
            raise ValueError(f"{field}: {_unknown(field, fields)}")
    config, note = with_overrides(PRESETS[name].config, f"{name}'s", overrides)
    return config, f"preset: {note}" if note else ""


def _unknown(name: str, known: Iterable[str]) -> str:
    hint = did_you_mean(name, {other: [other] for other in known}, likeness=0.5)
    return f"{name!r} is not known; {hint or 'expected one of ' + ', '.join(known)}"

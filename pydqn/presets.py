"""The published and tuned settings: one entry each, with its source. A preset is data, never code."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, NamedTuple

from pydqn.config import Config


class Preset(NamedTuple):
    """A named `Config` and where its settings come from."""

    config: Config
    summary: str
    source: str


PRESETS: dict[str, Preset] = {
    "pong": Preset(
        Config(
            env_id="ALE/Pong-v5",
            num_envs=8,
            total_steps=500_000,
            stop_return=18.0,
            replay_capacity_frames=100_000,
            network="small",
            hidden_units=(256,),
            dueling=True,
            pixel_mean=0.34,  # the grey of Pong's background: the torso sees zeros but for ball, paddles and score
            pixel_std=0.15,
            n_step=5,
            double=True,
            learning_rate=3e-4,
            learning_starts_steps=3_000,
            steps_per_update=4.0,
            target_sync_updates=250,
            epsilon_decay_steps=30_000,
        ),
        "Atari Pong from pixels, to a mean return of 18",
        "tuned by us for wall-clock on two CPU cores",
    ),
}


def preset(name: str, **overrides: Any) -> Config:
    """Return the named preset's `Config`, with fields replaced by `overrides`.

    Raises:
        ValueError: there is no such preset or field (near matches are named), or a value is out of range.
    """
    if name not in PRESETS:
        raise ValueError(f"preset: {_unknown(name, PRESETS)}")
    fields = [field.name for field in dataclasses.fields(Config)]
    for field in overrides:
        if field not in fields:
            raise ValueError(f"{field}: {_unknown(field, fields)}")
    return dataclasses.replace(PRESETS[name].config, **overrides)


def _unknown(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}"
    return f"{name!r} is not known; {hint}"

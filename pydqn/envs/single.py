"""Making one Gymnasium environment, with checks of what it returns."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from pydqn.config import Config
from pydqn.envs.ids import spec_of

if TYPE_CHECKING:
    from pydqn.envs.checked import Checked


def open_env(config: Config, env_index: int, num_envs: int, seed: int, *, render: bool = False) -> tuple[Any, Checked]:
    """Make one environment of `num_envs`. The config's limit of steps replaces the environment's own.

    Returns:
        The environment, and the `Checked` in it.
    """
    import gymnasium

    from pydqn.envs.checked import WITHOUT_IMAGES, check, named

    env_id = config.env_id
    options: dict[str, Any] = json.loads(config.env_kwargs)
    for name, instead in (("render_mode", "which is chosen as needed"), ("max_episode_steps", "a setting of its own")):
        if name in options:
            raise ValueError(f"env_kwargs: expected no {name}, {instead}, got {config.env_kwargs}")
    if config.max_episode_steps:
        options["max_episode_steps"] = config.max_episode_steps
    if render:
        options["render_mode"] = "rgb_array"
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # images are drawn in memory, without a display
    spec = spec_of(env_id)
    which = f"env index {env_index} of {num_envs} (seed {seed})"
    try:
        env = gymnasium.make(spec, **options)
    except (gymnasium.error.Error, ImportError) as error:
        raise ValueError(f"env_id: Gymnasium cannot make {env_id!r} ({str(error).splitlines()[0]})") from None
    except (Exception, SystemExit) as error:
        hint = f"; {WITHOUT_IMAGES}" if "'render_mode'" in str(error) else ""
        if isinstance(error, TypeError) and "missing" in str(error) and "argument" in str(error):
            hint = "; give it in env_kwargs (--env-kwargs)"
        raise RuntimeError(f"env_id: {env_id}, {which} could not be made: {named(error)}{hint}") from error
    try:
        for name in ("observation_space", "action_space"):
            getattr(env, name)
        return check(env, env_id, env_index, seed)
    except Exception as error:
        with suppress(Exception):
            env.close()
        raise RuntimeError(f"env_id: {env_id}, {which} is not a Gymnasium environment: {named(error)}") from error

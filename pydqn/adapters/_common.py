"""What the replay buffers for CleanRL and for Stable-Baselines3 share: arguments, and the making of the buffer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import ArrayLike, DTypeLike, NDArray

from pydqn._util.checks import converted
from pydqn.replay.transitions import TransitionReplay


def check_spaces(observation_space: spaces.Space[Any], action_space: spaces.Space[Any], hint: str = "") -> int:
    """Return the number of actions.

    Raises:
        ValueError: observations are no single arrays (the message ends with `hint`), or actions are no integers.
    """
    if not isinstance(action_space, spaces.Discrete):
        raise ValueError(f"action_space: expected Discrete, got {action_space}")
    if observation_space.shape is None:
        raise ValueError(f"observation_space: expected one array, got {observation_space}{hint}")
    return int(action_space.n)


def size_per_env(buffer_size: int, n_envs: int) -> int:
    """Return how many transitions each environment keeps, rounded as Stable-Baselines3 and CleanRL round it."""
    return max(buffer_size // n_envs, 1)


def make_transitions(
    max_transitions: int, obs_shape: tuple[int, ...], dtype: DTypeLike | None, **settings: Any
) -> TransitionReplay:
    """Return a replay buffer, seeded from NumPy's global generator (which the trainers seed) unless a seed is given."""
    settings.setdefault("seed", int(np.random.randint(2**31)))  # noqa: NPY002
    return TransitionReplay(max_transitions, obs_shape, np.float32 if dtype is None else dtype, **settings)


def observations(transitions: TransitionReplay, name: str, value: ArrayLike) -> NDArray[Any]:
    """Return observations, (num_envs, *obs_shape), in the buffer's dtype.

    A single environment's may lack the leading axis, and those of one number each the last one. Reals are rounded.

    Raises:
        ValueError: the shape is another one, or a value would change by more than rounding.
    """
    array, shape = np.asarray(value), (transitions.num_envs, *transitions.obs_shape)
    if array.shape in ((transitions.num_envs,), transitions.obs_shape) and array.size == np.prod(shape):
        array = array.reshape(shape)
    if array.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got shape {array.shape}")
    return converted(name, array, transitions.frame_replay.dtype, rounded=True)


def column(num_envs: int, name: str, value: ArrayLike) -> NDArray[Any]:
    """Return one value per environment, (num_envs,), from an array of so many elements in any shape."""
    array = np.asarray(value)
    if array.size != num_envs:
        raise ValueError(f"{name}: expected shape ({num_envs},), got shape {array.shape}")
    return array.reshape(num_envs)


def timeouts(infos: Sequence[dict[str, Any]]) -> NDArray[np.bool_]:
    """Return, (len(infos),), which of the infos say that a time limit cut the episode off."""
    return np.array([bool(info.get("TimeLimit.truncated", False)) for info in infos], bool)

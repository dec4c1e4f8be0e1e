"""How the actions of Gymnasium's spaces are numbered, and which of them an environment allows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MOST_JOINT = 4_096


class Actions:
    """Numbers the actions of a space from 0.

    Discrete actions keep their order. Those of MultiDiscrete and MultiBinary spaces become the combinations of their
    parts (at most 4,096); the last part changes fastest.

    Args:
        env_id: for messages.
        space: of the actions.

    Raises:
        ValueError: another kind of space, or too many combinations.
    """

    def __init__(self, env_id: str, space: Any) -> None:
        from gymnasium import spaces

        self._sizes: NDArray[np.int64] | None = None  # of the parts, in the shape of an action
        if isinstance(space, spaces.Discrete):
            self._start: Any = int(space.start)
            self.count = int(space.n)
            self.names = tuple(map(str, range(self.count)))
            self.described = ""
            return
        if isinstance(space, spaces.MultiDiscrete):
            self._sizes, self._start = np.asarray(space.nvec, np.int64), np.asarray(space.start)
        elif isinstance(space, spaces.MultiBinary):
            self._sizes, self._start = np.full(space.shape, 2, np.int64), np.zeros(space.shape, np.int64)
        else:
            raise ValueError(
                f"env_id: {env_id} has {space} actions; DQN needs Discrete ones, or MultiDiscrete or MultiBinary ones, "
                "whose combinations it numbers. Choose some of the others in a gymnasium.ActionWrapper of your own"
            )
        self._dtype = space.dtype
        self.count = math.prod(self._sizes.ravel().tolist())
        if self.count > _MOST_JOINT:
            raise ValueError(
                f"env_id: {env_id} has {self.count:,} combinations of actions ({space}); a network has at most "
                f"{_MOST_JOINT:,}. Choose some of them in a gymnasium.ActionWrapper of your own"
            )
        self.names = tuple(",".join(map(str, np.ravel(self.of(number)))) for number in range(self.count))
        self.described = f"{self.count} combinations of {space}: number n is numpy.unravel_index(n, sizes) + start"

    def of_all(self, numbers: NDArray[np.int64]) -> Any:
        """Return the actions with these numbers, one per environment."""
        return numbers + self._start if self._sizes is None else [self.of(number) for number in numbers]

    def of(self, number: Any) -> Any:
        """Return the environment's action with this number."""
        if self._sizes is None:
            return number + self._start
        parts = np.array(np.unravel_index(int(number), tuple(self._sizes.ravel())), np.int64)
        return (parts.reshape(self._sizes.shape) + self._start).astype(self._dtype)


def mask_of(env: Any, info: dict[str, Any]) -> Any:
    """Return which actions an environment allows next, or None if it does not say.

    That is `info["action_mask"]`, or what a method `action_masks()` of the environment returns.
    """
    if "action_mask" in info:
        return info["action_mask"]
    try:
        method = env.get_wrapper_attr("action_masks")
    except AttributeError:
        return None
    return method() if callable(method) else None


def checked_mask(mask: Any, count: int, required: bool) -> NDArray[np.bool_]:
    """Return an action mask as (A,) booleans.

    Args:
        mask: what the environment gave; None if nothing.
        count: A.
        required: whether an action must be allowed, which need not be so at the end of an episode.

    Raises:
        ValueError: it is not one; the message describes it.
    """
    if mask is None:
        raise ValueError("gave no action mask, though it gave one at its first reset")
    array = np.asarray(mask)
    if array.shape != (count,) or array.dtype.kind not in "biuf" or not ((array == 0) | (array == 1)).all():
        raise ValueError(
            f"gave an action mask of shape {array.shape}, dtype {array.dtype}; expected {count} booleans, or numbers "
            "that are 0 or 1: one per action"
        )
    allowed: NDArray[np.bool_] = array.astype(np.bool_)
    if required and not allowed.any():
        raise ValueError("gave an action mask that allows no action, though the episode goes on")
    return allowed

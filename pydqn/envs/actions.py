"""How the actions of Gymnasium's spaces are numbered, and which of them an environment allows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MOST_JOINT = 4_096


class Actions:
    """Numbers the actions of a space from 0.

    Discrete actions keep their order. Those of other spaces (MultiDiscrete, MultiBinary, and Dict and Tuple of these
    and of Discrete) become the combinations of their parts (at most 4,096); the last part changes fastest.

    Args:
        env_id: for messages.
        space: of the actions.

    Raises:
        ValueError: another kind of space, or too many combinations.
    """

    def __init__(self, env_id: str, space: Any) -> None:
        from gymnasium import spaces

        self._space = space
        try:
            digits = list(_digits_of(space))
        except _NotNumbered:
            raise ValueError(
                f"env_id: {env_id} has {space} actions; DQN needs Discrete ones, or MultiDiscrete, MultiBinary, Dict "
                "or Tuple ones, whose combinations it numbers. Choose some of the others in a "
                "gymnasium.ActionWrapper of your own"
            ) from None
        self._sizes, starts = tuple(size for size, _ in digits), [start for _, start in digits]
        self.count = math.prod(self._sizes)
        self._start = starts[0] if isinstance(space, spaces.Discrete) else None
        if self._start is not None:
            self.names = tuple(map(str, range(self.count)))
            self.described = ""
            return
        if self.count > _MOST_JOINT:
            raise ValueError(
                f"env_id: {env_id} has {self.count:,} combinations of actions ({space}); a network has at most "
                f"{_MOST_JOINT:,}. Choose some of them in a gymnasium.ActionWrapper of your own"
            )
        rows = np.stack(np.unravel_index(np.arange(self.count), self._sizes), axis=1) + starts
        self.names = tuple(",".join(map(str, row)) for row in rows.tolist())
        self.described = f"{self.count} combinations of {space}: number n is numpy.unravel_index(n, sizes) + start"

    def of_all(self, numbers: NDArray[np.int64]) -> Any:
        """Return the actions with these numbers, one per environment."""
        return [self.of(number) for number in numbers] if self._start is None else numbers + self._start

    def of(self, number: Any) -> Any:
        """Return the environment's action with this number."""
        if self._start is not None:
            return number + self._start
        return _action_of(self._space, map(int, np.unravel_index(int(number), self._sizes)))


class _NotNumbered(Exception):
    """A space whose actions cannot be numbered."""


def _digits_of(space: Any) -> Iterator[tuple[int, int]]:
    """Return the number of values and the lowest value of each number in an action."""
    from gymnasium import spaces

    if isinstance(space, spaces.Discrete):
        yield int(space.n), int(space.start)
    elif isinstance(space, spaces.MultiDiscrete):
        yield from zip(np.ravel(space.nvec).tolist(), np.ravel(space.start).tolist(), strict=True)
    elif isinstance(space, spaces.MultiBinary):
        yield from [(2, 0)] * math.prod(space.shape)
    elif isinstance(space, (spaces.Dict, spaces.Tuple)) and len(space.spaces):
        for part in _parts_of(space):
            yield from _digits_of(part)
    else:
        raise _NotNumbered


def _parts_of(space: Any) -> Iterable[Any]:
    return space.spaces.values() if isinstance(space.spaces, Mapping) else space.spaces


def _action_of(space: Any, digits: Iterator[int]) -> Any:
    """Return the action of a space whose numbers, less their lowest values, come next."""
    from gymnasium import spaces

    if isinstance(space, spaces.Discrete):
        return space.dtype.type(next(digits) + space.start)
    if isinstance(space, spaces.Dict):
        return {key: _action_of(part, digits) for key, part in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(_action_of(part, digits) for part in space.spaces)
    numbers = np.fromiter(itertools.islice(digits, math.prod(space.shape)), np.int64).reshape(space.shape)
    return (numbers + getattr(space, "start", 0)).astype(space.dtype)


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

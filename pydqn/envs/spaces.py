"""Gymnasium's observation spaces: what a frame of one is, and which of its values a network takes as they are."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pydqn.envs.base import UNIT_RANGE

_MOST_ONE_HOT = 2**16  # numbers in a one-hot frame
_UNBOUNDED = 1e30  # some spaces write their dtype's largest value for no bound


class States(NamedTuple):
    """How Discrete observations, or tuples of them, are numbered: the last one counts fastest."""

    sizes: tuple[int, ...]
    starts: tuple[int, ...]

    @classmethod
    def of(cls, space: Any) -> States | None:
        """Return the numbering of a space, or None where it has none."""
        from gymnasium import spaces

        parts: Any = space.spaces if isinstance(space, spaces.Tuple) else (space,)
        if not parts or not all(isinstance(part, spaces.Discrete) for part in parts):
            return None
        return cls(tuple(int(part.n) for part in parts), tuple(int(part.start) for part in parts))

    @property
    def total(self) -> int:
        """How many states there are."""
        return math.prod(self.sizes)

    def number(self, observation: Any) -> int:
        """Return the number of the state that an observation shows: a number, or several in any sequence."""
        several = isinstance(observation, (tuple, list)) or getattr(observation, "ndim", 0) > 0
        parts = observation if several else (observation,)
        total = 0
        for part, size, start in zip(parts, self.sizes, self.starts, strict=True):
            total = total * size + (int(part) - start)
        return total


class Frames(NamedTuple):
    """What observations are stored as."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    input_range: tuple[float, float]  # which values networks map to 0 and 1
    states: States | None  # where frames are the one-hot numbers of states


def frames_of(env_id: str, space: Any) -> Frames:
    """Return what observations of `space` are stored as: uint8 as such, other numbers and one-hot states as float32.

    Raises:
        ValueError: the space is neither Box nor Discrete nor a Tuple of Discrete ones, or has too many states.
    """
    from gymnasium import spaces

    states = States.of(space)
    if states is not None:
        if states.total > _MOST_ONE_HOT:
            raise ValueError(
                f"env_id: {env_id} has {states.total:,} states ({space}); as one-hot frames a network takes at most "
                f"{_MOST_ONE_HOT:,}: describe them in numbers, a Box, with a wrapper of your own"
            )
        return Frames((states.total,), np.dtype(np.float32), UNIT_RANGE, states)
    if not isinstance(space, spaces.Box) or not space.shape:
        raise ValueError(f"env_id: {env_id} has {space} observations; expected Box or Discrete ones")
    dtype = np.dtype(np.uint8 if space.dtype == np.uint8 else np.float32)
    return Frames(space.shape, dtype, _input_range(space.low, space.high, dtype), None)


def _input_range(low: NDArray[Any], high: NDArray[Any], dtype: np.dtype[Any]) -> tuple[float, float]:
    """Return which values networks map to 0 and 1, for observations between these bounds.

    Images (two axes or more) and bytes are mapped from their bounds to 0..1. They are taken as they are where they lie
    within -1..1, or have no bounds; and so are vectors of other numbers, whose bounds say little.
    """
    least, most = float(low.min()), float(high.max())
    numbers = low.ndim == 1 and dtype != np.uint8
    if numbers or max(-least, most) > _UNBOUNDED or not least < most or (least >= -1 and most <= 1):
        return UNIT_RANGE
    return least, most


def bounds_of(space: Any) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """Return the lowest and the highest observation of a Box space, or None for another space."""
    from gymnasium import spaces

    return (space.low, space.high) if isinstance(space, spaces.Box) else None

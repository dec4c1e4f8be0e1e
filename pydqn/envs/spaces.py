"""How observations of Gymnasium's spaces become frames, and which of their values a network maps to 0 and 1."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pydqn.envs.base import UNIT_RANGE

_MAX_ONE_HOT = 2**16  # numbers in a one-hot frame
_UNBOUNDED = 1e30  # some spaces give their dtype's largest value instead of infinity


class States(NamedTuple):
    """How Discrete observations, or tuples of them, are numbered: the last part changes fastest."""

    sizes: tuple[int, ...]
    starts: tuple[int, ...]

    @classmethod
    def of(cls, space: Any) -> States | None:
        """Return the numbering of a space, or None if its observations cannot be numbered."""
        from gymnasium import spaces

        parts: Any = space.spaces if isinstance(space, spaces.Tuple) else (space,)
        if not parts or not all(isinstance(part, spaces.Discrete) for part in parts):
            return None
        return cls(tuple(int(part.n) for part in parts), tuple(int(part.start) for part in parts))

    @property
    def total(self) -> int:
        """The number of states."""
        return math.prod(self.sizes)

    def number(self, observation: Any) -> int:
        """Return the number of the state of an observation, which is one number or a sequence of several."""
        several = isinstance(observation, (tuple, list)) or getattr(observation, "ndim", 0) > 0
        parts = observation if several else (observation,)
        total = 0
        for part, size, start in zip(parts, self.sizes, self.starts, strict=True):
            total = total * size + (int(part) - start)
        return total


class Frames(NamedTuple):
    """The form in which observations are stored."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    input_range: tuple[float, float]  # the values that networks map to 0 and 1
    states: States | None  # the numbering of states, if frames are one-hot


def frames_of(env_id: str, space: Any) -> Frames:
    """Return how observations of `space` are stored: uint8 stays, other numbers and one-hot states are float32.

    Raises:
        ValueError: the space is neither Box nor Discrete nor a Tuple of Discrete ones, or it has too many states.
    """
    from gymnasium import spaces

    states = States.of(space)
    if states is not None:
        if states.total > _MAX_ONE_HOT:
            raise ValueError(
                f"env_id: {env_id} has {states.total:,} states ({space}); as one-hot frames a network takes at most "
                f"{_MAX_ONE_HOT:,}. Describe them by numbers (a Box space) in a wrapper of your own"
            )
        return Frames((states.total,), np.dtype(np.float32), UNIT_RANGE, states)
    if not isinstance(space, spaces.Box) or not space.shape:
        raise ValueError(f"env_id: {env_id} has {space} observations; expected Box or Discrete ones")
    dtype = np.dtype(np.uint8 if space.dtype == np.uint8 else np.float32)
    return Frames(space.shape, dtype, _input_range(space.low, space.high, dtype), None)


def _input_range(low: NDArray[Any], high: NDArray[Any], dtype: np.dtype[Any]) -> tuple[float, float]:
    """Return the values that networks map to 0 and 1, for observations between these bounds.

    Images (two axes or more) and bytes are mapped from their bounds to 0..1, except where their bounds are within
    -1..1 or infinite. Vectors of other numbers stay as they are: their bounds say little about usual values.
    """
    lowest, highest = float(low.min()), float(high.max())
    numbers = low.ndim == 1 and dtype != np.uint8
    if numbers or max(-lowest, highest) > _UNBOUNDED or not lowest < highest or (lowest >= -1 and highest <= 1):
        return UNIT_RANGE
    return lowest, highest


def bounds_of(space: Any) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """Return the lowest and the highest observation of a Box space, or None for other spaces."""
    from gymnasium import spaces

    return (space.low, space.high) if isinstance(space, spaces.Box) else None

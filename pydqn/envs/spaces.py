"""How observations of Gymnasium's spaces become frames, and which of their values a network maps to 0 and 1."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pydqn._util.checks import converted
from pydqn.envs.frames import UNIT_RANGE, FrameLayout, Part

_MAX_ONE_HOT = 2**16  # numbers in a one-hot vector
_UNBOUNDED = 1e30  # some spaces give their dtype's largest value instead of infinity
_LEAST_SIDE = 10  # pixels; smaller arrays are taken for tables of numbers
_BYTE, _REAL = np.dtype(np.uint8), np.dtype(np.float32)
_EXPECTED = "Box, Discrete, MultiDiscrete or MultiBinary ones, or a Dict or Tuple of these"


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

    def one_hot(self, observation: Any) -> NDArray[np.float32]:
        """Return zeros, and a one for the state of the observation."""
        row = np.zeros(self.total, np.float32)
        row[self.number(observation)] = 1
        return row


class _Leaf(NamedTuple):
    """One space that is not made of others, the way to it, and how its observations become numbers."""

    path: tuple[Any, ...]  # keys of Dict spaces and indices of Tuple spaces
    part: Part
    convert: Callable[[Any], NDArray[Any]] | None  # None for numbers that stay as they are

    def values(self, observation: Any) -> NDArray[Any]:
        """Return the leaf's part of a whole observation, in the shape of `part`."""
        for key in self.path:
            observation = observation[key]
        return np.asarray(observation) if self.convert is None else self.convert(observation)


class Encoder:
    """Turns the observations of a space into frames.

    * Box: as they are; uint8 and bool are stored as bytes, other numbers as float32. Arrays of two or three axes with
      sides of at least 10 are images.
    * Discrete, or a Tuple of Discrete: one-hot, one number per state (or, above 65,536 states, per part).
    * MultiDiscrete and MultiBinary: one-hot, as bytes.
    * Dict and Tuple: the parts in the order of the space. Without images, they become one vector, for which parts with
      an input range are scaled. With images, frames are records.

    Args:
        env_id: for messages.
        space: of the observations.
        channels: "first" or "last" says where images with three axes have their channels; "auto" takes the first axis
            if it is shorter than the last one.
        scaling: "auto" maps images and bytes from their bounds to 0..1 (see `_input_range`), "none" nothing.
        masked_actions: see `FrameLayout`.

    Raises:
        ValueError: the space has other parts, or too many states.
    """

    def __init__(
        self, env_id: str, space: Any, *, channels: str = "auto", scaling: str = "auto", masked_actions: int = 0
    ) -> None:
        self._options = channels, scaling
        joint = States.of(space)
        if joint is not None and (len(joint.sizes) == 1 or joint.total <= _MAX_ONE_HOT):
            _require_size(env_id, space, joint.total)
            self._leaves = [_Leaf((), Part("", (joint.total,), _REAL, UNIT_RANGE), joint.one_hot)]
        else:
            self._leaves = list(self._leaves_of(env_id, space, ()))
        parts = [leaf.part for leaf in self._leaves]
        self._images = [leaf for leaf in self._leaves if leaf.part.channels]
        self._vectors = [leaf for leaf in self._leaves if not leaf.part.channels]
        self._merged = len(self._leaves) > 1 and bool(self._vectors)
        if self._merged:
            bytes_alone = all(
                leaf.part.dtype == _BYTE and leaf.part.input_range == UNIT_RANGE for leaf in self._vectors
            )
            size = sum(math.prod(leaf.part.shape) for leaf in self._vectors)
            images = [leaf.part for leaf in self._images]
            name = "vector" if images else ""
            while name in {part.name for part in images}:
                name += "_"
            parts = [*images, Part(name, (size,), _BYTE if bytes_alone else _REAL, UNIT_RANGE)]
        self.layout = FrameLayout(tuple(parts), masked_actions)
        self._plain = not self.layout.is_record and not self._merged and self._leaves[0].convert is None

    def write(self, observation: Any, out: NDArray[Any], mask: NDArray[np.bool_] | None = None) -> None:
        """Write an observation, and the action mask if the layout has one, into a frame.

        Raises:
            ValueError: a value would change, or a number in a record is not finite.
        """
        if self._plain:  # the usual case, and faster
            _copy(self._leaves[0], self._leaves[0].values(observation), out)
            return
        views = self.layout.views(out)
        for leaf, view in zip(self._images if self._merged else self._leaves, views, strict=not self._merged):
            _copy(leaf, leaf.values(observation), view, self.layout.is_record)
        if self._merged:
            self._write_vector(observation, views[-1])
        if mask is not None:
            self.layout.write_mask(out, mask)

    def _write_vector(self, observation: Any, out: NDArray[Any]) -> None:
        start = 0
        for leaf in self._vectors:
            size, (low, high) = math.prod(leaf.part.shape), leaf.part.input_range
            view = out[start : start + size].reshape(leaf.part.shape)
            _copy(leaf, leaf.values(observation), view, self.layout.is_record)
            if leaf.part.input_range != UNIT_RANGE:
                view -= low
                view /= high - low
            start += size

    def _leaves_of(self, env_id: str, space: Any, path: tuple[Any, ...]) -> Iterator[_Leaf]:
        from gymnasium import spaces

        name = ".".join(map(str, path))
        if isinstance(space, spaces.Dict):
            for key, part in space.spaces.items():
                yield from self._leaves_of(env_id, part, (*path, key))
        elif isinstance(space, spaces.Tuple):
            for index, part in enumerate(space.spaces):
                yield from self._leaves_of(env_id, part, (*path, index))
        elif isinstance(space, spaces.MultiBinary):
            yield _Leaf(path, Part(name, tuple(space.shape), _BYTE, UNIT_RANGE), _whole)
        elif isinstance(space, (spaces.MultiDiscrete, spaces.Discrete)):
            sizes, starts = (
                (np.ravel(space.nvec), np.ravel(space.start))
                if isinstance(space, spaces.MultiDiscrete)
                else ([space.n], [space.start])
            )
            size = int(np.sum(sizes))
            _require_size(env_id, space, size)
            first = np.concatenate([[0], np.cumsum(sizes)[:-1]]) - starts  # index of the one, for the value 0
            yield _Leaf(path, Part(name, (size,), _BYTE, UNIT_RANGE), _OneHots(first, size))
        elif isinstance(space, spaces.Box):
            alone = not path and not space.shape  # a single number becomes a vector of one
            yield _Leaf(path, self._array(name, space, (1,) if alone else space.shape), np.ravel if alone else None)
        else:
            which = f"{space} observations" if not path else f"{space} in observations ({name})"
            raise ValueError(f"env_id: {env_id} has {which}; expected {_EXPECTED}")

    def _array(self, name: str, space: Any, shape: tuple[int, ...]) -> Part:
        channels, scaling = self._options
        dtype = _BYTE if space.dtype in (np.uint8, np.bool_) else _REAL
        shape = tuple(int(size) for size in shape)
        scale = _input_range(space.low, space.high, dtype) if scaling == "auto" else UNIT_RANGE
        return Part(name, shape, dtype, scale, channels_of(shape, channels))


class _OneHots:
    """Turns integers into one row, with a one for each of them."""

    def __init__(self, first: NDArray[np.int64], size: int) -> None:
        self._first, self._size = first, size

    def __call__(self, observation: Any) -> NDArray[np.uint8]:
        row = np.zeros(self._size, np.uint8)
        row[self._first + np.ravel(observation)] = 1
        return row


def _require_size(env_id: str, space: Any, size: int) -> None:
    if size > _MAX_ONE_HOT:
        raise ValueError(
            f"env_id: {env_id} has {size:,} states ({space}); as one-hot frames a network takes at most "
            f"{_MAX_ONE_HOT:,}. Describe them by numbers (a Box space) in a wrapper of your own"
        )


def _whole(observation: Any) -> NDArray[np.uint8]:
    return np.asarray(observation).astype(np.uint8)


def _copy(leaf: _Leaf, values: NDArray[Any], out: NDArray[Any], require_finite: bool = False) -> None:
    """Write values of any dtype. Integers keep their values, reals may be rounded."""
    name = f"observation ({leaf.part.name})" if leaf.part.name else "observation"
    out[...] = converted(name, values, out.dtype, rounded=True, way_on="scale it in a wrapper")
    if require_finite and out.dtype.kind == "f" and not np.isfinite(out).all():
        raise ValueError(f"{name} that is not finite")


def channels_of(shape: tuple[int, ...], given: str, least_side: int = _LEAST_SIDE) -> str:
    """Return where the channels of an image are ("none", "first" or "last"), or "" if the array is no image.

    Args:
        shape: of the array.
        given: "first" or "last" for images with three axes; "auto" takes the first axis if it is shorter than the last.
        least_side: an array with a shorter side is no image.
    """
    where = "none" if len(shape) == 2 else "first" if given == "first" else "last"
    if len(shape) == 3 and given == "auto" and shape[0] < shape[2]:
        where = "first"
    sides = shape[1:] if where == "first" else shape[:2]
    return where if len(shape) in (2, 3) and min(sides) >= least_side else ""


def _input_range(low: NDArray[Any], high: NDArray[Any], dtype: np.dtype[Any]) -> tuple[float, float]:
    """Return the values that networks map to 0 and 1, for observations between these bounds.

    Images (two axes or more) and bytes are mapped from their bounds to 0..1, except where their bounds are within
    -1..1 or infinite. Vectors of other numbers stay as they are: their bounds say little about usual values.
    """
    lowest, highest = float(low.min()), float(high.max())
    numbers = low.ndim <= 1 and dtype != np.uint8
    if numbers or max(-lowest, highest) > _UNBOUNDED or not lowest < highest or (lowest >= -1 and highest <= 1):
        return UNIT_RANGE
    return lowest, highest


def stacked_space(layout: FrameLayout, stack: int) -> Any:
    """Return the space of `stack` frames, as networks get them: a Box, or for several parts a Dict of them."""
    from gymnasium import spaces

    boxes: dict[str, Any] = {part.name: numbers((stack, *part.shape), part.dtype) for part in layout.parts}
    return spaces.Dict(boxes) if len(boxes) > 1 else next(iter(boxes.values()))


def numbers(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    """Return the Box space of all arrays of this shape and dtype."""
    from gymnasium import spaces

    low, high = (0, 255) if dtype == _BYTE else (-np.inf, np.inf)
    return spaces.Box(low, high, shape, dtype.type)


def bounds_of(space: Any) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """Return the lowest and the highest observation of a Box space, or None for other spaces."""
    from gymnasium import spaces

    return (space.low, space.high) if isinstance(space, spaces.Box) else None

"""Observations as stacks of successive frames: how they are made, and whether they are (see `StackFinder`)."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pydqn._util.checks import integer

_MOST = 16  # frames in a stack that is looked for


class Stacks(NamedTuple):
    """How observations are made of successive frames, the newest last, along one axis."""

    stack: int
    axis: int  # of the observation
    frame_shape: tuple[int, ...]
    wide: bool  # a frame keeps that axis, since it is more than one wide there (RGB, say)

    @classmethod
    def of(cls, shape: tuple[int, ...], dtype: np.dtype[Any], stack: int | None) -> Stacks:
        """Look at the shape of an observation.

        An image, (C, H, W) or (H, W, C) uint8, is taken for C gray frames, or for C / 3 in colour where that divides;
        everything else for one frame. `stack` says how many there are instead: along the colour axis of an image, and
        along the first axis of everything else.

        Raises:
            ValueError: `stack` does not divide that axis.
        """
        image, axis = _image_and_axis(shape, dtype)
        if stack is None:
            width = shape[axis] if image else 1
            stack = width // 3 if width % 3 == 0 else width
        stack = integer("stack", stack, 1)
        if stack == 1:
            return cls(1, 0, shape or (1,), False)
        if not shape or shape[axis] % stack:
            raise ValueError(f"stack: expected a divisor of axis {axis} of observations of shape {shape}, got {stack}")
        width = shape[axis] // stack
        frame = (*shape[:axis], *([width] if width > 1 else []), *shape[axis + 1 :])
        return cls(stack, axis, frame or (1,), width > 1)

    def split(self, observations: NDArray[Any]) -> NDArray[Any]:
        """Return the frames of (n, *shape) observations, (n, stack, *frame_shape): a view where that can be."""
        shape, axis = observations.shape, self.axis + 1
        if self.wide:
            parts = observations.reshape(*shape[:axis], self.stack, -1, *shape[axis + 1 :])
            return np.moveaxis(parts, axis, 1)
        if self.stack > 1 and axis > 1:
            observations = np.moveaxis(observations, axis, 1)
        return observations.reshape(shape[0], self.stack, *self.frame_shape)

    def join(self, frames: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        """Undo `split`, for observations of that shape."""
        if (self.stack > 1 and self.axis > 0) or self.wide:
            frames = np.moveaxis(frames, 1, self.axis + 1)
        return frames.reshape(len(frames), *shape)


class StackFinder:
    """Finds out of how many frames observations are made: first from their shape, then from the first steps.

    Three gray images look like one in colour, so observations may be stacks of more frames than their shape suggests.

    Args:
        shape: of one observation.
        dtype: of observations.
        stack: frames in an observation; None to find out.

    Attributes:
        stacks: what observations are taken for.
        sure: whether that was said, or settled by a step.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any], stack: int | None) -> None:
        self._shape, self._dtype = shape, dtype
        self.stacks = Stacks.of(shape, dtype, stack)
        self.sure = stack is not None
        # What observations may be instead: stacks of more, gray frames. None if that is impossible, or refuted.
        self._deeper = None if self.sure else self._stacks_of_gray()
        self._shifts = 0  # steps that moved such a stack on by one frame

    def moved_on(self, obs: NDArray[Any], next_obs: NDArray[Any]) -> NDArray[np.bool_]:
        """Return, (n,), whether each of the next observations is the one before moved on by one frame.

        If the first steps do not move on by a frame of `stacks`, observations are taken for single frames from then on.
        """
        if self.stacks.stack == 1:
            return np.ones(len(obs), bool)
        moved = _moved_on(self.stacks, obs, next_obs)
        if not self.sure and (not moved.any() or self._moved_on_by_gray(obs, next_obs)):
            self.stacks = Stacks.of(self._shape, self._dtype, 1)
            moved = np.ones(len(obs), bool)
        self.sure = True
        return moved

    def advice(self, obs: NDArray[Any], next_obs: NDArray[Any]) -> str:
        """Return what to pass for steps that did not move on, as a part of an error message."""
        if self._deeper is not None and self._moved_on_by_gray(obs, next_obs):
            return f"stack={self._deeper.stack} for gray frames, or "
        return ""

    def look_for_gray(self, obs: NDArray[Any], next_obs: NDArray[Any]) -> None:
        """Warn the caller's caller, once, if observations turn out to be stacks of gray frames after all."""
        if self._deeper is None:
            return
        gray, stack = self._deeper.stack, self.stacks.stack
        moved = self._moved_on_by_gray(obs, next_obs)
        if moved is False:
            self._deeper = None
        elif moved:
            self._shifts += 1  # once is not enough: a black image in colour may get one colour before the others
        if self._shifts >= gray:
            self._deeper = None
            warnings.warn(
                f"observations of shape {self._shape} look like stacks of {gray} frames, but each is stored as "
                f"{stack}; pass stack={gray} to store each frame once, which takes about 1/{gray // stack} of the "
                f"memory (or stack={stack} to keep it so)",
                stacklevel=3,
            )

    def _stacks_of_gray(self) -> Stacks | None:
        _, axis = _image_and_axis(self._shape, self._dtype)
        if len(self._shape) < 2 or not self.stacks.stack < self._shape[axis] <= _MOST:
            return None
        return Stacks.of(self._shape, self._dtype, self._shape[axis])

    def _moved_on_by_gray(self, obs: NDArray[Any], next_obs: NDArray[Any]) -> bool | None:
        """Return whether observations moved on by one gray frame; None if nothing moved."""
        if self._deeper is None or not _moved_on(self._deeper, obs, next_obs).all():
            return False
        after = self._deeper.split(next_obs)
        return bool((after[:, 1:] != after[:, :-1]).any()) or None


def same(one: NDArray[Any], other: NDArray[Any]) -> NDArray[np.bool_]:
    """Return, (n,), whether rows are equal; NaN equals nothing."""
    equal: NDArray[np.bool_] = (one == other).reshape(len(one), -1).all(axis=1)
    return equal


def _moved_on(stacks: Stacks, obs: NDArray[Any], next_obs: NDArray[Any]) -> NDArray[np.bool_]:
    return same(stacks.split(next_obs)[:, :-1], stacks.split(obs)[:, 1:])


def _image_and_axis(shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[bool, int]:
    """Return whether an observation is an image, and along which axis its frames would be stacked."""
    image = len(shape) == 3 and dtype == np.uint8
    return image, 2 if image and shape[2] < shape[0] else 0

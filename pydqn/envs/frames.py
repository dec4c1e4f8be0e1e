"""`FrameLayout`: what a frame of the replay buffer consists of, so that networks find its parts."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

BYTE_RANGE = (0.0, 255.0)  # input ranges: see `Part`
UNIT_RANGE = (0.0, 1.0)


class Part(NamedTuple):
    """One array of an observation."""

    name: str  # as in a Dict observation; "" for an observation that is one array
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    input_range: tuple[float, float]  # the values that networks map to 0 and 1; (0, 1) changes nothing
    channels: str = ""  # of images: "none" is (H, W), "first" (C, H, W) and "last" (H, W, C); of other arrays ""

    @property
    def nbytes(self) -> int:
        """Bytes in a frame."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of an image."""
        height, width = self.shape[1:] if self.channels == "first" else self.shape[:2]
        return height, width


class FrameLayout(NamedTuple):
    """The parts of a frame.

    A frame with one part is that array. Other frames are records: bytes, in which the parts follow each other as they
    are in memory, and then the action mask, one bit per action. So the replay buffer keeps everything once per frame.
    """

    parts: tuple[Part, ...]
    masked_actions: int = 0  # bits of the action mask: as many as there are actions, or 0 without masks

    @property
    def is_record(self) -> bool:
        """Whether frames are records of bytes."""
        return len(self.parts) > 1 or self.masked_actions > 0

    @property
    def frame_shape(self) -> tuple[int, ...]:
        """Shape of a frame."""
        if not self.is_record:
            return self.parts[0].shape
        return (sum(part.nbytes for part in self.parts) + -(-self.masked_actions // 8),)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of a frame."""
        return np.dtype(np.uint8) if self.is_record else self.parts[0].dtype

    def views(self, frame: NDArray[Any]) -> list[NDArray[Any]]:
        """Return the arrays of the parts, which share memory with the frame (contiguous)."""
        if not self.is_record:
            return [frame]
        views, start = [], 0
        for part in self.parts:
            views.append(frame[start : start + part.nbytes].view(part.dtype).reshape(part.shape))
            start += part.nbytes
        return views

    def write_mask(self, frame: NDArray[np.uint8], mask: NDArray[np.bool_]) -> None:
        """Write (A,) action mask into a frame. The first action is the lowest bit of the first byte."""
        packed = np.packbits(mask, bitorder="little")
        frame[len(frame) - len(packed) :] = packed

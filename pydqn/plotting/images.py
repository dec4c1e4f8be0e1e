"""Images, their captions, and the interface of the classes that write them to files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Caption(NamedTuple):
    """The step that led to an image, for display."""

    action: str  # its name
    reward: float
    total: float  # return so far
    values: tuple[float, ...]  # the action values from which it was chosen; may be empty
    quantiles: tuple[float, ...] = ()  # of the action's return, at even levels; may be empty


class Writer:
    """Writes the images of one episode to an open file."""

    def add(self, image: NDArray[np.uint8], caption: Caption | None) -> None:
        """Append an image, (H, W, 3), all of the same size."""
        raise NotImplementedError

    def close(self) -> None:
        """Complete the file after the last image."""

    def abandon(self) -> None:
        """Release resources; the file will be discarded."""


def enlarged(image: NDArray[np.uint8], scale: int) -> NDArray[np.uint8]:
    """Return the image with each pixel repeated `scale` times in both directions."""
    return image.repeat(scale, axis=0).repeat(scale, axis=1)


def require_image(image: NDArray[np.uint8]) -> None:
    """Raise a ValueError unless `image` is (H, W, 3) uint8."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"image: expected (H, W, 3) uint8, got {image.shape} {image.dtype}")


def require_one_each(action_names: Sequence[str], values: Sequence[float]) -> None:
    """Raise a ValueError unless there is one value per action."""
    if len(values) != len(action_names):
        raise ValueError(f"values: expected one for each of {len(action_names)} actions, got {len(values)}")

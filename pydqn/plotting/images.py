"""What all recordings share: images, captions and the interface of writers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Caption(NamedTuple):
    """What is known about one image; all for display."""

    action: str  # name of the action that led to the image
    reward: float
    total: float  # return so far
    values: tuple[float, ...]  # action values that the policy saw when it chose; may be empty


class Writer:
    """Writes one video to a file that is open."""

    def add(self, image: NDArray[np.uint8], caption: Caption | None) -> None: ...

    def close(self) -> None:
        """Write what comes after the last image."""

    def abandon(self) -> None:
        """Release what is open beside the file, which will not be kept."""


def enlarged(image: NDArray[np.uint8], scale: int) -> NDArray[np.uint8]:
    return image.repeat(scale, axis=0).repeat(scale, axis=1)


def require_image(image: NDArray[np.uint8]) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"image: expected (H, W, 3) uint8, got {image.shape} {image.dtype}")


def require_one_each(action_names: Sequence[str], values: Sequence[float]) -> None:
    if len(values) != len(action_names):
        raise ValueError(f"values: expected one for each of {len(action_names)} actions, got {len(values)}")

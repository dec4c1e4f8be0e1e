"""What all recordings share: images, captions and the interface of writers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Caption(NamedTuple):
    """What is known about one picture; all for display."""

    action: str  # name of the action that led to the picture
    reward: float
    total: float  # return so far
    values: tuple[float, ...]  # action values that the policy saw when it chose; may be empty


class Writer:
    """Writes one film to a file that is open."""

    def add(self, picture: NDArray[np.uint8], caption: Caption | None) -> None: ...

    def close(self) -> None:
        """Write what comes after the last picture."""

    def abandon(self) -> None:
        """Release what is open beside the file, which will not be kept."""


def enlarged(picture: NDArray[np.uint8], scale: int) -> NDArray[np.uint8]:
    return picture.repeat(scale, axis=0).repeat(scale, axis=1)


def require_image(picture: NDArray[np.uint8]) -> None:
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
        raise ValueError(f"picture: expected (H, W, 3) uint8, got {picture.shape} {picture.dtype}")


def require_one_each(action_names: Sequence[str], values: Sequence[float]) -> None:
    if len(values) != len(action_names):
        raise ValueError(f"values: expected one for each of {len(action_names)} actions, got {len(values)}")

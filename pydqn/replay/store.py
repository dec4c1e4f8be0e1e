"""Where the frames of a replay buffer are."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class FrameStore(Protocol):
    """Holds the frames that an index core (`pydqn._core.FrameReplay`) refers to.

    The core holds a cell for each frame: the frame itself, or what the store finds it by.
    """

    frame_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    cell_shape: tuple[int, ...]
    cell_dtype: np.dtype[Any]

    @property
    def lock(self) -> AbstractContextManager[Any]:
        """While it is held, no frame that the core refers to is overwritten."""

    @property
    def nbytes(self) -> int:
        """Bytes held besides the core."""

    def wait(self) -> None:
        """Let what the current thread launches from now on wait for all frames that have been appended."""

    def read(self, cells: NDArray[Any]) -> NDArray[Any]:
        """Return the (n, *frame_shape) frames of (n, *cell_shape) cells. The caller holds the lock."""

    def write(self, env_index: int, time_step: int, frames: NDArray[Any]) -> NDArray[Any]:
        """Store (n, *frame_shape) frames of one environment, from `time_step` on; return their cells."""


class FramesInCore:
    """A store in which each cell is the frame itself."""

    def __init__(self, frame_shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.frame_shape = self.cell_shape = frame_shape
        self.dtype = self.cell_dtype = dtype
        self.lock = nullcontext()  # the core copies frames under a lock of its own
        self.nbytes = 0

    def wait(self) -> None:
        """Return at once: frames are copied when they are appended."""

    def read(self, cells: NDArray[Any]) -> NDArray[Any]:
        """Return the cells."""
        return cells

    def write(self, env_index: int, time_step: int, frames: NDArray[Any]) -> NDArray[Any]:
        """Return the frames."""
        return frames

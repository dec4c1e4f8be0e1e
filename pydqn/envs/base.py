"""Environments: environments that step together, as everything above them sees them."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

BYTE_RANGE = (0.0, 255.0)  # input ranges, see `Envs`
UNIT_RANGE = (0.0, 1.0)


class Episode(NamedTuple):
    """A whole episode that has ended."""

    env_index: int
    total: float  # the true return: unclipped, undiscounted, across lives
    steps: int


class Step(NamedTuple):
    """What the environments returned, beside their frames: arrays of num_envs, as `FrameReplay.append` takes them."""

    reward: NDArray[np.float64]  # as the learner sees it (clipped, if so configured)
    terminated: NDArray[np.bool_]  # (a lost life counts, if so configured)
    truncated: NDArray[np.bool_]
    first: NDArray[np.bool_]
    episodes: list[Episode]  # episodes that ended with this step
    frames: int  # emulator frames that the steps took, over all environments


class Envs(Protocol):
    """Environments that step together. An environment whose episode ended opens the next one at the following step."""

    num_envs: int
    num_actions: int
    action_names: tuple[str, ...]
    frame_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    input_range: tuple[float, float]  # which values of frames a network maps to 0 and 1 (so 0 and 1 change nothing)
    fps: int  # steps per second at which a person would watch

    def reset(self, out: NDArray[Any], seed: int | None = None) -> None:
        """Open an episode in every environment; writes the first frames to `out`, (num_envs, *frame_shape).

        With a `seed`, all goes on as it would in environments that are made with it, however long these have been used.
        """

    def send(self, action: NDArray[np.int64]) -> None:
        """Start one step in every environment."""

    def recv(self, out: NDArray[Any]) -> Step:
        """Wait for the step that `send` started; writes the frames to `out`."""

    def image(self) -> NDArray[np.uint8]:
        """Return what a person would see of environment 0: (H, W, 3) uint8. Only when made with `render=True`."""

    def close(self) -> None:
        """Release the environments."""


class Returns:
    """Adds up the true rewards of each environment's episode."""

    def __init__(self, num_envs: int) -> None:
        self._total = np.zeros(num_envs)
        self._steps = np.zeros(num_envs, np.int64)

    def add(self, reward: NDArray[Any], first: NDArray[np.bool_], done: NDArray[np.bool_]) -> list[Episode]:
        """Take one step of every environment; returns the episodes that it ended."""
        self._total = np.where(first, 0.0, self._total + reward)
        self._steps = np.where(first, 0, self._steps + 1)
        ended = np.flatnonzero(done & ~first)
        return [
            Episode(int(env_index), float(self._total[env_index]), int(self._steps[env_index])) for env_index in ended
        ]

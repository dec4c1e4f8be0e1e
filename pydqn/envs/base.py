"""The interface of vectorised environments, which everything above this package uses."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pydqn.envs.frames import FrameLayout


class Episode(NamedTuple):
    """An episode that has ended."""

    env_index: int
    total: float  # the return: unclipped, undiscounted, over all lives
    steps: int


class Step(NamedTuple):
    """What the environments returned besides frames. Arrays are (num_envs,), as `FrameReplay.append` takes them."""

    reward: NDArray[np.float64]  # as the environments gave it; see `pydqn.envs.rewards` for what the learner gets
    terminated: NDArray[np.bool_]  # with `terminal_on_life_loss`, a lost life counts
    truncated: NDArray[np.bool_]
    first: NDArray[np.bool_]  # the frame starts an episode
    episodes: list[Episode]  # episodes that ended with this step
    frames: int  # emulator frames of this step, over all environments


class Envs(Protocol):
    """Environments that step together. After the end of an episode, the environment is reset by its next step."""

    num_envs: int
    num_actions: int
    action_names: tuple[str, ...]
    actions_described: str  # how the environments' own actions are numbered; "" where there is nothing to say
    frame_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    layout: FrameLayout  # what a frame consists of
    fps: int  # steps per second in a video
    stepping: str  # where environments step, for people; "" if there is nothing to say

    def reset(self, out: NDArray[Any], seed: int | None = None) -> None:
        """Start an episode in every environment; writes the first frames to `out`, (num_envs, *frame_shape).

        With a `seed`, used environments continue like environments that were made with that seed.
        """

    def send(self, action: NDArray[np.int64]) -> None:
        """Start one step in every environment."""

    def recv(self, out: NDArray[Any]) -> Step:
        """Wait for the step that `send` started; writes the frames to `out`."""

    def image(self) -> NDArray[np.uint8]:
        """Return the image of environment 0, (H, W, 3) uint8. The environments must be made with `render=True`."""

    def close(self) -> None:
        """Release the environments."""


class Returns:
    """Adds up the rewards of each environment's episode."""

    def __init__(self, num_envs: int) -> None:
        self._total = np.zeros(num_envs)
        self._steps = np.zeros(num_envs, np.int64)

    def add(self, reward: NDArray[Any], first: NDArray[np.bool_], done: NDArray[np.bool_]) -> list[Episode]:
        """Add one step of every environment; returns the episodes that ended with it."""
        self._total = np.where(first, 0.0, self._total + reward)
        self._steps = np.where(first, 0, self._steps + 1)
        ended = np.flatnonzero(done & ~first)
        return [
            Episode(int(env_index), float(self._total[env_index]), int(self._steps[env_index])) for env_index in ended
        ]

"""The replay buffer: every frame stored once, any number of environments, exact transitions (see `FrameReplay`)."""

from __future__ import annotations

import os
from typing import Any

from numpy.typing import ArrayLike, NDArray

from pydqn.replay.base import BaseReplay
from pydqn.replay.batch import Batch as Batch
from pydqn.replay.store import FramesInCore, FrameStore


class FrameReplay(BaseReplay):
    """A ring of single frames per environment, from which stacked n-step transitions are sampled.

    `append` takes what the environments *returned*: the newest frame, and the action, reward and flags that led to it.
    A transition can be sampled when its frame's successor exists in the same episode and neither its stack nor its
    n-step window has been overwritten or is still open. A window ends early at termination or truncation, with its
    true length. `first` alone decides stacking, `terminated` alone decides bootstrapping: a lost life may be
    `terminated` while its episode and its stack go on.

    Memory is taken from the system only as frames arrive. Safe to use from several threads: every method takes the
    buffer's own lock and copies outside the GIL. (The one exception is stated at `next_slot`.)

    Args:
        capacity: frames held over all environments; each environment gets `capacity // num_envs`. At least
            `stack + n_step` per environment, which is what one transition needs.
        frame_shape: shape of one frame: an image `(84, 84)`, a vector `(4,)`, anything of one axis or more.
        stack: frames in an observation.
        n_step: steps in a return (Sutton 1988); 1 is the ordinary DQN target.
        gamma: discount per step, in [0, 1].
        num_envs: environments; the leading axis of everything appended.
        dtype: of the frames: bool, integer or real.
        padding: what stands before an episode's first frame: "zero" or "first" (copies of it).
        seed: of the sampler's own generator.
        prioritized: whether transitions are drawn in proportion to p^alpha, p being their priorities (proportional
            prioritized replay, Schaul et al. 2016, https://arxiv.org/abs/1511.05952), one from each of B equal shares
            of the whole. A new transition gets the largest priority so far; `update_priorities` changes it.
        alpha: from 0 (uniform) to 1. May be changed at any time.
        beta: of the importance weights (N P(i))^-beta, divided by the largest of the batch; from 0 (none) to 1 (full
            compensation). May be changed at any time.
        uniform_share: the share of draws that are uniform all the same, so that no transition is forgotten, from 0 to
            1; P(i) is that of the mixture. May be changed at any time.
        max_transitions: at most so many over all environments can be sampled, the newest (each environment keeps
            `max_transitions // num_envs`); None for as many as the frames make.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    def append(
        self,
        frame: NDArray[Any],
        action: ArrayLike,
        reward: ArrayLike,
        terminated: ArrayLike,
        truncated: ArrayLike,
        first: ArrayLike,
    ) -> None:
        self._core.append(frame, action, reward, terminated, truncated, first, None, None)

    def append_to(
        self,
        env_indices: ArrayLike,
        frame: NDArray[Any],
        action: ArrayLike,
        reward: ArrayLike,
        terminated: ArrayLike,
        truncated: ArrayLike,
        first: ArrayLike,
        history: ArrayLike | None = None,
    ) -> None:
        """Store what some of the environments returned, where they do not step together.

        Args:
            env_indices: (n,) different integers.
            frame: (n, *frame_shape), and so on: see `append`, with n for num_envs.
            action: see `append`.
            reward: see `append`.
            terminated: see `append`.
            truncated: see `append`.
            first: see `append`.
            history: (n,) bool: the frame belongs to the episode, but no step led to it: its action, reward and flags
                are ignored, and no transition ends there. So an episode can be taken up in the middle: the frames
                before, the oldest as `first`, then steps.

        Raises:
            ValueError: as `append`. Nothing is stored then.
        """
        self._core.append(frame, action, reward, terminated, truncated, first, env_indices, history)

    def next_slot(self) -> NDArray[Any]:
        return self._core.next_slot()

    @classmethod
    def load(cls, path: str | os.PathLike[str], expected: dict[str, Any] | None = None) -> FrameReplay:
        """Read what `save` wrote; the loaded buffer samples the very batches that the saved one would have.

        Args:
            path: the folder.
            expected: `settings` that the buffer must have; others are refused before any memory is taken for them.

        Raises:
            ValueError: the folder holds no replay buffer, is damaged (`pydqn._util.files.Damaged`, which names the
                file), or is of another version.
            MemoryError: there is too little memory for what it holds.
        """
        return cls._load(path, expected)

    def _make_store(self) -> FrameStore:
        return FramesInCore(self.frame_shape, self.dtype)

"""The replay buffer: every frame stored once, any number of environments, exact transitions (see `FrameReplay`)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from pydqn import _core
from pydqn._util.checks import fraction, indices, integer, number_dtype
from pydqn.replay.saving import BeyondMemoryError, Stored

_MOST = 1 << 20  # environments, frames in a stack, steps in a window
_MOST_BYTES = 1 << 47  # that processors of 64 bits address


class Batch(NamedTuple):
    """B sampled transitions.

    `obs` and `next_obs` may be two views of the same memory; treat them as read-only.
    """

    obs: NDArray[Any]  # (B, stack, *frame_shape), the replay's dtype
    action: NDArray[np.int64]  # (B,)
    reward: NDArray[np.float32]  # (B,): sum of gamma^j r_j over the window, j < k
    discount: NDArray[np.float32]  # (B,): gamma^k, or 0 after termination
    next_obs: NDArray[Any]  # (B, stack, *frame_shape): k steps later
    index: NDArray[np.int64]  # type: ignore[assignment]  # (B,): names the transition; never used again for another one
    weight: NDArray[np.float32]  # (B,): importance weights, at most 1; all 1 when sampling uniformly

    def part(self, start: int, stop: int) -> Batch:
        """Return the transitions from `start` to before `stop`: views of the same memory."""
        return Batch._make(column[start:stop] for column in self)


class Windows(NamedTuple):
    """How the n-step windows of B transitions end."""

    steps: NDArray[np.int64]  # (B,): k, at most n_step
    terminated: NDArray[np.bool_]  # (B,)
    truncated: NDArray[np.bool_]  # (B,): also where the episode just stopped, without a flag, within the window


class FrameReplay(Stored):
    """A ring of single frames per environment, from which stacked n-step transitions are sampled.

    `append` takes what the environments *returned*: the newest frame, and the action, reward and flags that led to it.
    A transition can be sampled when its frame's successor exists in the same episode and neither its stack nor its
    n-step window has been overwritten or is still open. A window ends early at termination or truncation, with its
    true length. `first` alone decides stacking, `terminated` alone decides bootstrapping: a lost life may be
    `terminated` while its episode and its stack go on.

    Memory is taken from the system only as frames arrive. Safe to use from several threads: every method takes the
    memory's own lock and copies outside the GIL. (The one exception is stated at `next_slot`.)

    Args:
        capacity: frames held over all environments; each environment gets `capacity // num_envs`. At least `stack + n_step` per environment,
            which is what one transition needs.
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
        max_transitions: at most so many over all environments can be sampled, the newest (each environment keeps
            `max_transitions // num_envs`); None for as many as the frames give.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    def __init__(
        self,
        capacity: int,
        frame_shape: tuple[int, ...] = (84, 84),
        *,
        stack: int = 4,
        n_step: int = 1,
        gamma: float = 0.99,
        num_envs: int = 1,
        dtype: DTypeLike = "uint8",
        padding: str = "zero",
        seed: int = 0,
        prioritized: bool = False,
        alpha: float = 0.6,
        beta: float = 0.4,
        max_transitions: int | None = None,
    ) -> None:
        self.num_envs = integer("num_envs", num_envs, 1, _MOST)
        self.capacity = integer("capacity", capacity, self.num_envs)
        if not isinstance(frame_shape, (tuple, list)) or not frame_shape:
            raise ValueError(f"frame_shape: expected a tuple of at least one positive integer, got {frame_shape!r}")
        self.frame_shape = tuple(integer("frame_shape", axis, 1) for axis in frame_shape)
        self.stack = integer("stack", stack, 1, _MOST)
        self.n_step = integer("n_step", n_step, 1, _MOST)
        least = self.num_envs * (self.stack + self.n_step)
        if self.capacity < least:
            raise ValueError(
                f"capacity: expected at least num_envs * (stack + n_step) = {least} frames, so that each environment "
                f"can hold a transition, got {self.capacity}"
            )
        self.gamma = fraction("gamma", gamma)
        if not isinstance(prioritized, (bool, np.bool_)):
            raise ValueError(f"prioritized: expected True or False, got {prioritized!r}")
        self.prioritized = bool(prioritized)
        self._alpha = fraction("alpha", alpha)
        self.beta = beta
        self.dtype = number_dtype("dtype", dtype)
        if padding not in ("zero", "first"):
            raise ValueError(f"padding: expected 'zero' or 'first', got {padding!r}")
        self.padding = padding
        self.max_transitions = max_transitions
        if max_transitions is not None:
            self.max_transitions = integer("max_transitions", max_transitions, self.num_envs)
        frames = (self.capacity + self.num_envs) * math.prod(self.frame_shape) * self.dtype.itemsize
        if frames > _MOST_BYTES:
            raise BeyondMemoryError(f"capacity: {self.capacity} frames of {self.frame_shape} {self.dtype} are too many")
        try:
            cell_shape, cell_dtype = self._cell()
            self._core = _core.FrameReplay(
                capacity=self.capacity,
                frame_shape=cell_shape,
                stack=self.stack,
                n_step=self.n_step,
                gamma=self.gamma,
                num_envs=self.num_envs,
                dtype=cell_dtype,
                pad_with_first=padding == "first",
                alpha=self._alpha if prioritized else None,
                limit=min(self.max_transitions or 0, self.capacity),
                seed=integer("seed", seed, 0) % (1 << 64),
            )
        except MemoryError:
            raise MemoryError(
                f"capacity: {self.capacity} frames of {self.frame_shape} {self.dtype} do not fit in the address space"
            ) from None
        super().__init__()

    def __len__(self) -> int:
        """Return how many transitions can be sampled now."""
        return len(self._core)

    @property
    def nbytes(self) -> int:
        """Bytes held when full (address space now; memory as frames arrive)."""
        return self._core.nbytes

    @property
    def alpha(self) -> float:
        """Exponent of the priorities, from 0 to 1.

        Setting it changes the exponent of those that are held, too, in one pass over the memory; but not away from 0,
        which has made them all 1: transitions keep that until their priority is updated. A pass takes tens of ms for a
        million transitions (measured on Zen 3), and every other method waits for it: change alpha every few thousand
        updates, not at each.
        """
        return self._alpha

    @alpha.setter
    def alpha(self, value: float) -> None:
        self._alpha = fraction("alpha", value)
        self._core.set_alpha(self._alpha)

    @property
    def largest_priority(self) -> float:
        """Largest so far."""
        return float(self._core.largest_priority ** (1 / (self._alpha or 1)))

    @property
    def beta(self) -> float:
        """How far importance weights undo the bias of prioritized sampling, from 0 to 1."""
        return self._beta

    @beta.setter
    def beta(self, value: float) -> None:
        self._beta = fraction("beta", value)

    def append(
        self,
        frame: NDArray[Any],
        action: ArrayLike,
        reward: ArrayLike,
        terminated: ArrayLike,
        truncated: ArrayLike,
        first: ArrayLike,
    ) -> None:
        """Store what every environment's environment returned.

        Args:
            frame: (num_envs, *frame_shape), the replay's dtype: the newest frame only. When it is the array that
                `next_slot` gave, nothing is copied.
            action: (num_envs,) integers: the actions that led to the frames.
            reward: (num_envs,) finite real numbers: what they earned, rounded to float32.
            terminated: (num_envs,) bool: no value lies beyond this frame.
            truncated: (num_envs,) bool: the episode was cut off here; value goes on.
            first: (num_envs,) bool: the frame opens an episode; the environment's action, reward and flags are ignored.

        Raises:
            ValueError: an argument has the wrong shape, dtype or range. Nothing is stored then.
        """
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
        """Store what some environments' environments returned, where they do not step together.

        Args:
            env_indices: (n,) different integers.
            frame: (n, *frame_shape), and so on: see `append`, with n for num_envs.
            action: see `append`.
            reward: see `append`.
            terminated: see `append`.
            truncated: see `append`.
            first: see `append`.
            history: (n,) bool: the frame goes on with the episode, but no step led to it: its action, reward and flags
                are ignored, and no transition ends there. So an episode can be taken up in the middle: the frames
                before, the oldest as `first`, then steps.

        Raises:
            ValueError: as `append`. Nothing is stored then.
        """
        self._core.append(frame, action, reward, terminated, truncated, first, env_indices, history)

    def next_slot(self) -> NDArray[Any]:
        """Return the memory of the next frames, (num_envs, *frame_shape), to be written and then appended.

        Lets a preprocessing kernel write into the ring itself. The view is good until the next `append`; write to it
        from one thread only. Other threads may sample meanwhile.

        Raises:
            RuntimeError: `append_to` has left the environments with different numbers of frames.
        """
        return self._core.next_slot()

    def empty_batch(self, batch_size: int, *, apart: bool = False) -> Batch:
        """Allocate a batch that `sample` can fill again and again (its `out`).

        Args:
            batch_size: B.
            apart: whether `obs` and `next_obs` are contiguous arrays of their own, so that whoever gets them may write
                to them. To fill them takes longer, by a fifth to a third.
        """
        size = integer("batch_size", batch_size, 1)
        shape, dtype = self._cell()
        if apart:
            # In one block, which goes on to be reused: two of them may be unmapped, and mapped anew, each time.
            obs, next_obs = np.empty((2, size, self.stack, *shape), dtype)
        else:
            # One-step observations overlap in all but one frame: one block holds both. Longer windows may end early.
            depth = self.stack + 1 if self.n_step == 1 else 2 * self.stack
            block = np.empty((size, depth, *shape), dtype)
            obs, next_obs = block[:, : self.stack], block[:, depth - self.stack :]
        return Batch(
            obs=obs,
            action=np.empty(size, np.int64),
            reward=np.empty(size, np.float32),
            discount=np.empty(size, np.float32),
            next_obs=next_obs,
            index=np.empty(size, np.int64),
            weight=np.empty(size, np.float32),
        )

    def sample(self, batch_size: int, out: Batch | None = None) -> Batch:
        """Draw transitions, with replacement, from exactly those that are valid now.

        Args:
            batch_size: B.
            out: a batch from `empty_batch(batch_size)` to fill instead of a new one.

        Raises:
            ValueError: `batch_size` is not positive, or `out` does not fit it.
            RuntimeError: nothing can be sampled yet (`len(replay) == 0`).
        """
        batch = self.empty_batch(batch_size) if out is None else _checked(out)
        self._core.sample(integer("batch_size", batch_size, 1), self._beta, *_columns(batch))
        return batch

    def update_priorities(self, index: ArrayLike, priority: ArrayLike) -> None:
        """Set the priorities of sampled transitions, once their TD errors are known.

        Args:
            index: (B,) as in `Batch.index`. Transitions that have been overwritten meanwhile are passed over.
            priority: (B,) positive: |TD error| plus something small, not yet to the power of alpha.

        Raises:
            ValueError: a priority is not positive or not finite, or an index names nothing that ever was.
            RuntimeError: the memory was not made with `prioritized=True`.
        """
        values = np.asarray(priority)
        if values.dtype.kind not in "iuf":
            raise ValueError(f"priority: expected real numbers, got {priority!r}")
        self._core.update_priorities(indices(index), values.astype(np.float64))

    def gather(self, index: ArrayLike, out: Batch | None = None) -> Batch:
        """Return the named transitions, as `sample` would (`index` as in `Batch.index` or `valid_indices`).

        Raises:
            ValueError: an index names no transition that is held now, or `out` does not fit.
        """
        wanted = indices(index)
        if not wanted.size:
            raise ValueError(f"index: expected a list of at least one integer, got {index!r}")
        batch = self.empty_batch(wanted.size) if out is None else _checked(out)
        self._core.gather(wanted, *_columns(batch))
        return batch

    @property
    def env_time_steps(self) -> list[int]:
        """How many frames each environment has got so far. The newest has the index (time steps - 1) * num_envs + environment."""
        return self._core.env_time_steps

    def windows(self, index: ArrayLike) -> Windows:
        """Return how the named transitions end, which `Batch.discount` tells only together with their length.

        Raises:
            ValueError: an index names no transition that is held now.
        """
        return Windows(*self._core.windows(indices(index)))

    def valid_indices(self) -> NDArray[np.int64]:
        """Return the indices of all transitions that can be sampled now, oldest first."""
        return self._core.valid_indices()

    def latest(self, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Return (num_envs, stack, *frame_shape): what a policy sees now, stacked as sampled observations are."""
        shape, dtype = self._cell()
        out = np.empty((self.num_envs, self.stack, *shape), dtype) if out is None else out
        self._core.latest(out)
        return out

    def _cell(self) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Shape and dtype of what the core holds of a frame."""
        return self.frame_shape, self.dtype


def _checked(out: Batch) -> Batch:
    if not isinstance(out, Batch) or not all(isinstance(column, np.ndarray) for column in out):
        raise ValueError(f"out: expected a batch of arrays, as empty_batch gives it, got {type(out).__name__}")
    return out


def _columns(batch: Batch) -> tuple[NDArray[Any], ...]:
    """The batch's arrays in the core's order."""
    return (batch.obs, batch.next_obs, batch.action, batch.reward, batch.discount, batch.index, batch.weight)

"""A replay buffer for trainers that hand over whole transitions, stacks and all (see `TransitionReplay`)."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from pydqn._util.checks import converted, indices, integer, number_dtype
from pydqn.replay.frames import Batch, FrameReplay, Windows

_SMALL = 1024  # bytes of a frame up to which memory for the worst case is cheap
_SPARE = 32  # one frame in so many is set aside for the ends of episodes
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


class TransitionReplay:
    """A `FrameReplay` behind `add(obs, next_obs, action, reward, terminated, truncated)`.

    It finds the newest frame in the stacks and stores each frame once. An observation that is not what the environment's last
    step led to begins an episode, whether or not anyone said that the one before ended. What `sample` returns equals
    what was added, bit for bit: frames that stand before an episode in its first stacks, and that are neither zeros nor
    copies of the first frame, are stored, too.

    Args:
        capacity: transitions over all environments; each environment keeps its newest `capacity // num_envs`. (Episodes take a frame
            more than they have transitions. That is reckoned with up to one in 32 for frames of more than 1 KB; where
            episodes are shorter than that, images make some transitions fewer.)
        shape: of one observation.
        dtype: of observations. Others are taken where every value stays as it is, as integers within range do.
        num_envs: environments.
        stack: frames in an observation; None to tell by its shape (see `Stacks.of`), and to take it for one frame after
            all when the first step does not move it on by one.
        padding: "zero" or "first": what mostly stands before an episode; None to tell by the first observation.
        settings: all others of `FrameReplay`: n_step, gamma, prioritized, alpha, beta, seed.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    frame_replay: FrameReplay
    """Where the frames are. Its indices are those of `add`, `sample` and `gather`."""

    def __init__(
        self,
        max_transitions: int,
        obs_shape: tuple[int, ...],
        dtype: DTypeLike = "uint8",
        *,
        num_envs: int = 1,
        stack: int | None = None,
        padding: str | None = None,
        **settings: Any,
    ) -> None:
        self.num_envs = integer("num_envs", num_envs, 1)
        self.max_transitions = integer("max_transitions", max_transitions, self.num_envs)
        self.obs_shape = tuple(obs_shape)
        self._dtype = number_dtype("dtype", dtype)
        self._settings = settings
        self._begun = np.zeros(self.num_envs, bool)
        self._all = np.arange(self.num_envs)
        self._padding = padding  # None: not known yet
        self._stack_is_sure = stack is not None
        self.stacks = Stacks.of(self.obs_shape, self._dtype, stack)
        self._hidden = None if self._stack_is_sure else _hidden(self.obs_shape, self._dtype, self.stacks)
        self._shifts = 0  # steps that moved on by one frame of such a stack
        self.frame_replay = self._make_frame_replay()
        self._last = np.zeros((self.num_envs, *self.obs_shape), self._dtype)  # observations that steps have led to
        # Refuses what the memory would: before the first frames of an episode push older ones out of that.
        self._trial = FrameReplay(2 * self.num_envs, (1,), stack=1, num_envs=self.num_envs, dtype="bool")
        nothing = np.zeros(self.num_envs, np.int64)
        self._trial.append(nothing[:, None] > 0, nothing, nothing, nothing > 0, nothing > 0, nothing == 0)

    def _make_frame_replay(self) -> FrameReplay:
        per_lane = self.max_transitions // self.num_envs
        small = math.prod(self.stacks.frame_shape) * self._dtype.itemsize <= _SMALL
        spare = per_lane if small else max(per_lane // _SPARE, 16)
        per_lane += spare + self.stacks.stack + int(self._settings.get("n_step", 1))
        return FrameReplay(
            per_lane * self.num_envs,
            self.stacks.frame_shape,
            dtype=self._dtype,
            num_envs=self.num_envs,
            stack=self.stacks.stack,
            max_transitions=self.max_transitions,
            padding=self._padding or "zero",
            **self._settings,
        )

    def __len__(self) -> int:
        """Return how many transitions can be sampled now."""
        return len(self.frame_replay)

    @property
    def nbytes(self) -> int:
        """Bytes held when full."""
        return self.frame_replay.nbytes

    def append(
        self,
        obs: ArrayLike,
        next_obs: ArrayLike,
        action: ArrayLike,
        reward: ArrayLike,
        terminated: ArrayLike,
        truncated: ArrayLike,
        env_indices: ArrayLike | None = None,
    ) -> NDArray[np.int64]:
        """Store one transition of each environment.

        Args:
            obs: (n, *shape): what the action was chosen for. Of the buffer's dtype, or one whose values that can hold.
            next_obs: (n, *shape): what it led to; at the end of an episode the last of that, not the first of the next.
            action: (n,) integers.
            reward: (n,) finite real numbers, which are rounded to float32.
            terminated: (n,) bool: no value lies beyond `next_obs`.
            truncated: (n,) bool: the episode was cut off there.
            env_indices: (n,) different integers; None for all environments, in order.

        Returns:
            (n,) int64: the transitions' indices, under which they can be gathered while they are held.

        Raises:
            ValueError: an argument has the wrong shape, dtype or range, a value of an observation would change, or
                `next_obs` is not `obs` moved on by a frame. No transition is stored then.
        """
        chosen = self._all if env_indices is None else self._lanes(env_indices)
        obs, next_obs = (
            self._observations("obs", obs, len(chosen)),
            self._observations("next_obs", next_obs, len(chosen)),
        )
        moved = self.moved_on(obs, next_obs)
        frames = self.stacks.split(next_obs)
        if not moved.all():
            gray = self._hidden is not None and self._moved_on_by_gray(obs, next_obs)
            more = f"stack={self._hidden.stack} for gray frames, or " if gray and self._hidden is not None else ""
            raise ValueError(
                f"next_obs: expected obs moved on by one frame ({self.stacks.stack} frames along axis "
                f"{self.stacks.axis}), got something else in environment {chosen[~moved][0]}; pass {more}stack=1 for "
                "observations that are no stacks of successive frames"
            )
        if self._hidden is not None:
            self._look_for_stacks(self._hidden, obs, next_obs)
        fresh = ~(self._begun[chosen] & _same(obs, self._last if env_indices is None else self._last[chosen]))
        columns = (np.asarray(action), np.asarray(reward), np.asarray(terminated), np.asarray(truncated))
        no = np.zeros(len(chosen), bool)
        newest = frames[:, -1]
        if fresh.any():
            self._trial.append_to(chosen, np.zeros((len(chosen), 1), bool), *columns, no)
            starts = self.stacks.split(obs)
            for row in np.flatnonzero(fresh):
                self._begin(int(chosen[row]), starts[row])
        if env_indices is None:
            self.frame_replay.append(newest, *columns, no)
        else:
            self.frame_replay.append_to(chosen, newest, *columns, no)
        self._last[chosen] = next_obs
        self._begun[chosen] = True
        index: NDArray[np.int64] = (np.array(self.frame_replay.env_time_steps)[chosen] - 2) * self.num_envs + chosen
        return index

    def moved_on(self, obs: NDArray[Any], next_obs: NDArray[Any]) -> NDArray[np.bool_]:
        """Return, (n,), whether each of the next observations is the one before moved on by a frame.

        The first call settles whether they are stacks at all, where nobody has told.
        """
        if self.stacks.stack == 1:
            return np.ones(len(obs), bool)
        moved = _same(self.stacks.split(next_obs)[:, :-1], self.stacks.split(obs)[:, 1:])
        if not self._stack_is_sure and (not moved.any() or self._moved_on_by_gray(obs, next_obs)):
            self.stacks = Stacks.of(self.obs_shape, self._dtype, 1)
            self.clear()
            moved = np.ones(len(obs), bool)
        self._stack_is_sure = True
        return moved

    def follows(self, obs: NDArray[Any]) -> NDArray[np.bool_]:
        """Return, (num_envs,), whether each environment's observation is what its last step led to."""
        return self._begun & _same(obs, self._last)

    def sample(self, batch_size: int, *, apart: bool = False) -> Batch:
        """Draw transitions, observations in the shape in which they were added (see `FrameReplay.sample`).

        Args:
            batch_size: B.
            apart: whether `obs` and `next_obs` share no memory (see `FrameReplay.empty_batch`).
        """
        out = self.frame_replay.empty_batch(batch_size, apart=True) if apart else None
        return self._joined(self.frame_replay.sample(batch_size, out))

    def gather(self, index: ArrayLike, *, apart: bool = False) -> Batch:
        """Return the named transitions (see `FrameReplay.gather`; `apart` as of `sample`)."""
        wanted = indices(index)
        out = self.frame_replay.empty_batch(len(wanted), apart=True) if apart and len(wanted) else None
        return self._joined(self.frame_replay.gather(wanted, out))

    def windows(self, index: ArrayLike) -> Windows:
        """See `FrameReplay.windows`."""
        return self.frame_replay.windows(index)

    def update_priorities(self, index: ArrayLike, priority: ArrayLike) -> None:
        """See `FrameReplay.update_priorities`."""
        self.frame_replay.update_priorities(index, priority)

    def clear(self) -> None:
        """Forget all transitions. The generator goes on."""
        before = self.frame_replay
        self.frame_replay = self._make_frame_replay()
        self.frame_replay.alpha, self.frame_replay.beta = before.alpha, before.beta
        self.frame_replay._core.generator_state = before._core.generator_state
        self._begun[:] = False

    def save(self, path: str | os.PathLike[str], progress: Callable[[float], None] | None = None) -> None:
        """Write everything to a folder, for `restore` (see `FrameReplay.save`)."""
        self.frame_replay.save(path, progress)

    def restore(self, path: str | os.PathLike[str]) -> None:
        """Take over what `save` wrote, in place of all that is held.

        What is sampled then is what the saved buffer would have sampled: alpha and beta, which may be changed at any
        time, are those that were saved. Episodes that were going on end there: environments are not saved.

        Args:
            path: the folder.

        Raises:
            ValueError: the folder holds no replay buffer, is damaged, or was written by a buffer that was made with
                other arguments; the message names them. What was held is still held then.
        """
        before = self.frame_replay
        names = ["num_envs", "n_step", "gamma", "prioritized", "max_transitions", "dtype"]
        names += ["stack", "frame_shape"] if self._stack_is_sure else []
        found = FrameReplay.load(path, {name: before.settings[name] for name in names})
        stacks = Stacks.of(self.obs_shape, self._dtype, found.stack)
        if stacks.frame_shape != found.frame_shape:
            raise ValueError(
                f"{path}: the replay buffer has stacks of {found.stack} frames of shape {found.frame_shape}, which "
                f"observations of shape {self.obs_shape} are not"
            )
        self.frame_replay, self.stacks, self._padding = found, stacks, found.padding
        self._stack_is_sure, self._hidden = True, None
        self._begun[:] = False

    def _lanes(self, env_indices: ArrayLike) -> NDArray[np.int64]:
        chosen = np.asarray(env_indices)
        if chosen.size:
            good = chosen.ndim == 1 and chosen.dtype.kind in "iu"
            if not good or not 0 <= chosen.min() <= chosen.max() < self.num_envs:
                raise ValueError(
                    f"env_indices: expected different integers from 0 to {self.num_envs - 1}, got {env_indices!r}"
                )
        return indices(chosen)

    def _observations(self, name: str, value: ArrayLike, count: int) -> NDArray[Any]:
        array = np.asarray(value)
        if array.shape != (count, *self.obs_shape):
            raise ValueError(f"{name}: expected shape {(count, *self.obs_shape)}, got shape {array.shape}")
        return converted(name, array, self._dtype)

    def _moved_on_by_gray(self, obs: NDArray[Any], next_obs: NDArray[Any]) -> bool | None:
        """Return whether observations moved on by one frame of larger stacks than is assumed; None if nothing moved."""
        if self._hidden is None:
            return False
        before, after = self._hidden.split(obs), self._hidden.split(next_obs)
        if not _same(after[:, :-1], before[:, 1:]).all():
            return False
        return bool((after[:, 1:] != after[:, :-1]).any()) or None

    def _look_for_stacks(self, hidden: Stacks, obs: NDArray[Any], next_obs: NDArray[Any]) -> None:
        """Warn if observations that are stored whole turn out to be stacks after all."""
        moved = self._moved_on_by_gray(obs, next_obs)
        if moved is False:
            self._hidden = None
        elif moved:
            self._shifts += 1  # once is not enough: a black image in colour may get one colour before the others
        if self._shifts >= hidden.stack:
            self._hidden = None
            warnings.warn(
                f"observations of shape {self.obs_shape} look like stacks of {hidden.stack} frames, but each is stored as "
                f"{self.stacks.stack}; pass stack={hidden.stack} to store each frame once, which takes about "
                f"1/{hidden.stack // self.stacks.stack} of the memory (or stack={self.stacks.stack} to keep it so)",
                stacklevel=3,
            )

    def _begin(self, env_index: int, frames: NDArray[Any]) -> None:
        """Open an episode with a stack of frames."""
        self._begun[env_index] = False  # until a step follows: what comes next may be refused
        if self._padding is None and len(frames) > 1:
            self._padding = "first" if frames.any() and (frames == frames[0]).all() else "zero"
            self.clear()
        start = len(frames) - 1
        if self.frame_replay.padding == "zero":
            start = next((number for number in range(start) if frames[number].any()), start)
        else:
            start = next((number for number in range(start) if (frames[number + 1] != frames[0]).any()), start)
        nothing, no = np.zeros(1, np.int64), np.zeros(1, bool)
        for number in range(start, len(frames)):
            opens = np.array([number == start])
            self.frame_replay.append_to(
                [env_index], frames[number][None], nothing, nothing, no, no, opens, history=~opens
            )

    def _joined(self, batch: Batch) -> Batch:
        join, shape = self.stacks.join, self.obs_shape
        return batch._replace(obs=join(batch.obs, shape), next_obs=join(batch.next_obs, shape))


def _same(one: NDArray[Any], other: NDArray[Any]) -> NDArray[np.bool_]:
    """Return, (n,), whether rows are equal; NaN equals nothing."""
    equal: NDArray[np.bool_] = (one == other).reshape(len(one), -1).all(axis=1)
    return equal


def _image_and_axis(shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[bool, int]:
    """Return whether an observation is an image, and along which axis its frames would be stacked."""
    image = len(shape) == 3 and dtype == np.uint8
    return image, 2 if image and shape[2] < shape[0] else 0


def _hidden(shape: tuple[int, ...], dtype: np.dtype[Any], stacks: Stacks) -> Stacks | None:
    """Return how observations might be stacks of more frames than is assumed: 3 gray images look like one in colour."""
    _, axis = _image_and_axis(shape, dtype)
    if len(shape) < 2 or not stacks.stack < shape[axis] <= _MOST:
        return None
    return Stacks.of(shape, dtype, shape[axis])

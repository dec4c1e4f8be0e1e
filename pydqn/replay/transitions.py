"""A replay buffer for trainers that hand over whole transitions, stacks and all (see `TransitionReplay`)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from pydqn._util.checks import converted, indices, integer, number_dtype
from pydqn.replay.batch import Batch, Windows
from pydqn.replay.frames import FrameReplay
from pydqn.replay.stacks import StackFinder, Stacks, same

_SMALL = 1024  # bytes of a frame up to which memory for the worst case is cheap
_SPARE = 32  # one frame in so many is set aside for the ends of episodes


class TransitionReplay:
    """A `FrameReplay` behind `append(obs, next_obs, action, reward, terminated, truncated)`.

    It finds the newest frame in the stacks and stores each frame once. An observation that is not what the
    environment's last step led to starts an episode, whether or not the one before was said to have ended. What
    `sample` returns equals what was appended, bit for bit: frames that stand before an episode in its first stacks,
    and that are neither zeros nor copies of the first frame, are stored, too.

    Args:
        max_transitions: transitions over all environments; each environment keeps its newest
            `max_transitions // num_envs`. (Episodes take a frame more than they have transitions. Up to one frame in 32
            is set aside for that where frames are of more than 1 KB; where episodes of such frames are shorter, some
            transitions fewer are kept.)
        obs_shape: of one observation.
        dtype: of observations. Others are taken where every value stays as it is, as integers within range do.
        num_envs: environments.
        stack: frames in an observation; None to tell by its shape (see `pydqn.replay.stacks.Stacks.of`), and to take
            it for one frame after all if the first step does not move it on by one.
        padding: "zero" or "first": what mostly stands before an episode; None to tell by the first observation.
        settings: all others of `FrameReplay`: n_step, gamma, prioritized, alpha, beta, uniform_share, seed.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    frame_replay: FrameReplay
    """The buffer of the frames. Its indices are those of `append`, `sample` and `gather`."""

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
        self._begun = np.zeros(self.num_envs, bool)
        self._all = np.arange(self.num_envs)
        self._padding = padding  # None: not known yet
        self._finder = StackFinder(self.obs_shape, self._dtype, stack)
        self.frame_replay = self._make_frame_replay(settings)
        self._settings = settings
        self._last = np.zeros((self.num_envs, *self.obs_shape), self._dtype)  # observations that steps have led to
        # Refuses what `frame_replay` would: before the first frames of an episode push older ones out of that.
        self._trial = FrameReplay(2 * self.num_envs, (1,), stack=1, num_envs=self.num_envs, dtype="bool")
        nothing = np.zeros(self.num_envs, np.int64)
        self._trial.append(nothing[:, None] > 0, nothing, nothing, nothing > 0, nothing > 0, nothing == 0)

    def _make_frame_replay(self, settings: dict[str, Any]) -> FrameReplay:
        each = self.max_transitions // self.num_envs
        small = math.prod(self.stacks.frame_shape) * self._dtype.itemsize <= _SMALL
        spare = each if small else max(each // _SPARE, 16)
        each += spare + self.stacks.stack + int(settings.get("n_step", 1))
        return FrameReplay(
            each * self.num_envs,
            self.stacks.frame_shape,
            dtype=self._dtype,
            num_envs=self.num_envs,
            stack=self.stacks.stack,
            max_transitions=self.max_transitions,
            padding=self._padding or "zero",
            **settings,
        )

    def _begin_anew(self) -> None:
        """Make the buffer of the frames again: how they are stacked, or padded, has turned out. It is empty still."""
        now = {name: getattr(self.frame_replay, name) for name in ("alpha", "beta", "uniform_share")}
        self.frame_replay = self._make_frame_replay({**self._settings, **now})
        self._begun[:] = False

    def __len__(self) -> int:
        """Return how many transitions can be sampled now."""
        return len(self.frame_replay)

    @property
    def nbytes(self) -> int:
        """Bytes held when full."""
        return self.frame_replay.nbytes

    @property
    def stacks(self) -> Stacks:
        """How observations are made of frames."""
        return self._finder.stacks

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
            obs: (n, *obs_shape): what the action was chosen for. Of the buffer's dtype, or of one whose values fit it.
            next_obs: (n, *obs_shape): what it led to; at the end of an episode the last observation of that, not the
                first of the next.
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
        chosen = self._all if env_indices is None else self._chosen(env_indices)
        obs = self._observations("obs", obs, len(chosen))
        next_obs = self._observations("next_obs", next_obs, len(chosen))
        moved = self.moved_on(obs, next_obs)
        if not moved.all():
            raise ValueError(
                f"next_obs: expected obs moved on by one frame ({self.stacks.stack} frames along axis "
                f"{self.stacks.axis}), got something else in environment {chosen[~moved][0]}; pass "
                f"{self._finder.advice(obs, next_obs)}stack=1 for observations that are no stacks of successive frames"
            )
        self._finder.look_for_gray(obs, next_obs)
        newest = self.stacks.split(next_obs)[:, -1]
        fresh = ~(self._begun[chosen] & same(obs, self._last if env_indices is None else self._last[chosen]))
        columns = (np.asarray(action), np.asarray(reward), np.asarray(terminated), np.asarray(truncated))
        no = np.zeros(len(chosen), bool)
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
        """Return, (n,), whether each of the next observations is the one before moved on by one frame.

        The first call settles whether observations are stacks at all, unless `stack` was given.
        """
        before = self.stacks
        moved = self._finder.moved_on(obs, next_obs)
        if self.stacks != before:
            self._begin_anew()
        return moved

    def follows(self, obs: NDArray[Any]) -> NDArray[np.bool_]:
        """Return, (num_envs,), whether each environment's observation is what its last step led to."""
        return self._begun & same(obs, self._last)

    def sample(self, batch_size: int, *, apart: bool = False) -> Batch:
        """Draw transitions, observations in the shape in which they were appended (see `FrameReplay.sample`).

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
        """Forget all transitions. The random generator, alpha, beta and uniform_share stay as they are."""
        self.frame_replay.clear()
        self._begun[:] = False

    def save(self, path: str | os.PathLike[str], progress: Callable[[float], None] | None = None) -> None:
        """Write everything to a folder, for `restore` and `load` (see `FrameReplay.save`)."""
        self.frame_replay.save(path, progress)

    def restore(self, path: str | os.PathLike[str]) -> None:
        """Take over what `save` wrote, in place of all that is held.

        What is sampled then is what the saved buffer would have sampled: alpha, beta and uniform_share, which may be
        changed at any time, are those that were saved. Episodes that were going on end there: environments are not
        saved.

        Args:
            path: the folder.

        Raises:
            ValueError: the folder holds no replay buffer, is damaged, or was written by a buffer that was made with
                other arguments; the message names them. What was held is still held then.
        """
        names = ["num_envs", "n_step", "gamma", "prioritized", "max_transitions", "dtype"]
        names += ["stack", "frame_shape"] if self._finder.sure else []
        settings = self.frame_replay.settings
        self._take(path, FrameReplay.load(path, {name: settings[name] for name in names}))

    @classmethod
    def load(cls, path: str | os.PathLike[str], obs_shape: tuple[int, ...]) -> TransitionReplay:
        """Make a buffer from what `save` wrote (see `restore`).

        Args:
            path: the folder.
            obs_shape: of one observation.

        Raises:
            ValueError: the folder holds no replay buffer, is damaged, or does not hold such observations.
        """
        found = FrameReplay.load(path)
        names = ("num_envs", "n_step", "gamma", "prioritized", "alpha", "beta", "uniform_share")
        settings = {name: getattr(found, name) for name in names}
        most = found.capacity if found.max_transitions is None else found.max_transitions
        replay = cls(most, obs_shape, found.dtype, **settings)
        replay._take(path, found)
        return replay

    def _take(self, path: str | os.PathLike[str], found: FrameReplay) -> None:
        finder = StackFinder(self.obs_shape, self._dtype, found.stack)
        if finder.stacks.frame_shape != found.frame_shape:
            raise ValueError(
                f"{path}: the replay buffer has stacks of {found.stack} frames of shape {found.frame_shape}, which "
                f"observations of shape {self.obs_shape} are not"
            )
        self.frame_replay, self._finder, self._padding = found, finder, found.padding
        self._begun[:] = False

    def _chosen(self, env_indices: ArrayLike) -> NDArray[np.int64]:
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

    def _begin(self, env_index: int, frames: NDArray[Any]) -> None:
        """Start an episode with a stack of frames."""
        self._begun[env_index] = False  # until a step follows: what comes next may be refused
        if self._padding is None and len(frames) > 1:
            self._padding = "first" if frames.any() and (frames == frames[0]).all() else "zero"
            self._begin_anew()
        start = len(frames) - 1
        if self.frame_replay.padding == "zero":
            start = next((number for number in range(start) if frames[number].any()), start)
        else:
            start = next((number for number in range(start) if (frames[number + 1] != frames[0]).any()), start)
        nothing, no = np.zeros(1, np.int64), np.zeros(1, bool)
        for number in range(start, len(frames)):
            first = np.array([number == start])
            self.frame_replay.append_to(
                [env_index], frames[number][None], nothing, nothing, no, no, first, history=~first
            )

    def _joined(self, batch: Batch) -> Batch:
        join, shape = self.stacks.join, self.obs_shape
        return batch._replace(obs=join(batch.obs, shape), next_obs=join(batch.next_obs, shape))

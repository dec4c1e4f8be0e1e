"""What replay buffers have in common, wherever their frames are (see `BaseReplay`)."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from pydqn import _core
from pydqn._util.checks import fraction, indices, integer, number_dtype
from pydqn.replay.batch import Batch, Windows
from pydqn.replay.saving import SETTINGS, BeyondMemoryError, Contents, SavedReplay, chunk_writer
from pydqn.replay.store import FrameStore

Kind = TypeVar("Kind", bound="BaseReplay")

_MOST = 1 << 20  # environments, frames in a stack, steps in a window
_MOST_BYTES = 1 << 47  # that processors of 64 bits address


class BaseReplay(ABC):
    """A replay buffer of single frames: an index core in C++, and a frame store.

    The core decides which transitions are valid, stacks cells, draws samples and keeps priorities. Its cells are the
    frames themselves (`pydqn.FrameReplay`) or numbers of rows (`pydqn.DeviceReplay`). Arguments: see `FrameReplay`.
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
        uniform_share: float = 0.0,
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
        self.uniform_share = uniform_share
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
        seed = integer("seed", seed, 0) % (1 << 64)
        self._store = self._make_store()
        self._core = self._make_core(seed)
        self._saver = chunk_writer(self.num_envs, self._store)

    @abstractmethod
    def _make_store(self) -> FrameStore:
        """Return a store for the frames, once the settings have been checked."""

    def _make_core(self, seed: int = 0) -> _core.FrameReplay:
        """Return an empty index core."""
        try:
            return _core.FrameReplay(
                capacity=self.capacity,
                frame_shape=self._store.cell_shape,
                stack=self.stack,
                n_step=self.n_step,
                gamma=self.gamma,
                num_envs=self.num_envs,
                dtype=self._store.cell_dtype,
                pad_with_first=self.padding == "first",
                alpha=self._alpha if self.prioritized else None,
                limit=min(self.max_transitions or 0, self.capacity),
                seed=seed,
            )
        except MemoryError:
            raise MemoryError(
                f"capacity: {self.capacity} frames of {self.frame_shape} {self.dtype} do not fit in the address space"
            ) from None

    def __len__(self) -> int:
        """Return how many transitions can be sampled now."""
        return len(self._core)

    @property
    def nbytes(self) -> int:
        """Bytes held when full (address space now; memory as frames arrive), frames on a device included."""
        return self._core.nbytes + self._store.nbytes

    @property
    def settings(self) -> dict[str, Any]:
        """What the buffer was made with, and alpha, as JSON can hold it."""
        others = {name: getattr(self, name) for name in SETTINGS}
        return {**others, "frame_shape": list(self.frame_shape), "dtype": self.dtype.name}

    @property
    def alpha(self) -> float:
        """Exponent of the priorities, from 0 to 1.

        Setting it changes the exponent of the priorities that are held, too, in one pass over them; but not away from
        0, which has made them all 1: transitions keep that until their priority is updated. A pass takes tens of ms for
        a million transitions (measured on Zen 3), and every other method waits for it: change alpha every few thousand
        updates, not at each.
        """
        return self._alpha

    @alpha.setter
    def alpha(self, value: float) -> None:
        self._alpha = fraction("alpha", value)
        self._core.set_alpha(self._alpha)

    @property
    def beta(self) -> float:
        """How far importance weights undo the bias of prioritized sampling, from 0 to 1."""
        return self._beta

    @beta.setter
    def beta(self, value: float) -> None:
        self._beta = fraction("beta", value)

    @property
    def uniform_share(self) -> float:
        """The share of draws that are uniform although sampling is prioritized, from 0 to 1."""
        return self._uniform_share

    @uniform_share.setter
    def uniform_share(self, value: float) -> None:
        self._uniform_share = fraction("uniform_share", value)

    @property
    def largest_priority(self) -> float:
        """The largest priority so far, as `update_priorities` takes it; 1 at first. New transitions get it."""
        return self._core.largest_priority ** (1 / self._alpha) if self._alpha else 1.0

    @property
    def env_time_steps(self) -> list[int]:
        """The number of frames that each environment has delivered so far.

        The newest frame of environment i has the index (env_time_steps[i] - 1) * num_envs + i.
        """
        return self._core.env_time_steps

    @abstractmethod
    def append(
        self,
        frame: NDArray[Any],
        action: ArrayLike,
        reward: ArrayLike,
        terminated: ArrayLike,
        truncated: ArrayLike,
        first: ArrayLike,
    ) -> None:
        """Store what every environment returned.

        Args:
            frame: (num_envs, *frame_shape), the buffer's dtype: the newest frame only. When it is the array that
                `next_slot` returned, nothing is copied.
            action: (num_envs,) integers: the actions that led to the frames.
            reward: (num_envs,) finite real numbers: the rewards of these actions, rounded to float32.
            terminated: (num_envs,) bool: no value lies beyond this frame.
            truncated: (num_envs,) bool: the episode was cut off here; value goes on.
            first: (num_envs,) bool: the frame starts an episode; its action, reward and flags are ignored.

        Raises:
            ValueError: an argument has the wrong shape, dtype or range. Nothing is stored then.
        """

    @abstractmethod
    def next_slot(self) -> NDArray[Any]:
        """Return the memory of the next frames, (num_envs, *frame_shape), to be written and then appended.

        Lets a preprocessing kernel write into the buffer itself. The view is good until the next `append`; write to it
        from one thread only. Other threads may sample meanwhile.

        Raises:
            RuntimeError: `append_to` has left the environments with different numbers of frames.
        """

    def empty_batch(self, batch_size: int, *, apart: bool = False) -> Batch:
        """Allocate a batch that `sample` can fill again and again (its `out`).

        Args:
            batch_size: B.
            apart: whether `obs` and `next_obs` are separate contiguous arrays, so that the caller may write to them.
                Filling them takes longer, by a fifth to a third.
        """
        size = integer("batch_size", batch_size, 1)
        shape, dtype = self._store.cell_shape, self._store.cell_dtype
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
        size = integer("batch_size", batch_size, 1)
        self._core.sample(size, self._beta, self._uniform_share, *_columns(batch))
        self._store.wait()
        return batch

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
        self._store.wait()
        return batch

    def latest(self, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Return (num_envs, stack, *frame_shape): each environment's newest stack, as a policy takes it.

        Args:
            out: a contiguous array to fill instead of a new one.

        Raises:
            RuntimeError: an environment has no frame yet.
        """
        if out is None:
            out = np.empty((self.num_envs, self.stack, *self._store.cell_shape), self._store.cell_dtype)
        self._core.latest(out)
        self._store.wait()
        return out

    def windows(self, index: ArrayLike) -> Windows:
        """Return how the windows of the named transitions end, which `Batch.discount` alone does not say.

        Raises:
            ValueError: an index names no transition that is held now.
        """
        return Windows(*self._core.windows(indices(index)))

    def valid_indices(self) -> NDArray[np.int64]:
        """Return the indices of all transitions that can be sampled now, oldest first."""
        return self._core.valid_indices()

    def update_priorities(self, index: ArrayLike, priority: ArrayLike) -> None:
        """Set the priorities of sampled transitions, once their TD errors are known.

        Args:
            index: (B,) as in `Batch.index`. Transitions that have been overwritten meanwhile are skipped.
            priority: (B,) positive: |TD error| plus a small constant, not yet to the power of alpha.

        Raises:
            ValueError: a priority is not positive or not finite, or an index names nothing that ever was.
            RuntimeError: the buffer was not made with `prioritized=True`.
        """
        values = np.asarray(priority)
        if values.dtype.kind not in "iuf":
            raise ValueError(f"priority: expected real numbers, got {priority!r}")
        self._core.update_priorities(indices(index), values.astype(np.float64))

    def clear(self) -> None:
        """Forget all transitions. The random generator, alpha, beta and uniform_share stay as they are."""
        core = self._make_core()
        core.generator_state = self._core.generator_state
        self._core = core
        self._saver.known.clear()  # rows are numbered from 0 again

    def save(self, path: str | os.PathLike[str], progress: Callable[[float], None] | None = None) -> None:
        """Write the whole buffer, its generator included, to a folder: atomically, with checksums, without pickle.

        Saving again writes only what is new: frames that this buffer has saved, or was loaded from, are linked. (If
        environments have got different numbers of frames, everything is written.) Takes some 100 MB of memory,
        however large the buffer is.

        Args:
            path: a folder, made if it is not there. What was saved there before counts until all is written.
            progress: called now and then with the share that is written, up to 1.

        Raises:
            RuntimeError: another thread appended meanwhile; what was saved before, if anything, is still there.
        """
        settings = {**self.settings, **self._of_sampling()}
        self._contents(self._core).save(Path(path).absolute(), settings, self._saver, progress)

    def restore(self, path: str | os.PathLike[str]) -> None:
        """Take over what `save` wrote, in place of what is held; from then on, sample as the saved buffer would have.

        Args:
            path: the folder.

        Raises:
            ValueError: the folder holds no replay buffer, is damaged (`pydqn._util.files.Damaged`, which names the
                file), is of another version, or was saved with other `settings`. What was held is still held then;
                only a `DeviceReplay` is empty if files with right checksums hold no replay buffer.
            MemoryError: there is too little memory for what it holds.
        """
        self._take(SavedReplay(path, self.settings))

    def _take(self, saved: SavedReplay) -> None:
        """Take over a saved buffer with the same settings."""
        with saved.errors_named():
            core, beta = self._make_core(), fraction("beta", saved.settings["beta"])
            uniform_share = fraction("uniform_share", saved.settings.get("uniform_share", 0.0))
            known = saved.read_into(self._contents(core), self._saver.length)
        self._core, self._beta, self._uniform_share, self._saver.known = core, beta, uniform_share, known

    @classmethod
    def _load(cls: type[Kind], path: str | os.PathLike[str], expected: dict[str, Any] | None, **more: Any) -> Kind:
        """Make a buffer, with `more` arguments, from what `save` wrote."""
        saved = SavedReplay(path, expected)
        with saved.errors_named():
            replay = cls(**saved.settings, **more)
            replay._saver.known = saved.read_into(replay._contents(replay._core), replay._saver.length)
        return replay

    def __getstate__(self) -> dict[str, Any]:
        """Return everything, in arrays, for `copy.deepcopy` and other programs' pickles; `save` needs no such copy."""
        settings = {**self.settings, **self._of_sampling()}
        return {"settings": settings, "contents": self._contents(self._core).export()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Become what `__getstate__` returned."""
        type(self).__init__(self, **state["settings"])
        self._contents(self._core).fill(state["contents"])

    def _of_sampling(self) -> dict[str, float]:
        """Return what may change at any time and another buffer need not have; older files lack `uniform_share`."""
        return {"beta": self.beta, **({"uniform_share": self.uniform_share} if self.uniform_share else {})}

    def _contents(self, core: _core.FrameReplay) -> Contents:
        return Contents(core, self._store, self.capacity // self.num_envs, self.prioritized)


def _checked(out: Batch) -> Batch:
    if not isinstance(out, Batch) or not all(isinstance(column, np.ndarray) for column in out):
        raise ValueError(f"out: expected a batch of arrays, as empty_batch returns it, got {type(out).__name__}")
    return out


def _columns(batch: Batch) -> tuple[NDArray[Any], ...]:
    """Return the batch's arrays in the core's order."""
    return (batch.obs, batch.next_obs, batch.action, batch.reward, batch.discount, batch.index, batch.weight)

"""The replay memory: every frame stored once, any number of lanes, exact transitions (see `FrameReplay`)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from pydqn import _core
from pydqn.checks import dtype_name, fraction, indices, integer, number_dtype
from pydqn.files import Damaged
from pydqn.pieces import Piece, Saver, Store

Kind = TypeVar("Kind", bound="FrameReplay")

_FILE_KIND = "pydqn-replay"
_FILE_VERSION = 3
_SETTINGS = ("capacity", "stack", "n_step", "gamma", "num_envs", "padding", "prioritized", "alpha")
_MOST = 1 << 20  # lanes, frames in a stack, steps in a window
_MOST_BYTES = 1 << 60
_BYTES_PER_PIECE = 32 << 20  # saving and loading hold a few of these at a time, however large the ring


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


class FrameReplay:
    """A ring of single frames per environment, from which stacked n-step transitions are sampled.

    `append` takes what the environments *returned*: the newest frame, and the action, reward and flags that led to it.
    A transition can be sampled when its frame's successor exists in the same episode and neither its stack nor its
    n-step window has been overwritten or is still open. A window ends early at termination or truncation, with its
    true length. `first` alone decides stacking, `terminated` alone decides bootstrapping: a lost life may be
    `terminated` while its episode and its stack go on.

    Memory is taken from the system only as frames arrive. Safe to use from several threads: every method takes the
    memory's own lock and copies outside the GIL. (The one exception is stated at `next_slot`.)

    Args:
        capacity: frames held over all lanes; each lane gets `capacity // num_envs`.
        frame_shape: shape of one frame: an image `(84, 84)`, a vector `(4,)`, anything of one axis or more.
        stack: frames in an observation.
        n_step: steps in a return (Sutton 1988); 1 is the ordinary DQN target.
        gamma: discount per step, in [0, 1].
        num_envs: lanes; the leading axis of everything appended.
        dtype: of the frames: bool, integer or real.
        padding: what stands before an episode's first frame: "zero" or "first" (copies of it).
        seed: of the sampler's own generator.
        prioritized: whether transitions are drawn in proportion to p^alpha, p being their priorities (proportional
            prioritized replay, Schaul et al. 2016, https://arxiv.org/abs/1511.05952), one from each of B equal shares
            of the whole. A new transition gets the largest priority so far; `update_priorities` changes it.
        alpha: from 0 (uniform) to 1.
        beta: of the importance weights (N P(i))^-beta, divided by the largest of the batch; from 0 (none) to 1 (full
            compensation). May be changed at any time.

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
    ) -> None:
        self.num_envs = integer("num_envs", num_envs, 1, _MOST)
        self.capacity = integer("capacity", capacity, self.num_envs)
        if not isinstance(frame_shape, (tuple, list)) or not frame_shape:
            raise ValueError(f"frame_shape: expected a tuple of at least one positive integer, got {frame_shape!r}")
        self.frame_shape = tuple(integer("frame_shape", axis, 1) for axis in frame_shape)
        self.stack = integer("stack", stack, 1, _MOST)
        self.n_step = integer("n_step", n_step, 1, _MOST)
        self.gamma = fraction("gamma", gamma)
        if not isinstance(prioritized, (bool, np.bool_)):
            raise ValueError(f"prioritized: expected True or False, got {prioritized!r}")
        self.prioritized = bool(prioritized)
        self.alpha = fraction("alpha", alpha)
        self.beta = beta
        self.dtype = number_dtype("dtype", dtype)
        if padding not in ("zero", "first"):
            raise ValueError(f"padding: expected 'zero' or 'first', got {padding!r}")
        self.padding = padding
        frames = (self.capacity + self.num_envs) * math.prod(self.frame_shape) * self.dtype.itemsize
        if frames > _MOST_BYTES:
            raise MemoryError(f"capacity: {self.capacity} frames of {self.frame_shape} {self.dtype} are too many")
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
                alpha=self.alpha if prioritized else None,
                seed=integer("seed", seed, 0) % (1 << 64),
            )
        except MemoryError:
            raise MemoryError(
                f"capacity: {self.capacity} frames of {self.frame_shape} {self.dtype} do not fit in the address space"
            ) from None
        self._saver = Saver(max(1, _BYTES_PER_PIECE // self._tick_bytes()))

    def __len__(self) -> int:
        """Return how many transitions can be sampled now."""
        return len(self._core)

    @property
    def nbytes(self) -> int:
        """Bytes held when full (address space now; memory as frames arrive)."""
        return self._core.nbytes

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
        """Store what every lane's environment returned.

        Args:
            frame: (num_envs, *frame_shape), the replay's dtype: the newest frame only. When it is the array that
                `next_slot` gave, nothing is copied.
            action: (num_envs,) integers: the actions that led to the frames.
            reward: (num_envs,) finite real numbers: what they earned.
            terminated: (num_envs,) bool: no value lies beyond this frame.
            truncated: (num_envs,) bool: the episode was cut off here; value goes on.
            first: (num_envs,) bool: the frame opens an episode; the lane's action, reward and flags are ignored.

        Raises:
            ValueError: an argument has the wrong shape, dtype or range. Nothing is stored then.
        """
        self._core.append(frame, action, reward, terminated, truncated, first)

    def next_slot(self) -> NDArray[Any]:
        """Return the memory of the next frames, (num_envs, *frame_shape), to be written and then appended.

        Lets a preprocessing kernel write into the ring itself. The view is good until the next `append`; write to it
        from one thread only. Other threads may sample meanwhile.
        """
        return self._core.next_slot()

    def empty_batch(self, batch_size: int) -> Batch:
        """Allocate a batch that `sample` can fill again and again (its `out`)."""
        size = integer("batch_size", batch_size, 1)
        # One-step observations overlap in all but one frame: one block holds both. Longer windows may end early.
        depth = self.stack + 1 if self.n_step == 1 else 2 * self.stack
        shape, dtype = self._cell()
        block = np.empty((size, depth, *shape), dtype)
        return Batch(
            obs=block[:, : self.stack],
            action=np.empty(size, np.int64),
            reward=np.empty(size, np.float32),
            discount=np.empty(size, np.float32),
            next_obs=block[:, depth - self.stack :],
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
        batch = self.empty_batch(batch_size) if out is None else out
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

    def gather(self, index: ArrayLike) -> Batch:
        """Return the named transitions, as `sample` would (`index` as in `Batch.index` or `valid_indices`).

        Raises:
            ValueError: an index names no transition that is held now.
        """
        wanted = indices(index)
        if not wanted.size:
            raise ValueError(f"index: expected a list of at least one integer, got {index!r}")
        batch = self.empty_batch(wanted.size)
        self._core.gather(wanted, *_columns(batch))
        return batch

    def valid_indices(self) -> NDArray[np.int64]:
        """Return the indices of all transitions that can be sampled now, oldest first."""
        return self._core.valid_indices()

    def latest(self, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Return (num_envs, stack, *frame_shape): what a policy sees now, stacked as sampled observations are."""
        shape, dtype = self._cell()
        out = np.empty((self.num_envs, self.stack, *shape), dtype) if out is None else out
        self._core.latest(out)
        return out

    def save(self, path: str | os.PathLike[str], progress: Callable[[float], None] | None = None) -> None:
        """Write the whole memory, its generator included, to a folder: atomically, with checksums, without pickle.

        Saving again writes only what is new: frames that this memory has saved, or was loaded from, are linked. Takes
        some 100 MB beside the memory, however large that is.

        Args:
            path: a folder, made if it is not there. What was saved there before counts until all is written.
            progress: told the share that is done, now and then, up to 1.

        Raises:
            RuntimeError: another thread appended meanwhile; what was saved before, if anything, is still there.
        """
        core, ticks, stored = self._core, self._core.ticks, self._core.stored
        header = {
            "version": _FILE_VERSION,
            **self.settings,
            "beta": self.beta,
            "largest_priority": core.largest_priority,
            "ticks": ticks,
            "generator": core.generator_state,
        }
        priorities = core.export_priorities(ticks).tobytes() if self.prioritized else None

        def read(start: int, stop: int) -> bytes:
            position = start - (ticks - stored)
            lanes = [self._export(lane, position, stop - start, ticks) for lane in range(self.num_envs)]
            return b"".join(column.tobytes() for columns in zip(*lanes, strict=True) for column in columns)

        self._saver.save(Path(path).absolute(), _FILE_KIND, header, (ticks - stored, ticks), read, priorities, progress)

    @property
    def settings(self) -> dict[str, Any]:
        """What the memory was made with and keeps for good, as JSON can hold it."""
        others = {name: getattr(self, name) for name in _SETTINGS}
        return {**others, "frame_shape": list(self.frame_shape), "dtype": self.dtype.name}

    @classmethod
    def load(cls, path: str | os.PathLike[str], expected: dict[str, Any] | None = None) -> FrameReplay:
        """Read what `save` wrote; the loaded memory samples the very batches that the saved one would have.

        Args:
            path: the folder.
            expected: `settings` that the memory has to have; others are refused before any memory is taken for them.

        Raises:
            ValueError: the folder holds no replay memory, is damaged (`pydqn.files.Damaged`, which names the file), or
                is of another version.
        """
        return cls._load(path, expected)

    @classmethod
    def _load(cls: type[Kind], path: str | os.PathLike[str], expected: dict[str, Any] | None, **settings: Any) -> Kind:
        store = Store(Path(path).absolute(), _FILE_KIND)
        header = store.header
        if header.pop("version", None) != _FILE_VERSION:
            raise ValueError(f"{path}: expected format version {_FILE_VERSION}")
        for name, ours in (expected or {}).items():
            if header.get(name) != ours:
                raise ValueError(f"{path}: the replay memory has {name} {header.get(name)}, expected {ours}")
        try:
            ticks, generator, largest = (header.pop(name) for name in ("ticks", "generator", "largest_priority"))
            if unknown := header.keys() - {*_SETTINGS, "frame_shape", "dtype", "beta"}:
                raise ValueError(f"unknown: {', '.join(unknown)}")
            dtype_name("dtype", header["dtype"])
            replay = cls(**header, **settings)
            replay._core.generator_state, replay._core.largest_priority = generator, largest
            replay._core.set_ticks(integer("ticks", ticks, 0))
            stored = replay._core.stored
            store.check(ticks - stored, ticks, replay._saver.length)
            for piece in store.pieces:
                replay._read(store, piece, ticks - stored)
            if replay.prioritized:
                values = np.frombuffer(store.changing(8 * replay.num_envs * stored), np.float64)
                replay._core.import_priorities(values.reshape(replay.num_envs, stored))
            replay._core.end_import()
        except Damaged:
            raise
        except (KeyError, TypeError, ValueError, MemoryError) as error:
            raise Damaged(f"{path}: what it holds is no replay memory ({error})") from None
        return replay

    def _read(self, store: Store, piece: Piece, oldest: int) -> None:
        """Take over a piece, of which the first frames may be too old to be held."""
        count = piece.stop - piece.start
        data, skip = store.read(piece, count * self._tick_bytes()), max(0, oldest - piece.start)
        columns, start = [], 0
        for axes, dtype in ((self.frame_shape, self.dtype), ((), np.float32), ((), np.int32), ((), np.uint8)):
            shape = (self.num_envs, count, *axes)
            column = np.frombuffer(data, dtype, math.prod(shape), start).reshape(shape)
            columns.append(np.require(column, requirements="A")[:, skip:])  # it may begin at any byte
            start += column.nbytes
        for lane in range(self.num_envs):
            self._import(lane, piece.start + skip - oldest, *(column[lane] for column in columns))
        self._saver.known[piece.start // self._saver.length] = (store.folder / piece.name, piece)

    def _tick_bytes(self) -> int:
        return self.num_envs * (math.prod(self.frame_shape) * self.dtype.itemsize + 9)

    # --- what a memory that keeps its frames elsewhere does in its own way ---

    def _cell(self) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Shape and dtype of what the core holds of a frame."""
        return self.frame_shape, self.dtype

    def _export(self, lane: int, position: int, count: int, ticks: int) -> tuple[NDArray[Any], ...]:
        """Return frames, rewards, actions and flags of `count` held ticks of a lane, from the `position`th on."""
        columns: tuple[NDArray[Any], ...] = self._core.export_run(lane, position, count, ticks)
        return columns

    def _import(self, lane: int, position: int, frames: NDArray[Any], *rest: NDArray[Any]) -> None:
        """Put back what `_export` gave."""
        self._core.import_run(lane, position, frames, *rest)


def verify_saved(path: str | os.PathLike[str]) -> None:
    """Raise `pydqn.files.Damaged` unless all files of a saved memory are what was written. Loads nothing."""
    Store(Path(path), _FILE_KIND).verify()


def _columns(batch: Batch) -> tuple[NDArray[Any], ...]:
    """The batch's arrays in the core's order."""
    return (batch.obs, batch.next_obs, batch.action, batch.reward, batch.discount, batch.index, batch.weight)

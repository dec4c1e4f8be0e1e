"""pydqn's replay buffers for Tianshou, under the names of `tianshou.data` (see `VectorReplayBuffer`)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pydqn._util.checks import integer
from pydqn.adapters._tianshou import SEEN, EnvBuffer, Masks, Refusals, add_others, exactly, fill, odd_columns, take
from pydqn.replay.transitions import TransitionReplay

try:
    import h5py
    from tianshou import data as theirs
    from tianshou.data import Batch, to_numpy
    from tianshou.data.utils.converter import to_hdf5
except ImportError as error:
    raise ImportError("pydqn.adapters.tianshou needs Tianshou: pip install 'pydqn[adapters]'") from error

__all__ = ["PrioritizedReplayBuffer", "PrioritizedVectorReplayBuffer", "ReplayBuffer", "VectorReplayBuffer"]

_Positions = NDArray[np.int64]


class VectorReplayBuffer(Refusals, theirs.VectorReplayBuffer):
    """Tianshou's replay buffer of several environments, with every frame stored once and exact observations.

    Positions, columns, statistics and batches are Tianshou's own, with these differences:

    * `obs_next` is always what a step led to. With `ignore_obs_next`, Tianshou returns `obs` again where an episode was
      truncated, and at each environment's newest step.
    * With `stack_num`, stacks are those that a wrapper around the environment would return. Tianshou's are padded at
      the oldest step that is left, and those of `obs_next` at an episode's second observation.
    * An episode ends where the next one begins, even if no flag said so: a trainer resets its collector, for example,
      after random steps have been collected. `next`, `prev`, `unfinished_index` and n-step returns respect that.
    * `random_seed` is used. Tianshou's own buffer draws the same steps from environments of equal length.
    * `sample_indices(None)` returns all in random order. Slices of a buffer that is not full hold only transitions.
    * `hasnull`, which a trainer calls after each collection, does not copy the whole buffer.
    * A copy, pickled or not, behaves as the buffer itself would.
    * Observations may come as `Batch(obs=..., mask=...)`, where the mask has a number per action, 0 for those that are
      not allowed. Masks are stored as bits, and come back as they were. They need `stack_num` 1.

    Where episodes are shorter than 32 steps, images may be overwritten before their positions are used again (see
    `pydqn.TransitionReplay`). Such transitions are neither drawn nor counted. Files and pickles are of Tianshou's own
    kind, which runs the code in it: load them only from people whom you trust.

    Args:
        total_size: transitions over all environments; each keeps its newest `ceil(total_size / buffer_num)`.
        buffer_num: how many environments there are.
        stack_num: observations in a stack; 1 to return them as they come.
        save_only_last_obs: observations come as stacks along their first axis, and only the newest of each is needed.
            Stacks of exactly `stack_num` are returned as they came.
        ignore_obs_next, sample_avail: accepted and ignored, as observations are exact and stacks complete.
        random_seed: of the sampler's own generator.
        stack: frames in an observation, where `stack_num` is 1; None to tell by its shape and the first step (see
            `pydqn.TransitionReplay`).

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    transitions: TransitionReplay | None = None
    """Holds the observations, from the first `add` on. `_meta.obs` holds their indices, or -1."""

    def __init__(
        self,
        total_size: int,
        buffer_num: int,
        stack_num: int = 1,
        ignore_obs_next: bool = False,
        save_only_last_obs: bool = False,
        sample_avail: bool = False,
        random_seed: int = 42,
        *,
        stack: int | None = None,
    ) -> None:
        self._size_per_env = integer("total_size", math.ceil(total_size / integer("buffer_num", buffer_num, 1)), 1)
        options = (integer("stack_num", stack_num, 1), ignore_obs_next, save_only_last_obs, sample_avail)
        theirs.ReplayBufferManager.__init__(self, [EnvBuffer(self._size_per_env, *options) for _ in range(buffer_num)])
        self._random_state = np.random.RandomState(random_seed)  # Tianshou's kind
        self._stack = stack
        self._newest_alone, self._save_only_last_obs = save_only_last_obs, False  # Tianshou would cut indices, too
        self._breaks = np.zeros(self.maxsize, bool)  # positions at which episodes end without a flag
        self._least = np.zeros(self.buffer_num, np.int64)  # per environment: all indices from here on are held
        self._seen_nan = False
        self._masks = Masks(self.maxsize)

    def __len__(self) -> int:
        """Return how many transitions are held."""
        oldest = (self._oldest() + self._offset)[self._lengths > 0]
        return int(self._lengths.sum() if self._held(oldest).all() else self._held(self._indices).sum())

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {len(self)} of {self.maxsize} transitions in {self.buffer_num} environments>"

    def add(self, batch: Any, buffer_ids: ArrayLike | None = None) -> tuple[NDArray[Any], ...]:
        """Store one transition of each environment.

        Args:
            batch: n rows of obs, obs_next (at the end of an episode its last observation), act, rew, terminated and
                truncated; info and policy are optional. Observations are arrays of numbers, or batches of such an `obs`
                and a `mask`, (n, number of actions).
            buffer_ids: (n,) different environments; None for all.

        Returns:
            As Tianshou: positions, and returns, lengths and start positions of the episodes that ended, (n,) each.

        Raises:
            ValueError: observations are missing, no arrays of numbers or of another shape than the first ones; a mask
                is missing, comes although the first observations had none, or holds other numbers than 0 and 1; or
                `obs_next` is not `obs` moved on by a frame (in that case, make the buffer with `stack=1`).
        """
        env_indices = np.arange(self.buffer_num) if buffer_ids is None else np.asarray(buffer_ids)
        parts, masks = self._masks.split(batch, len(env_indices), stacked=self.stack_num > 1 or self._newest_alone)
        obs, obs_next = (self._observations(parts, name, len(env_indices)) for name in SEEN)
        done = np.logical_or(batch.terminated, batch.truncated)
        last, known = self.last_index[env_indices], len(self._meta.get_keys()) > 0
        before, ended = (
            (self._meta.obs[last], self._meta.done[last]) if known else (np.full(len(env_indices), -1), done)
        )
        kept = self._meta.act if known else None
        act = batch.act
        if isinstance(kept, np.ndarray):
            act = exactly("act", np.asarray(to_numpy(act)), kept.dtype, rounded=True)
        index = self._store(obs, obs_next, done, env_indices)
        rest = Batch()
        rest.__dict__.update({key: batch[key] for key in batch.get_keys() if key not in SEEN}, act=act, obs=index)
        added: tuple[NDArray[Any], ...] = super().add(rest, env_indices)
        if not known:
            self._meta.obs[np.delete(self._indices, added[0])] = -1
        self._breaks[last] = (before >= 0) & (index != before + self.buffer_num) & ~ended
        self._breaks[added[0]] = False
        self._masks.write(added[0], masks)
        return added

    def _observations(self, parts: dict[str, Any], name: str, count: int) -> NDArray[Any]:
        value = parts[name]
        array = np.asarray(value)
        if isinstance(value, Batch) or array.dtype.kind not in "biuf":
            raise ValueError(f"{name}: expected an array of numbers, got {type(value).__name__}")
        if self.transitions is None:
            self._make(array.shape[1:], array.dtype.name)
        if array.shape != (count, *self._shape):
            raise ValueError(f"{name}: expected shape {(count, *self._shape)}, got shape {array.shape}")
        array = exactly(name, array, self._latest.dtype)
        self._seen_nan = self._seen_nan or (array.dtype.kind == "f" and bool(np.isnan(array).any()))
        return array

    def _make(self, shape: tuple[int, ...], dtype: str) -> None:
        """Allocate memory for observations like the first ones."""
        if self._newest_alone and not shape:
            raise ValueError("obs: expected stacks, as save_only_last_obs says, got single numbers")
        depth, frame = self.stack_num, shape[1:] if self._newest_alone else shape
        self._shape, self._out = shape, (depth, *frame) if depth > 1 else frame
        # Stacks come as they have to be returned, or are made here from the newest observations.
        self._stacks_here = depth > 1 and not (self._newest_alone and shape[0] == depth)
        kept, stack = ((depth, math.prod(frame)), depth) if depth > 1 or self._newest_alone else (shape, self._stack)
        padding = "first" if self._stacks_here else None
        num_envs = self.buffer_num
        self.transitions = TransitionReplay(self.maxsize, kept, dtype, num_envs=num_envs, stack=stack, padding=padding)
        self._latest = np.zeros((num_envs, *self._out), dtype)  # stacks to which the environments' latest steps led
        self._open = np.zeros(num_envs, bool)  # whether these episodes have not ended

    def _store(
        self, obs: NDArray[Any], obs_next: NDArray[Any], done: NDArray[Any], env_indices: NDArray[Any]
    ) -> _Positions:
        """Store observations; return the transitions' indices in `transitions`, (n,)."""
        transitions, count = self.transitions, len(env_indices)
        assert transitions is not None
        if self._newest_alone and (self._stacks_here or self.stack_num == 1):
            obs, obs_next = obs[:, -1], obs_next[:, -1]
        if self._stacks_here:
            before = self._latest[env_indices]
            follows = self._open[env_indices] & (obs == before[:, -1]).reshape(count, -1).all(axis=1)
            before[~follows] = obs[~follows, None]
            obs, obs_next = before, np.concatenate([before[:, 1:], obs_next[:, None]], axis=1)
        shape = (count, *transitions.obs_shape)
        nothing, no = np.zeros(count, np.int64), np.zeros(count, bool)  # Tianshou's own columns hold these
        every = np.array_equal(env_indices, np.arange(self.buffer_num))
        chosen = None if every else env_indices
        index = transitions.append(obs.reshape(shape), obs_next.reshape(shape), nothing, nothing, no, no, chosen)
        if self._stacks_here:  # only now, as `append` may have refused them
            self._latest[env_indices], self._open[env_indices] = obs_next.reshape(count, *self._out), ~done
        # Frames are overwritten one by one. Transitions newer by less than a stack may still be complete, or not.
        lost = index // self.buffer_num + 2 - transitions.frame_replay.capacity // self.buffer_num
        self._least[env_indices] = np.where(lost > 0, (lost + transitions.stacks.stack - 1) * self.buffer_num, 0)
        return index

    def __getitem__(self, index: Any) -> Any:
        """Return the transitions at some positions, as Tianshou does, in new arrays.

        Raises:
            ValueError: no transition is held at one of them.
        """
        positions, meta = self._positions(index), self._meta
        obs, obs_next = self._masks.joined(positions, self._gather(positions))
        others = {key: self.get(positions, key, Batch()) for key in ("info", "policy")}
        columns = {key: meta[key][positions] for key in meta.get_keys() if key not in ("obs", *others)}
        return Batch({"obs": obs, "obs_next": obs_next, **columns, **others})

    def get(self, index: Any, key: str, default_value: Any = None, stack_num: int | None = None) -> Any:
        """Return a column at some positions, as Tianshou does, with exact `obs` and `obs_next`."""
        if key not in SEEN:
            return super().get(index, key, default_value, stack_num)
        if stack_num not in (None, self.stack_num):
            raise ValueError(f"stack_num: expected {self.stack_num} of {key}, as of the buffer, got {stack_num}")
        positions = self._positions(index)
        return self._masks.joined(positions, self._gather(positions))[SEEN.index(key)]

    def _positions(self, index: Any) -> _Positions:
        if not isinstance(index, slice):
            return np.asarray(self._indices[index])
        return self.sample_indices(0) if index == slice(None) else np.flatnonzero(self._held(self._indices))[index]

    def _gather(self, positions: _Positions) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return obs and obs_next, (*positions.shape, *shape) each."""
        if self.transitions is None or not self._held(positions).all():
            raise ValueError(f"index: expected positions at which transitions are held, got {positions}")
        shape = (*positions.shape, *self._out)
        if not positions.size:
            return np.empty(shape, self._latest.dtype), np.empty(shape, self._latest.dtype)
        batch = self.transitions.gather(self._meta.obs[positions].reshape(-1), apart=True)  # callers may write to both
        return batch.obs.reshape(shape), batch.next_obs.reshape(shape)

    def _held(self, positions: _Positions) -> NDArray[np.bool_]:
        if not self._meta.get_keys():
            return np.zeros(positions.shape, bool)
        return np.asarray(self._meta.obs[positions] >= self._least[positions // self._size_per_env])

    def sample_indices(self, batch_size: int | None) -> _Positions:
        """Draw positions of transitions, with replacement.

        Args:
            batch_size: how many; 0 for all, by environment and in order of time; None for all in random order.

        Raises:
            ValueError: nothing is held.
        """
        if batch_size is not None and batch_size < 0:
            return np.array([], np.int64)
        if not batch_size:
            steps = np.arange(self._size_per_env)
            every = (self._oldest()[:, None] + steps) % self._size_per_env + self._offset[:, None]
            every = every[steps < self._lengths[:, None]]
            every = every[self._held(every)]
            return every if batch_size == 0 else np.asarray(self._random_state.permutation(every))
        if not self._lengths.any():
            raise ValueError(f"batch_size: expected 0 as long as nothing is held, got {batch_size}")
        drawn = self._draw(batch_size)
        while (lost := ~self._held(drawn)).any():  # an environment's newest transitions always are
            drawn[lost] = self._draw(int(lost.sum()))
        return drawn

    def _draw(self, count: int) -> _Positions:
        """Draw from all positions in use, whether their transitions are held or not."""
        ends = np.cumsum(self._lengths)
        numbers: _Positions = self._random_state.randint(ends[-1], size=count)
        if ends[-1] == self.maxsize:
            return numbers
        return np.asarray(numbers + (self._offset - ends + self._lengths)[np.searchsorted(ends, numbers, side="right")])

    def _oldest(self) -> NDArray[np.int64]:
        """Return each environment's oldest transition, counted from the environment's first position."""
        full = self._lengths == self._size_per_env
        return np.where(full, (self.last_index - self._offset + 1) % self._size_per_env, 0)

    def next(self, index: Any) -> Any:
        """Return the next positions of the same episodes; the same where there is none."""
        here = np.asarray(index) % self.maxsize
        return np.where(self._breaks[here], here, super().next(index))[()]

    def prev(self, index: Any) -> Any:
        """Return the previous positions of the same episodes; the same where there is none."""
        here, before = np.asarray(index) % self.maxsize, np.asarray(super().prev(index))
        return np.where(self._breaks[before] | ~self._held(before), here, before)[()]

    def unfinished_index(self) -> _Positions:
        """Return the last positions of episodes that have not ended, or that were interrupted."""
        return np.union1d(super().unfinished_index(), np.flatnonzero(self._breaks))

    def reset(self, keep_statistics: bool = False) -> None:
        """Forget all transitions. The generator goes on."""
        super().reset(keep_statistics=keep_statistics)
        self._breaks[:], self._seen_nan = False, False
        if self.transitions is not None:
            self.transitions.clear()
            self._meta.obs[:], self._open[:] = -1, False

    def hasnull(self) -> bool:
        """Return whether a NaN or None is held."""
        odd = odd_columns(self._meta)
        if not odd and not self._seen_nan:
            return False
        rows = self.sample_indices(0)
        parts = np.array_split(rows, len(rows) // 256 + 1)  # observations are large
        self._seen_nan = self._seen_nan and any(np.isnan(seen).any() for part in parts for seen in self._gather(part))
        return self._seen_nan or any(Batch(column=column[rows]).hasnull() for column in odd)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "buffers": [{**buffer.__dict__, "_meta": Batch()} for buffer in self.buffers]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, buffers=np.empty(len(state["buffers"]), object))
        for number, values in enumerate(state["buffers"]):
            self.buffers[number] = buffer = EnvBuffer.__new__(EnvBuffer)
            buffer.__dict__.update(values)
        if self._meta.get_keys():  # the environments' columns are views of the whole buffer's
            self._set_batch_for_children()

    def save_hdf5(self, path: str, compression: str | None = None) -> None:
        """Write everything to an HDF5 file in Tianshou's way, for `load_hdf5` of the same class."""
        with h5py.File(path, "w") as file:
            to_hdf5(self.__getstate__(), file, compression=compression)


class PrioritizedVectorReplayBuffer(VectorReplayBuffer, theirs.PrioritizedVectorReplayBuffer):
    """`VectorReplayBuffer` with transitions drawn in proportion to their priorities (Schaul et al. 2016).

    The sum tree, priorities and weights are Tianshou's, with these differences: `set_beta`, `weight_norm` and
    `random_seed` take effect; `reset` forgets priorities, too (Tianshou's buffer still draws what it has forgotten);
    without `weight_norm`, weights are (p / smallest p so far)^(-alpha beta).

    Args:
        total_size, buffer_num: as of `VectorReplayBuffer`.
        alpha: exponent of the priorities, above 0.
        beta: exponent of the weights, at least 0.
        weight_norm: whether weights are divided by the largest of the batch.
        options: all others of `VectorReplayBuffer`.
    """

    def __init__(
        self, total_size: int, buffer_num: int, alpha: float, beta: float, weight_norm: bool = True, **options: Any
    ) -> None:
        if not (alpha > 0 and beta >= 0):
            raise ValueError(f"alpha, beta: expected numbers above 0 and from 0 on, got {alpha!r} and {beta!r}")
        super().__init__(total_size, buffer_num, **options)
        ours = {**self.__dict__, "options": {**self.options, "alpha": alpha, "beta": beta}}
        theirs.PrioritizedReplayBuffer.__init__(self, self.maxsize, alpha, beta, weight_norm)
        self.__dict__.update(ours)  # as Tianshou's __init__ has reset the buffer

    def _draw(self, count: int) -> _Positions:
        drawn = self.weight.get_prefix_sum_idx(self._random_state.random_sample(count) * self.weight.reduce())
        drawn = np.minimum(drawn, self.maxsize - 1)  # rounding may hit one of the leaves that pad the tree
        if len(lost := drawn[~self._held(drawn)]):
            self.weight[lost] = np.zeros(len(lost))
        return np.asarray(drawn)

    def get_weight(self, index: Any) -> Any:
        """Return the importance weights of transitions, before `weight_norm`."""
        return (self.weight[index] / self._min_prio**self._alpha) ** -self._beta

    def __getitem__(self, index: Any) -> Any:
        """Return transitions as `VectorReplayBuffer` does, with their `weight`."""
        positions = self._positions(index)
        batch, weight = super().__getitem__(positions), self.get_weight(positions)
        batch.weight = weight / np.max(weight) if self._weight_norm else weight
        return batch

    def set_beta(self, beta: float) -> None:
        """Set the exponent of the weights."""
        self._beta = beta

    def reset(self, keep_statistics: bool = False) -> None:
        """Forget all transitions and their priorities. The generator goes on."""
        super().reset(keep_statistics)
        self.weight, self._max_prio, self._min_prio = theirs.SegmentTree(self.maxsize), 1.0, 1.0


class ReplayBuffer(VectorReplayBuffer):
    """`VectorReplayBuffer` of one environment: `ReplayBuffer(size, ...)`.

    As Tianshou's, it also keeps other entries of a batch: `add(Batch(..., value=7.0))`, then `buffer[:].value`.
    """

    def __init__(self, size: int, *options: Any, **named: Any) -> None:
        super().__init__(size, 1, *options, **named)

    def add(self, batch: Any, buffer_ids: ArrayLike | None = None) -> tuple[NDArray[Any], ...]:
        """Store one transition; without `buffer_ids`, its arrays have no leading axis."""
        rows, env_indices = (Batch.stack([batch]), [0]) if buffer_ids is None else (batch, buffer_ids)
        added = super().add(rows, env_indices)
        add_others(self, added[0], rows)
        return added

    def update(self, buffer: Any) -> Any:
        """Add the transitions of another buffer, Tianshou's or ours, oldest first; return their positions here.

        Raises:
            ValueError: one of the two buffers has `stack_num` above 1 or `save_only_last_obs`.
        """
        return take(self, buffer)

    @classmethod
    def from_data(cls, obs: Any, act: Any, rew: Any, terminated: Any, truncated: Any, done: Any, obs_next: Any) -> Any:
        """Return a buffer of these transitions, one per row of arrays or of h5py datasets, in order of time.

        Raises:
            ValueError: lengths differ, or `done` is not `terminated or truncated`.
        """
        if issubclass(cls, theirs.PrioritizedReplayBuffer):
            raise NotImplementedError(
                "from_data: expected ReplayBuffer, got a class that needs alpha and beta; use update"
            )
        columns = {"obs": obs, "act": act, "rew": rew, "terminated": terminated, "truncated": truncated, "done": done}
        return fill(cls, {**columns, "obs_next": obs_next})


class PrioritizedReplayBuffer(ReplayBuffer, PrioritizedVectorReplayBuffer):
    """`PrioritizedVectorReplayBuffer` of one environment: `PrioritizedReplayBuffer(size, alpha, beta, ...)`."""

    from_data = Refusals.from_data

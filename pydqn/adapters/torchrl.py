"""A replay buffer for TorchRL that stores each frame once: `ReplayBuffer` replaces `TensorDictReplayBuffer`.

It is TorchRL's own buffer over a storage, a sampler and a writer of ours. Transforms, prefetching, pinned memory and
`update_tensordict_priority` are TorchRL's. Samples equal what TorchRL would have sampled, entry by entry and bit for
bit, with these differences:

* `index` names a transition for as long as the buffer lives. TorchRL's is a position: a late priority goes to whatever
  has been written there meanwhile. (`rb[index]` is the transition; `rb[2:5]` counts those held, oldest first.)
* n-step returns are a setting of the buffer instead of TorchRL's `MultiStepTransform`, and differ in three ways. There,
  a window that ends in a terminal state keeps the flags of its first step, so that it bootstraps from the terminal
  state; here `done`, `terminated` and everything else in "next" are those of its last step. There, a flattened batch of
  several environments is one stream, in which windows run from one environment into the next; here they end with their
  episode. There, the newest n transitions are held back; here it is n - 1, because their windows are not complete.
* Prioritized batches are drawn one from each of B equal shares of the priorities, and weights are divided by the
  largest of the batch (Schaul et al. 2016). TorchRL divides by the weight of the smallest priority in the whole buffer:
  a single error of 0 there makes the weights of all others very small.
* Every batch has to have all entries of the first one. TorchRL leaves the old values in place of a missing entry.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from multiprocessing.context import get_spawning_popen
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pydqn._util.checks import integer
from pydqn.adapters._torchrl import entries
from pydqn.adapters._torchrl.entries import (
    Key,
    fit,
    flags,
    key,
    numbers,
    observations,
    only_observation,
    rows,
    saved_notes,
)
from pydqn.adapters._torchrl.orders import count_environments, episode_starts, ids_of_blocks
from pydqn.adapters._torchrl.streams import EpisodeStreams
from pydqn.replay.frames import Batch, FrameReplay
from pydqn.replay.transitions import TransitionReplay

try:
    from tensordict import TensorDict
    from torchrl.data.replay_buffers import PrioritizedSampler, Storage, TensorDictReplayBuffer, Writer
except ImportError as error:
    raise ImportError("pydqn.adapters.torchrl needs TorchRL: pip install 'pydqn[adapters]'") from error

__all__ = ["FrameSampler", "FrameStorage", "FrameWriter", "ReplayBuffer"]

_REWARD, _DONE = ("next", "reward"), ("next", "done")
_EPS = 1e-8  # added to priorities, as TorchRL does


class ReplayBuffer(TensorDictReplayBuffer):
    """A `TensorDictReplayBuffer` that stores each frame once.

    `extend` takes what collectors return: [T] of one environment, [E, T] of several, or the same flattened. Episodes
    continue from one batch to the next.

    Args:
        capacity: transitions over all environments; each keeps its newest `capacity // num_envs`. (With images and
            episodes of fewer than 32 steps, somewhat fewer: see `pydqn.TransitionReplay`.)
        batch_size: as in TorchRL; so are `priority_key`, `transform`, `prefetch` and `pin_memory`.
        stack: frames in an observation; None to tell by its shape: uint8 images (C, H, W) or (H, W, C) are C gray
            frames or C / 3 coloured ones, everything else is one frame. Pass 4 for images of floats after
            `CatFrames(N=4)`, and 1 where a frame differs from one stack to the next (as after `VecNorm`).
        n_step: steps in a return.
        gamma: discount per step of such a return, equal to that of the loss's value estimator.
        num_envs: environments that the data come from; None to tell by the first batch: by its shape or, if it is
            flattened, by which rows continue which (a batch that does not show it is refused). If there are more
            environments than that, some frames are stored twice, n-step windows end with each batch, and a warning
            says so.
        prioritized: whether transitions are drawn by priority, which the loss writes to `priority_key`.
        alpha: exponent of the priorities, from 0 to 1 (TorchRL's may be larger).
        beta: exponent of the weights, from 0 to 1 (TorchRL's may be larger). Both may be changed: set
            `rb.sampler.beta`, or use one of TorchRL's schedulers.
        seed: of the sampler's own generator; those of torch and NumPy are not used.
        others: see `FrameStorage`.

    Raises:
        ValueError: an argument is out of range, or data do not fit; the message names it.
        RuntimeError: a batch is drawn from an empty buffer, or the buffer is sent to another process.
    """

    def __init__(
        self,
        capacity: int,
        *,
        batch_size: int | None = None,
        stack: int | None = None,
        n_step: int = 1,
        gamma: float = 0.99,
        num_envs: int | None = None,
        prioritized: bool = False,
        alpha: float = 0.6,
        beta: float = 0.4,
        seed: int = 0,
        priority_key: str = "td_error",
        transform: Any = None,
        prefetch: int | None = None,
        pin_memory: bool = False,
        **others: Any,
    ) -> None:
        others |= {"stack": stack, "n_step": n_step, "gamma": gamma, "prioritized": prioritized, "alpha": alpha}
        storage = FrameStorage(capacity, num_envs=num_envs, beta=beta, seed=seed, **others)
        super().__init__(
            storage=storage,
            sampler=FrameSampler(storage),
            writer=FrameWriter(),
            collate_fn=_unchanged,
            batch_size=batch_size,
            priority_key=priority_key,
            transform=transform,
            prefetch=prefetch,
            pin_memory=pin_memory,
        )

    @property
    def nbytes(self) -> int:
        """Bytes held when full; 0 before the first batch."""
        return int(self.storage.nbytes)

    def _nothing(self, *_: Any) -> None:
        """Do nothing: TorchRL would pickle prefetched batches, which are drawn again after loading instead."""

    _dump_prefetch_state = _load_prefetch_state = _nothing


class FrameStorage(Storage):
    """Stores transitions; works only with `FrameSampler` and `FrameWriter`. `ReplayBuffer` combines the three.

    Args:
        max_size: the capacity (see `ReplayBuffer`).
        observation_key: the entry whose frames are stored once; None for "observation" or "pixels", or the only entry
            that can be it. All other tensors, those in "next" included, are stored unchanged.
        terminated_key: the entry in "next" that ends an n-step return without a bootstrapped value; "end-of-life" with
            `EndOfLifeTransform`.
        keys: the entries to keep besides the observation, the reward and the flags; None for all of the first batch.
        num_envs: see `ReplayBuffer`.
        settings: of `pydqn.TransitionReplay`: stack, padding, n_step, gamma, prioritized, alpha, beta, seed.

    Attributes:
        written: how many transitions have been appended.
        streams: holds the transitions (their observations in `streams.transitions`); None before the first batch.
    """

    device = torch.device("cpu")

    def __init__(
        self,
        max_size: int,
        *,
        observation_key: str | Key | None = None,
        terminated_key: str | Key = "terminated",
        keys: Sequence[str | Key] | None = None,
        num_envs: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(integer("capacity", max_size, 1))
        if num_envs is not None:
            settings["num_envs"] = integer("num_envs", num_envs, 1, self.max_size)
        shape = (settings["stack"],) if isinstance(settings.get("stack"), int) else (1,)
        # Checks the settings, and holds alpha and beta until the first batch shows what an observation is.
        self._empty_replay = TransitionReplay(num_envs or 1, shape, "float32", **settings).frame_replay
        self._settings = settings
        self._observation = None if observation_key is None else key(observation_key)
        self._terminated = ("next", *key(terminated_key))
        self._keys = None if keys is None else [key(name) for name in keys]
        self.written = 0
        self.streams: EpisodeStreams | None = None
        self._drawn: tuple[torch.Tensor, Batch] | None = None

    @property
    def frame_replay(self) -> FrameReplay:
        """The buffer of the frames and priorities; an empty one before the first batch."""
        return self._empty_replay if self.streams is None else self.streams.transitions.frame_replay

    def __len__(self) -> int:
        return len(self.frame_replay)

    @property
    def nbytes(self) -> int:
        """Bytes held when full; 0 before the first batch."""
        return 0 if self.streams is None else self.streams.nbytes

    def append(self, data: Any) -> torch.Tensor:
        """Store a tensordict of any batch shape, of which the last axis is time.

        Returns:
            The transitions' int64 indices, in the batch shape.

        Raises:
            ValueError: an entry is missing or does not fit the first batch, rows are padding, time is not the last
                axis, or the first batch is flattened and does not show how many environments it comes from.
        """
        count = math.prod(data.shape)
        if not count:
            raise ValueError(f"data: expected at least one transition, got shape {tuple(data.shape)}")
        obs_key, leaves = self._leaves(data)
        streams = self.streams
        like = None if streams is None else (streams.transitions.obs_shape, streams.transitions.frame_replay.dtype)
        obs, next_obs = (observations(name, leaves.pop(name), like) for name in (obs_key, ("next", *obs_key)))
        reward = numbers(_REWARD, leaves[_REWARD].double())
        terminated, done = (flags(name, leaves[name]) for name in (self._terminated, _DONE))
        ids = entries.episode_ids(data)
        if blocks := len(data.shape) > 1:
            ids = ids_of_blocks(tuple(data.shape), obs, next_obs, done, ids)
        if streams is None:
            now = {name: getattr(self.frame_replay, name) for name in ("alpha", "beta", "uniform_share")}
            settings = {**self._settings, **now}
            if "num_envs" not in settings:
                found = count // data.shape[-1] if blocks else count_environments(obs, next_obs, done, ids)
                settings["num_envs"] = min(found, self.max_size)
            streams = EpisodeStreams(TransitionReplay(self.max_size, obs.shape[1:], obs.dtype, **settings))
        starts, before = episode_starts(obs, next_obs, ids), streams.stored
        try:
            index = streams.extend(obs, next_obs, reward, terminated, done, starts, ids, leaves)
            self.streams, self._observation = streams, obs_key  # only now: a refused first batch leaves nothing
        finally:
            if self.streams is streams:
                self.written += streams.stored - before
        return torch.from_numpy(index).reshape(data.shape)

    def draw(self, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw B transitions, which the next `get` returns without gathering them again.

        Returns:
            Their int64 indices and float32 weights, (B,) each.

        Raises:
            RuntimeError: nothing can be sampled yet.
        """
        replay, size = self.frame_replay, integer("batch_size", batch_size, 1)
        if not len(replay):
            raise RuntimeError("Cannot sample from an empty storage. No transition can be sampled yet.")  # as TorchRL
        batch = replay.sample(size, replay.empty_batch(size, apart=True))  # users may write to it
        self._drawn = (torch.from_numpy(batch.index), batch)
        return self._drawn[0], torch.from_numpy(batch.weight)

    def get(self, index: Any) -> TensorDict:
        """Return the transitions with these indices (ValueError: one is not held), or a slice of those held."""
        drawn, self._drawn = self._drawn, None
        if drawn is not None and index is drawn[0]:
            return self._tensordict(drawn[1])
        wanted = self.frame_replay.valid_indices()[index] if isinstance(index, slice) else np.asarray(index)
        out = self.frame_replay.empty_batch(wanted.size, apart=True) if wanted.size else None
        return self._tensordict(self.frame_replay.gather(wanted.reshape(-1), out)).reshape(wanted.shape)

    def set(self, *_: Any, **__: Any) -> None:
        """Raise RuntimeError: transitions never change, and only `append` adds to them."""
        raise RuntimeError("FrameStorage: expected a FrameWriter to write to it, got something else")

    def __iter__(self) -> Iterator[TensorDict]:
        yield from (self.get(index) for index in self.frame_replay.valid_indices().tolist())

    def dumps(self, path: str | Path) -> None:
        """Write everything to a folder, without pickle. Saving there again writes only new frames."""
        if self.streams is None:
            raise RuntimeError("dumps: expected a buffer with transitions, got an empty one")
        self.streams.save(Path(path), self._notes())

    def loads(self, path: str | Path) -> None:
        """Read what `dumps` wrote. Episodes that had not ended end there, as environments are not saved.

        Raises:
            ValueError: the folder is damaged, or its storage was made with other arguments.
        """
        self._restore(*EpisodeStreams.load(Path(path), self.max_size, **self._settings))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the files that `dumps` writes, as uint8 tensors by name."""
        return {} if self.streams is None else self.streams.state(self._notes())

    def load_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Take over what `state_dict` returned; see `loads`."""
        if state_dict:
            self._restore(*EpisodeStreams.from_state(state_dict, self.max_size, **self._settings))
        else:
            self._empty()
            self.written = 0

    def _notes(self) -> dict[str, Any]:
        return {"observation": self._observation, "written": self.written}

    def _restore(self, streams: EpisodeStreams, notes: Any) -> None:
        if missing := {_REWARD, _DONE, self._terminated} - streams.columns.keys():
            raise ValueError(f"loads: expected the entries {sorted(missing)}, which are not there")
        self._observation, self.written = saved_notes(notes)
        self.streams = streams

    def _leaves(self, data: Any) -> tuple[Key, dict[Key, torch.Tensor]]:
        """Return the observation's key, and all entries that are kept as rows, (n, ...)."""
        leaves = {key(name): data.get(name) for name in data.keys(True, True) if name != "index"}
        entries.no_padding(leaves)
        observation = self._observation or only_observation(leaves)
        columns = {} if self.streams is None else self.streams.columns
        needed = [observation, ("next", *observation), _REWARD, _DONE, self._terminated]
        found = {}
        for name in [*needed, *(columns or self._keys or leaves)]:
            found[name] = rows(name, leaves.get(name), len(data.shape), [*leaves], stored=name not in needed[:2])
            if name in columns:
                found[name] = fit(name, found[name], columns[name])
        return observation, found

    def _tensordict(self, batch: Batch) -> TensorDict:
        assert self.streams is not None
        assert self._observation is not None
        transitions, slots_at = self.streams.transitions, self.streams.slots_at
        n_step = transitions.frame_replay.n_step
        leaves: dict[Key, Any] = {}
        for name, frames in ((self._observation, batch.obs), (("next", *self._observation), batch.next_obs)):
            leaves[name] = torch.from_numpy(
                np.ascontiguousarray(transitions.stacks.join(frames, transitions.obs_shape))
            )
        first = last = torch.from_numpy(slots_at(batch.index))
        if n_step > 1:
            steps = transitions.windows(batch.index).steps
            leaves[("steps_to_next_obs",)] = torch.from_numpy(steps)
            last = torch.from_numpy(slots_at(batch.index, steps - 1))
        for name, column in self.streams.columns.items():
            leaves[name] = column.index_select(0, last if name[0] == "next" else first)
        if n_step > 1:
            kind = torch.promote_types(leaves[_REWARD].dtype, torch.float32)  # a discounted sum is no integer
            leaves[_REWARD] = torch.from_numpy(batch.reward).to(kind).reshape(leaves[_REWARD].shape)
        return TensorDict(leaves, [len(first)], device=self.device)

    def _empty(self) -> None:
        if self.streams is not None:
            columns = self.streams.columns
            self.streams.transitions.clear()
            self.streams = EpisodeStreams(self.streams.transitions)
            self.streams.columns = columns

    def __getstate__(self) -> dict[str, Any]:
        if get_spawning_popen() is not None:
            raise RuntimeError("FrameStorage: cannot be sent to another process; let collectors return their data")
        return super().__getstate__()  # type: ignore[no-any-return]


class FrameSampler(PrioritizedSampler):
    """Draws transitions, uniformly or by priority, as the storage was made for."""

    def __init__(self, storage: FrameStorage) -> None:
        self._frame_storage, self.reduction = storage, "max"

    def __repr__(self) -> str:
        prioritized = self._frame_storage.frame_replay.prioritized
        return f"FrameSampler(prioritized={prioritized}, alpha={self.alpha}, beta={self.beta})"

    @property
    def alpha(self) -> float:
        """Exponent of the priorities, from 0 to 1; setting it changes those held (see `pydqn.FrameReplay.alpha`)."""
        return self._frame_storage.frame_replay.alpha

    @alpha.setter
    def alpha(self, value: float) -> None:
        self._frame_storage.frame_replay.alpha = float(value)

    @property
    def beta(self) -> float:
        """Exponent of the weights, from 0 to 1."""
        return self._frame_storage.frame_replay.beta

    @beta.setter
    def beta(self, value: float) -> None:
        self._frame_storage.frame_replay.beta = float(value)

    @property
    def default_priority(self) -> float:
        """The largest priority so far, which a new transition gets."""
        return max(self._frame_storage.frame_replay.largest_priority - _EPS, 0.0)

    def sample(self, storage: FrameStorage, batch_size: int) -> tuple[torch.Tensor, dict[str, Any]]:
        """Return (B,) int64 indices and, if prioritized, "priority_weight", (B,) float32."""
        index, weight = storage.draw(batch_size)
        return index, {"priority_weight": weight} if storage.frame_replay.prioritized else {}

    def update_priority(self, index: Any, priority: Any, *, storage: Any = None) -> None:
        """Set priorities; ignored where sampling is uniform, and for transitions that are no longer held."""
        if self._frame_storage.frame_replay.prioritized:
            wanted = torch.as_tensor(index).cpu().numpy().reshape(-1)
            values = torch.as_tensor(priority).detach().cpu().double().numpy().reshape(-1)
            self._frame_storage.frame_replay.update_priorities(wanted, np.broadcast_to(values, wanted.shape) + _EPS)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def mark_update(self, *_: Any, **__: Any) -> None:
        """Do nothing: the buffer gives new transitions the largest priority, and the storage saves all priorities."""

    add = extend = load_state_dict = dumps = loads = _empty = mark_update


class FrameWriter(Writer):
    """Appends to a `FrameStorage`, which counts the transitions."""

    @property
    def _write_count(self) -> int:
        return int(self._storage.written)

    def extend(self, data: Any) -> torch.Tensor:
        """Store a tensordict; returns the transitions' indices."""
        index: torch.Tensor = self._storage.append(data)
        return index

    add = extend

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, *_: Any) -> None:
        """Do nothing: the storage saves the count together with the transitions."""

    dumps = loads = load_state_dict

    def _empty(self, empty_write_count: bool = True) -> None:
        self._storage.written *= not empty_write_count


def _unchanged(batch: Any) -> Any:
    return batch

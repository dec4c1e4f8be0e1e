"""Private parts of `pydqn.adapters.tianshou`: per-environment counts, refusals, and transitions of other buffers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pydqn._util.checks import converted

try:
    from tianshou import data as theirs
    from tianshou.data import Batch, to_numpy
    from tianshou.data.batch import alloc_by_keys_diff
except ImportError as error:
    raise ImportError("pydqn.adapters.tianshou needs Tianshou: pip install 'pydqn[adapters]'") from error

SEEN = ("obs", "obs_next")
_ROWS = 1024  # of a dataset at a time


class NoColumn:
    """A buffer without columns of observations."""

    @property
    def obs(self) -> NDArray[Any]:
        """Raise ValueError: there is no such column; observations are put together for given positions."""
        raise ValueError('obs: no such column is kept; use buffer[index].obs or buffer.get(index, "obs")')

    obs_next = obs


class Refusals(NoColumn):
    """The parts of Tianshou's interface that a buffer which stores each frame once cannot have."""

    stack_num: int

    def __setattr__(self, key: str, value: Any) -> None:
        if key == "stack_num" and self.__dict__.get("transitions") is not None:
            raise ValueError(
                f"stack_num: expected to stay {self.stack_num} once there are transitions. Tianshou's own update sets "
                "it, and cannot read this buffer: call update of pydqn's ReplayBuffer, or add what buffer[:] gives"
            )
        super().__setattr__(key, value)

    def __iter__(self) -> Any:
        """Raise ValueError: NumPy would take the buffer for a list, as Tianshou's managers make arrays of buffers."""
        raise ValueError(
            "buffer: cannot be iterated over or put into an array. buffer[:] has its transitions; VectorReplayBuffer "
            "is for several environments; CachedReplayBuffer and other managers take Tianshou's own buffers only"
        )

    def set_batch(self, *_: Any) -> None:
        """Raise NotImplementedError: frames are stored once and in order, and gaps would break their stacks."""
        raise NotImplementedError("frames are stored once: expected transitions to be given to add, one by one")

    dropnull = set_batch

    def update(self, buffer: Any) -> Any:
        """Raise NotImplementedError: Tianshou's buffers of several environments cannot do it, either."""
        raise NotImplementedError("update: expected a ReplayBuffer of one environment to take over transitions")

    @classmethod
    def from_data(cls, *_: Any, **__: Any) -> Any:
        """Raise NotImplementedError: the rows name no environments, and priorities would need exponents."""
        raise NotImplementedError("from_data: expected ReplayBuffer.from_data; other classes take transitions by add")


class EnvBuffer(NoColumn, theirs.ReplayBuffer):
    """Tianshou's counts of one environment: the position of its next transition, the length of its episode."""

    def get(self, index: Any, key: str, *rest: Any, **others: Any) -> Any:
        """Return a column as Tianshou does, except observations, which only the whole buffer has."""
        if key in SEEN and self._meta.get_keys():  # if empty, Tianshou's error stops NumPy from taking it for a list
            raise ValueError(f"buffers: expected the whole buffer to be asked for {key}, not one environment's part")
        return super().get(index, key, *rest, **others)

    def set_batch(self, batch: Any) -> None:
        """Use a part of the whole buffer's columns, with any names."""
        self._meta = batch


class Masks:
    """Action masks of the observations before and after each transition, a bit per action.

    Args:
        size: positions in the buffer.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._num_actions: int | None = None  # 0 if observations come without masks, None as long as nothing is held
        self._dtype = np.dtype(bool)
        self._bits = np.zeros((0, 2, 0), np.uint8)  # (size, 2, bytes) with masks

    def split(self, batch: Any, count: int, *, stacked: bool) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """Return the observations of a batch and their masks, (count, number of actions) each, by name.

        Raises:
            ValueError: a mask is missing or not as in the first transition, or comes with observations in stacks.
        """
        parts, masks = {name: getattr(batch, name, None) for name in SEEN}, {}
        for name, value in parts.items():
            if isinstance(value, Batch) and set(value.get_keys()) == {"obs", "mask"}:
                parts[name], masks[name] = value.obs, np.asarray(to_numpy(value.mask))
        expects = bool(masks) if self._num_actions is None else self._num_actions > 0
        if len(masks) != len(SEEN) * expects:
            wanted = "masks in obs and obs_next" if expects else "no masks, as in the first transition"
            raise ValueError(f"mask: expected {wanted}, got {' and '.join(masks) or 'none'} with a mask")
        if masks and stacked:
            raise ValueError("mask: expected observations without masks, as stack_num or save_only_last_obs is set")
        for name, mask in masks.items():
            shape = (count, self._num_actions or masks["obs"].shape[-1])
            if mask.shape != shape or mask.dtype.kind not in "biuf" or not np.isin(mask, (0, 1)).all():
                got = f"{mask.dtype} of shape {mask.shape}" + (" with other numbers" if mask.shape == shape else "")
                raise ValueError(f"{name}.mask: expected zeros and ones of shape {shape}, got {got}")
        return parts, masks

    def write(self, positions: NDArray[Any], masks: dict[str, NDArray[Any]]) -> None:
        """Store the masks of transitions that have been added."""
        if self._num_actions is None:
            self._num_actions = masks["obs"].shape[-1] if masks else 0
            self._dtype = masks["obs"].dtype if masks else self._dtype
            self._bits = np.zeros((self._size, len(SEEN), (self._num_actions + 7) // 8), np.uint8)
        if masks:
            self._bits[positions] = np.packbits(np.stack([masks[name] == 1 for name in SEEN], axis=1), axis=-1)

    def joined(self, positions: NDArray[Any], observations: tuple[Any, Any]) -> tuple[Any, Any]:
        """Return obs and obs_next, in batches with their masks where they came with masks."""
        if not self._num_actions:
            return observations
        masks = np.unpackbits(self._bits[positions], axis=-1, count=self._num_actions).astype(self._dtype)
        obs, obs_next = (
            Batch(obs=value, mask=masks[..., number, :].copy()) for number, value in enumerate(observations)
        )
        return obs, obs_next


def odd_columns(columns: Any) -> list[Any]:
    """Return the columns that may hold a NaN or None."""
    if isinstance(columns, Batch):
        return [column for part in columns.values() for column in odd_columns(part)]
    kind = columns.dtype.kind if isinstance(columns, np.ndarray) else "O"
    return [] if kind in "biu" or (kind == "f" and not np.isnan(columns).any()) else [columns]


def exactly(name: str, array: NDArray[Any], dtype: np.dtype[Any], *, rounded: bool = False) -> NDArray[Any]:
    """Return values in the dtype of the first ones; ValueError if they would change (`rounded`: see `converted`)."""
    try:
        return converted(name, array, dtype, rounded=rounded)
    except ValueError:
        wanted = f"{dtype}, as in the first transition, or values that it holds exactly"
        raise ValueError(f"{name}: expected {wanted}, got {array.dtype}") from None


def add_others(buffer: Any, positions: NDArray[Any], rows: Any) -> None:
    """Store entries that Tianshou has no name for in columns of their own."""
    names = [key for key in rows.get_keys() if key not in (*buffer._reserved_keys, *SEEN)]
    if not names:
        return
    others = Batch()
    others.__dict__.update({name: rows[name] for name in names})
    alloc_by_keys_diff(buffer._meta, others, buffer.maxsize, stack=False)
    buffer._set_batch_for_children()
    for name in names:
        buffer._meta[name][positions] = others[name]


def take(buffer: Any, other: Any) -> NDArray[np.int64]:
    """Add another buffer's transitions to a buffer of one environment, whose episode statistics stay unchanged."""
    for name, one in (("buffer", other), ("self", buffer)):
        if one.stack_num > 1 or one._save_only_last_obs or getattr(one, "_newest_alone", False):
            raise ValueError(f"update: expected neither stack_num nor save_only_last_obs, got one in {name}")
    positions = other.sample_indices(0) if len(other) else np.zeros(0, np.int64)
    own, added = buffer.buffers[0], []
    statistics = own._ep_return, own._ep_len, own._ep_start_idx
    part = _ROWS if other is not buffer else max(len(positions), 1)  # or it would overwrite what is still to be read
    try:
        for start in range(0, len(positions), part):
            some = positions[start : start + part]
            rows = other[some]
            rows.__dict__.pop("weight", None)  # which prioritized buffers add
            added += [buffer.add(rows[number])[0][0] for number in range(len(some))]
    finally:
        own._ep_return, own._ep_len, own._ep_start_idx = statistics
    return np.array(added, np.int64)


def fill(make: Any, columns: dict[str, Any]) -> Any:
    """Return `make(number of rows)`, filled with the rows of the columns."""
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"from_data: expected columns of one length, got {lengths}")
    buffer = make(lengths["obs"])
    for start in range(0, lengths["obs"], _ROWS):
        part = {name: np.asarray(column[start : start + _ROWS]) for name, column in columns.items()}
        done = part.pop("done").astype(bool)
        wrong = np.flatnonzero(done != (part["terminated"].astype(bool) | part["truncated"].astype(bool)))
        if len(wrong):
            raise ValueError(f"done: expected terminated or truncated, got {done[wrong[0]]} in row {start + wrong[0]}")
        for number in range(len(done)):
            buffer.add(Batch({name: column[number] for name, column in part.items()}))
    return buffer

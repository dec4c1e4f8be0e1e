"""Entries of a tensordict: found by name, flattened to rows, and turned into arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pydqn._util import checks
from pydqn._util.checks import converted, integer

if TYPE_CHECKING:
    import torch

Key = tuple[str, ...]

_EPISODE_IDS = ("collector", "traj_ids")  # where collectors say to which episode a row belongs
_MASKS = (("collector", "mask"), ("mask",))  # where `split_trajectories` says which rows are no padding


def key(name: str | Key) -> Key:
    """Return the full name of an entry."""
    return (name,) if isinstance(name, str) else tuple(name)


def only_observation(leaves: dict[Key, Any]) -> Key:
    """Return the name of the only entry that can be the observation; ValueError if there is no such entry."""
    both = [
        key
        for key, leaf in leaves.items()
        if ("next", *key) in leaves and str(getattr(leaf, "dtype", 0)) != "torch.bool"
    ]
    named = [key for key in both if key[-1] in ("observation", "pixels")]
    found = named or [key for key in both if leaves[key][0].numel() > 1]
    if len(found) != 1:
        raise ValueError(
            f"observation_key: expected one of {sorted(found or leaves)}, got None, which does not say which"
        )
    return found[0]


def episode_ids(data: Any) -> NDArray[Any] | None:
    """Return the episode of each row of a tensordict, (n,), or None if no collector has recorded it."""
    given = data.get(_EPISODE_IDS, None)
    return None if given is None else numbers(_EPISODE_IDS, given.cpu().reshape(-1))


def no_padding(leaves: dict[Key, Any]) -> None:
    """Raise ValueError if a mask says that some rows are padding."""
    for name in _MASKS:
        if name in leaves and not leaves[name].all():
            raise ValueError(f"{name}: expected steps of environments, got padding; pass data[data[{name}]]")


def rows(key: Key, leaf: Any, dims: int, known: list[Key], *, stored: bool) -> torch.Tensor:
    """Return an entry as rows on the CPU, (n, ...), of a batch with `dims` batch dimensions.

    `stored` says that the rows will be kept as a tensor, which needs a dtype of which PyTorch can select rows.
    """
    import torch

    if not isinstance(leaf, torch.Tensor):
        raise ValueError(f"{key}: expected a tensor in every batch, got {leaf!r}; there are {sorted(known)}")
    if stored and leaf.dtype in (torch.uint16, torch.uint32, torch.uint64):
        raise _unfit(key, "a dtype of which PyTorch can write and select rows, such as int64", leaf)
    return leaf.detach().cpu().reshape(-1, *leaf.shape[dims:])


def observations(key: Key, leaf: torch.Tensor, like: tuple[tuple[int, ...], np.dtype[Any]] | None) -> NDArray[Any]:
    """Return observations, (n, *shape), in the shape and dtype `like` those of the first batch (None: this is it)."""
    try:
        array = leaf.numpy()
    except TypeError:
        raise _unfit(key, "numbers that NumPy knows", leaf) from None
    if like is None:
        return array
    shape, dtype = like
    if array.shape[1:] != shape:
        raise _unfit(key, f"shape {shape} per transition, as in the first batch", leaf)
    try:
        return converted(str(key), array, dtype)
    except ValueError:
        raise _unfit(key, f"{dtype}, as in the first batch, or values that it holds exactly", leaf) from None


def flags(key: Key, leaf: torch.Tensor) -> NDArray[np.bool_]:
    """Return one bool per transition, (n,)."""
    return checks.flags(str(key), _single(key, leaf, "bool"))


def numbers(key: Key, leaf: torch.Tensor) -> NDArray[Any]:
    """Return one number per transition, (n,)."""
    return _single(key, leaf, "number")


def fit(key: Key, leaf: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """Return rows in the dtype of the column of earlier ones; ValueError if their shape or values do not fit."""
    if leaf.shape[1:] != column.shape[1:]:
        raise _unfit(key, f"shape {tuple(column.shape[1:])} per transition, as in the first batch", leaf)
    if leaf.dtype == column.dtype:
        return leaf
    if not _holds(column.dtype, leaf):
        raise _unfit(key, f"{column.dtype}, as in the first batch, or values that it holds exactly", leaf)
    return leaf.to(column.dtype)


def _holds(dtype: torch.dtype, leaf: torch.Tensor) -> bool:
    """Return whether a dtype can represent every value of some rows."""
    import torch

    if leaf.is_complex() or dtype.is_complex:
        return False
    if leaf.is_floating_point() and dtype.is_floating_point:
        return bool(((leaf.to(dtype).to(leaf.dtype) == leaf) | leaf.isnan()).all())
    if dtype.is_floating_point:
        # Integers up to here have no gaps. A conversion there and back would not show it: the result of an overflow
        # differs from processor to processor (see `pydqn._util.checks.converted`).
        most = round(2 / torch.finfo(dtype).eps)
        least = -most
    else:
        least, most = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    if leaf.is_floating_point():
        # `least` is a power of two, which reals represent. `most` may not be, so the values are compared with most + 1.
        return bool((leaf.trunc() == leaf).all() and (leaf >= least).all() and (leaf < most + 1).all())
    return not leaf.numel() or (least <= int(leaf.min()) and int(leaf.max()) <= most)


def saved_notes(notes: Any) -> tuple[Key, int]:
    """Return the observation's key and the number of transitions written, as a storage has saved them."""
    try:
        name, written = notes["observation"], integer("written", notes["written"], 0)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"loads: expected what a FrameStorage saved, got something else ({error})") from None
    if not isinstance(name, list) or not name or not all(isinstance(part, str) for part in name):
        raise ValueError(f"loads: expected the name of the observation, got {name!r}")
    return tuple(name), written


def _single(key: Key, leaf: torch.Tensor, what: str) -> NDArray[Any]:
    if leaf.numel() != len(leaf):
        raise _unfit(key, f"one {what} per transition", leaf)
    try:
        return leaf.reshape(-1).numpy()
    except TypeError:
        raise _unfit(key, f"one {what} per transition", leaf) from None


def _unfit(key: Key, wanted: str, leaf: torch.Tensor) -> ValueError:
    return ValueError(f"{key}: expected {wanted}, got {leaf.dtype} of shape {tuple(leaf.shape)}")

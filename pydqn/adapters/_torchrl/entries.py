"""Entries of a tensordict: by name, flattened to rows, and as the arrays that `pydqn.adapters._torchrl.streams` takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pydqn._util import checks
from pydqn._util.checks import converted, integer

if TYPE_CHECKING:
    import torch

Key = tuple[str, ...]

_NAMES = ("collector", "traj_ids")  # where collectors say which episode a row is of
_PADDING = (("collector", "mask"), ("mask",))  # where `split_trajectories` says which rows are real


def key(name: str | Key) -> Key:
    """Return the full name of an entry."""
    return (name,) if isinstance(name, str) else tuple(name)


def only_observation(leaves: dict[Key, Any]) -> Key:
    """Return the one entry that can be the observation; ValueError where that cannot be told."""
    both = [
        key
        for key, leaf in leaves.items()
        if ("next", *key) in leaves and str(getattr(leaf, "dtype", 0)) != "torch.bool"
    ]
    named = [key for key in both if key[-1] in ("observation", "pixels")]
    found = named or [key for key in both if leaves[key][0].numel() > 1]
    if len(found) != 1:
        raise ValueError(f"observation_key: expected one of {sorted(found or leaves)}, got None, which does not tell")
    return found[0]


def episodes(data: Any) -> NDArray[Any] | None:
    """Return which episode each row of a tensordict is of, (n,), where a collector says so."""
    given = data.get(_NAMES, None)
    return None if given is None else numbers(_NAMES, given.cpu().reshape(-1))


def no_padding(leaves: dict[Key, Any]) -> None:
    """Raise ValueError where entries say that some rows are no steps."""
    for name in _PADDING:
        if name in leaves and not leaves[name].all():
            raise ValueError(f"{name}: expected steps of environments, got padding; pass data[data[{name}]]")


def rows(key: Key, leaf: Any, dims: int, known: list[Key], *, stored: bool) -> torch.Tensor:
    """Return an entry of a batch with so many batch dimensions on the CPU, (n, ...); `stored`: as a column."""
    import torch

    if not isinstance(leaf, torch.Tensor):
        raise ValueError(f"{key}: expected a tensor in every batch, got {leaf!r}; there are {sorted(known)}")
    if stored and leaf.dtype in (torch.uint16, torch.uint32, torch.uint64):
        raise _unfit(key, "a dtype of which PyTorch can write and select rows, such as int64", leaf)
    return leaf.detach().cpu().reshape(-1, *leaf.shape[dims:])


def observations(key: Key, leaf: torch.Tensor, like: tuple[tuple[int, ...], np.dtype[Any]] | None) -> NDArray[Any]:
    """Return observations, (n, *shape), in the shape and dtype of the first ones."""
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
    """Return rows that a column of earlier ones holds exactly; ValueError where their shape or values do not fit."""
    if leaf.shape[1:] != column.shape[1:]:
        raise _unfit(key, f"shape {tuple(column.shape[1:])} per transition, as in the first batch", leaf)
    if leaf.dtype == column.dtype:
        return leaf
    if not _holds(column.dtype, leaf):
        raise _unfit(key, f"{column.dtype}, as in the first batch, or values that it holds exactly", leaf)
    return leaf.to(column.dtype)


def _holds(dtype: torch.dtype, leaf: torch.Tensor) -> bool:
    """Return whether a dtype has every value of some rows."""
    import torch

    if leaf.is_complex() or dtype.is_complex:
        return False
    if leaf.is_floating_point() and dtype.is_floating_point:
        return bool(((leaf.to(dtype).to(leaf.dtype) == leaf) | leaf.isnan()).all())
    if dtype.is_floating_point:
        # Integers up to here have no gaps. Not by converting there and back: what an overflow gives differs from
        # processor to processor (see `pydqn._util.checks.converted`).
        most = round(2 / torch.finfo(dtype).eps)
        least = -most
    else:
        least, most = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    if leaf.is_floating_point():
        # The least is a power of two, which reals have; the most may not be one, so what lies beyond it is compared.
        return bool((leaf.trunc() == leaf).all() and (leaf >= least).all() and (leaf < most + 1).all())
    return not leaf.numel() or (least <= int(leaf.min()) and int(leaf.max()) <= most)


def saved_notes(notes: Any) -> tuple[Key, int]:
    """Return the observation's key and how many transitions have come, as a storage has saved them."""
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

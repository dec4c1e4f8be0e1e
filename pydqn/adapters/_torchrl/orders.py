"""The order of the rows in a batch of several environments' steps."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_COMPARED = 64  # rows at a time: an order that is not theirs mostly fails within the first ones


def openings(obs: NDArray[Any], next_obs: NDArray[Any], names: NDArray[Any] | None = None) -> NDArray[np.bool_]:
    """Return, (n,), which rows do not go on with the row before.

    Args:
        obs: (n, *shape).
        next_obs: (n, *shape).
        names: (n,) of the episodes, or of the environments; None to compare observations.
    """
    opens = np.ones(len(obs), bool)
    if names is None:
        opens[1:] = (next_obs[:-1] != obs[1:]).any(axis=tuple(range(1, obs.ndim)))
    else:
        opens[1:] = names[1:] != names[:-1]
    return opens


def environments(
    obs: NDArray[Any], next_obs: NDArray[Any], done: NDArray[np.bool_], names: NDArray[Any] | None = None
) -> int:
    """Return how many environments a flattened batch comes from, as far as its rows tell.

    That is the least E for which the batch is E environments' steps, each environment's in turn ([E, T] flattened) or
    each step's in turn ([T, E] flattened), such that every row goes on with the environment's row before, unless the
    episode ended there. Rows that have different names and no end between them belong to different environments.

    Args:
        obs: (n, *shape).
        next_obs: (n, *shape).
        done: (n,) bool: the episode is over after this row.
        names: (n,) of the episodes; None to compare observations.

    Raises:
        ValueError: no such E fits, or only E = n without names: then any rows at all would do.
    """
    count = len(obs)
    for number in (number for number in range(1, count) if count % number == 0):
        steps = count // number
        if _goes_on(obs, next_obs, done, names, 1, steps) or _goes_on(obs, next_obs, done, names, number):
            return number
    if count == 1 or (names is not None and len(np.unique(names)) == count):
        return count
    raise ValueError(
        f"num_envs: expected to be given, as the first batch of {count} rows does not tell how many environments it "
        "comes from; say num_envs=..., or hand batches over in the shape (environments, steps)"
    )


def block_names(
    shape: tuple[int, ...],
    obs: NDArray[Any],
    next_obs: NDArray[Any],
    done: NDArray[np.bool_],
    names: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """Return what tells the rows of an unflattened batch apart: their own names, or else numbers of environments.

    Args:
        shape: of the batch, the last axis being time.
        obs: see `environments`.
        next_obs: see `environments`.
        done: see `environments`.
        names: see `environments`.

    Raises:
        ValueError: time is the first axis, not the last.
    """
    steps, count = shape[-1], len(obs)
    if not _goes_on(obs, next_obs, done, names, 1, steps) and _goes_on(obs, next_obs, done, names, count // shape[0]):
        raise ValueError(
            f"data: expected the shape (environments, steps), got {shape}, where time is the first axis; pass "
            "data.transpose(0, -1)"
        )
    return np.repeat(np.arange(count // steps), steps) if names is None else names


def _goes_on(
    obs: NDArray[Any],
    next_obs: NDArray[Any],
    done: NDArray[np.bool_],
    names: NDArray[Any] | None,
    apart: int,
    length: int | None = None,
) -> bool:
    """Return whether each row is gone on with so many rows later, unless its episode ended, in blocks of `length`."""
    rows = np.arange(len(obs) - apart)
    if length is not None:
        rows = rows[(rows + apart) % length > 0]
    rows = rows[~done[rows]]
    if names is not None:
        return bool((names[rows] == names[rows + apart]).all())
    parts = (rows[start : start + _COMPARED] for start in range(0, len(rows), _COMPARED))
    return all(np.array_equal(next_obs[part], obs[part + apart]) for part in parts)

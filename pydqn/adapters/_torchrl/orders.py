"""Which rows of a batch belong to the same environment, and in what order they come."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_ROWS_AT_A_TIME = 64  # compared at once: an order that does not fit mostly fails within the first rows


def episode_starts(obs: NDArray[Any], next_obs: NDArray[Any], ids: NDArray[Any] | None = None) -> NDArray[np.bool_]:
    """Return which rows do not continue the row before, (n,) bool.

    Args:
        obs: (n, *shape).
        next_obs: (n, *shape).
        ids: (n,) of the rows' episodes or environments; None to compare observations.
    """
    starts = np.ones(len(obs), bool)
    if ids is None:
        starts[1:] = (next_obs[:-1] != obs[1:]).any(axis=tuple(range(1, obs.ndim)))
    else:
        starts[1:] = ids[1:] != ids[:-1]
    return starts


def count_environments(
    obs: NDArray[Any], next_obs: NDArray[Any], done: NDArray[np.bool_], ids: NDArray[Any] | None = None
) -> int:
    """Return the number of environments that a flattened batch comes from, as far as its rows show.

    That is the smallest E for which the batch is [E, T] or [T, E] flattened, such that each row of an environment
    continues its row before, unless the episode ended there. Rows with different ids and no end between them belong to
    different environments.

    Args:
        obs: (n, *shape).
        next_obs: (n, *shape).
        done: (n,) bool: the episode is over after this row.
        ids: (n,) of the rows' episodes; None to compare observations.

    Raises:
        ValueError: no E fits, or only E = n without ids, which fits any rows.
    """
    count = len(obs)
    for number in (number for number in range(1, count) if count % number == 0):
        steps = count // number
        if _continue(obs, next_obs, done, ids, 1, steps) or _continue(obs, next_obs, done, ids, number):
            return number
    if count == 1 or (ids is not None and len(np.unique(ids)) == count):
        return count
    raise ValueError(
        f"num_envs: expected to be given, as the first batch of {count} rows does not show how many environments it "
        "comes from; pass num_envs=..., or batches of shape (environments, steps)"
    )


def ids_of_blocks(
    shape: tuple[int, ...],
    obs: NDArray[Any],
    next_obs: NDArray[Any],
    done: NDArray[np.bool_],
    ids: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """Return what identifies the rows of an unflattened batch, (n,): their own ids, or else environment numbers.

    Args:
        shape: batch shape, of which the last axis is time.
        obs: see `count_environments`.
        next_obs: see `count_environments`.
        done: see `count_environments`.
        ids: see `count_environments`.

    Raises:
        ValueError: time is the first axis, not the last.
    """
    steps, count = shape[-1], len(obs)
    if not _continue(obs, next_obs, done, ids, 1, steps) and _continue(obs, next_obs, done, ids, count // shape[0]):
        raise ValueError(
            f"data: expected the shape (environments, steps), got {shape}, where time is the first axis; pass "
            "data.transpose(0, -1)"
        )
    return np.repeat(np.arange(count // steps), steps) if ids is None else ids


def _continue(
    obs: NDArray[Any],
    next_obs: NDArray[Any],
    done: NDArray[np.bool_],
    ids: NDArray[Any] | None,
    distance: int,
    block: int | None = None,
) -> bool:
    """Return whether the row at this distance continues each row whose episode has not ended, within blocks of rows."""
    rows = np.arange(len(obs) - distance)
    if block is not None:
        rows = rows[(rows + distance) % block > 0]
    rows = rows[~done[rows]]
    if ids is not None:
        return bool((ids[rows] == ids[rows + distance]).all())
    parts = (rows[start : start + _ROWS_AT_A_TIME] for start in range(0, len(rows), _ROWS_AT_A_TIME))
    return all(np.array_equal(next_obs[part], obs[part + distance]) for part in parts)

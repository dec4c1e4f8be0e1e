"""What replay buffers return."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Batch(NamedTuple):
    """B sampled transitions.

    `obs` and `next_obs` may be two views of the same memory; treat them as read-only.
    """

    obs: NDArray[Any]  # (B, stack, *frame_shape), the buffer's dtype
    action: NDArray[np.int64]  # (B,)
    reward: NDArray[np.float32]  # (B,): sum of gamma^j r_j over the window, j < k
    discount: NDArray[np.float32]  # (B,): gamma^k, or 0 after termination
    next_obs: NDArray[Any]  # (B, stack, *frame_shape): k steps later
    index: NDArray[np.int64]  # type: ignore[assignment]  # (B,): names the transition; never used again for another one
    weight: NDArray[np.float32]  # (B,): importance weights, at most 1; all 1 when sampling uniformly

    def part(self, start: int, stop: int) -> Batch:
        """Return the transitions from `start` to before `stop`: views of the same memory."""
        return Batch._make(column[start:stop] for column in self)


class Windows(NamedTuple):
    """How the n-step windows of B transitions end."""

    steps: NDArray[np.int64]  # (B,): k, at most n_step
    terminated: NDArray[np.bool_]  # (B,)
    truncated: NDArray[np.bool_]  # (B,): also where the episode stopped within the window without a flag

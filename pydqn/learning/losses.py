"""Losses: pure functions of a batch with one value per sample. The learner weights and averages their slopes.

Names end in their time: `q_tm1` and `a_tm1` before the step, `r_t`, `discount_t` and `q_t` after it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


def td_error(
    q_tm1: Tensor, a_tm1: Tensor, r_t: Tensor, discount_t: Tensor, q_t: Tensor, selector_t: Tensor | None = None
) -> Tensor:
    """Return the temporal-difference error of Q-learning, or of double Q-learning.

    Args:
        q_tm1: (B, A) values of the online network before the step.
        a_tm1: (B,) int64 actions taken.
        r_t: (B,) rewards (n-step: discounted sums).
        discount_t: (B,) factors of the next values: gamma^k, or 0 after termination.
        q_t: (B, A) values of the target network after the step.
        selector_t: (B, A) values whose maximum is the next action: the online network's for double Q-learning
            (van Hasselt et al. 2016, https://arxiv.org/abs/1509.06461); None for `q_t` (Mnih et al. 2015).

    Returns:
        (B,) float32: target minus estimate. No gradient flows through the target.
    """
    if selector_t is None:
        target = torch.addcmul(r_t, discount_t, q_t.amax(dim=1))
    else:
        a_t = selector_t.argmax(dim=1, keepdim=True)
        target = torch.addcmul(r_t, discount_t, q_t.gather(1, a_t).squeeze(1))
    return target.detach() - q_tm1.gather(1, a_tm1.unsqueeze(1)).squeeze(1)


class Loss(NamedTuple):
    """A loss of TD errors and its slope, both (B,) to (B,).

    A learner that has the slope does not need autograd for the loss, which saves about twenty small operations.
    """

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


def huber(error: Tensor, delta: float = 1.0) -> Tensor:
    """Return the Huber loss per sample: quadratic up to `delta`, linear beyond (Huber 1964)."""
    size = error.abs()
    inner = size.clamp(max=delta)
    return inner * (size - 0.5 * inner)


def huber_slope(error: Tensor, delta: float = 1.0) -> Tensor:
    """Return the slope of the Huber loss: the TD error clipped to [-delta, delta], as in Mnih et al. 2015."""
    return error.clamp(-delta, delta)


def mse(error: Tensor) -> Tensor:
    """Return the squared error per sample."""
    return torch.square(error)


def mse_slope(error: Tensor) -> Tensor:
    """Return the slope of the squared error."""
    return 2 * error


LOSSES = {"huber": Loss(huber, huber_slope), "mse": Loss(mse, mse_slope)}

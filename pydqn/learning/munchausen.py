"""Munchausen reinforcement learning: the reward gets a share of the log-policy (Vieillard et al. 2020).

https://arxiv.org/abs/2007.14430, equation 1. The policy is pi = softmax(q / temperature). All functions are pure.
"""

from __future__ import annotations

import torch
from torch import Tensor


def scaled_log_policy(q: Tensor, temperature: float) -> Tensor:
    """Return (B, A) temperature * ln pi of (B, A) action values, without overflow."""
    below_best = q - q.amax(dim=1, keepdim=True)
    return below_best - temperature * torch.logsumexp(below_best * (1 / temperature), dim=1, keepdim=True)


def bonus(q: Tensor, a: Tensor, alpha: float, temperature: float, least: float) -> Tensor:
    """Return (B,) alpha * clip(temperature * ln pi(a), least, 0) of (B, A) action values and (B,) actions."""
    taken = scaled_log_policy(q, temperature).gather(1, a.unsqueeze(1)).squeeze(1)
    return alpha * taken.clamp(least, 0.0)


def soft_value(samples_t: Tensor, q_t: Tensor, temperature: float) -> Tensor:
    """Return sum_a pi(a) (samples(a) - temperature * ln pi(a)), in place of the maximum over actions.

    Args:
        samples_t: (B, A, N) samples of the return of each action; with N = 1 its value.
        q_t: (B, A) action values, of which the policy is made.
        temperature: see the module.

    Returns:
        (B, N) samples of the return of the policy.
    """
    log_policy = scaled_log_policy(q_t, temperature)
    policy = (log_policy * (1 / temperature)).exp()
    return (policy.unsqueeze(2) * (samples_t - log_policy.unsqueeze(2))).sum(dim=1)

"""Targets and losses of distributions of returns: pure functions of a batch, with one loss per sample.

Names end in their time, as in `pydqn.learning.losses`. N is the number of atoms, bins or quantiles of an action value.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def project(support: Tensor, z_t: Tensor, p_t: Tensor) -> Tensor:
    """Move probability masses to the atoms of a support, each to its two neighbours (categorical DQN).

    m_i = sum_j clip(1 - |clip(z_j, z_min, z_max) - z_i| / dz, 0, 1) p_j: Bellemare et al. 2017
    (https://arxiv.org/abs/1707.06887, equation 7). No z_j is rounded to its neighbours, so no mass is lost where z_j is
    an atom.

    Args:
        support: (N,) atoms, evenly spaced and ascending.
        z_t: (B, M) positions of the masses.
        p_t: (B, M) masses.

    Returns:
        (B, N) masses of the atoms.
    """
    count = len(support)
    low, high = support[0], support[-1]
    position = (z_t.clamp(low, high) - low) * ((count - 1) / (high - low))  # in atoms, so that neighbours add up to 1
    index = torch.arange(count, dtype=position.dtype, device=position.device)
    near = (1 - (position.unsqueeze(1) - index.unsqueeze(1)).abs()).clamp(min=0)  # (B, N, M)
    return (near @ p_t.unsqueeze(2)).squeeze(2)


def histogram_of(edges: Tensor, y_t: Tensor, sigma: float) -> Tensor:
    """Return the masses of a normal distribution in bins, cut off at both ends of the support (HL-Gauss).

    p_i = (F(e_{i+1}) - F(e_i)) / (F(e_N) - F(e_0)), where F(x) = erf((x - y) / (sqrt(2) sigma)): Imani and White 2018;
    Farebrother et al. 2024, Stop Regressing (https://arxiv.org/abs/2403.03950, section 3.1).

    Args:
        edges: (N + 1,) edges of the bins, ascending.
        y_t: (B,) centres; those outside of the support count as its ends.
        sigma: standard deviation, in the units of the edges.

    Returns:
        (B, N) masses with the sum 1.
    """
    centre = y_t.clamp(edges[0], edges[-1]).unsqueeze(1)
    below = torch.erf((edges - centre) * (1 / (math.sqrt(2) * sigma)))
    return (below[:, 1:] - below[:, :-1]) / (below[:, -1:] - below[:, :1])


def cross_entropy(logits: Tensor, p: Tensor) -> Tensor:
    """Return (B,) cross entropies -sum_i p_i ln softmax(logits)_i of (B, N) logits and (B, N) masses."""
    return -(p * logits.log_softmax(dim=1)).sum(dim=1)


def quantile_huber(q_tm1: Tensor, tau: Tensor, target: Tensor, kappa: float = 1.0) -> Tensor:
    """Return the quantile Huber loss: the sum over estimated quantiles i of the mean over targets j of rho_i(u_ij).

    rho_i(u) = |tau_i - 1{u < 0}| L(u) / kappa, where u_ij = target_j - q_i and L is the Huber loss that becomes linear
    at kappa: Dabney et al. 2018 (https://arxiv.org/abs/1710.10044, equation 10). With kappa 0, rho_i(u) = |tau_i -
    1{u < 0}| |u|.

    Args:
        q_tm1: (B, N) estimated quantiles of the actions taken.
        tau: (B, N) or (N,) the levels of these quantiles, between 0 and 1.
        target: (B, M) samples of the target.
        kappa: see above.

    Returns:
        (B,) losses.
    """
    error = target.unsqueeze(1) - q_tm1.unsqueeze(2)  # (B, N, M)
    size = error.abs()
    if kappa:
        inner = size.clamp(max=kappa)
        size = inner * (size - 0.5 * inner) * (1 / kappa)
    tau = tau.expand_as(q_tm1).unsqueeze(2)
    return ((tau - (error.detach() < 0).to(tau.dtype)).abs() * size).mean(dim=2).sum(dim=1)

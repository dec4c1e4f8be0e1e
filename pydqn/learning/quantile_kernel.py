"""The quantile Huber loss and its slope in one pass on a CPU; `pydqn.learning.distributions` has the formula.

With 200 quantiles, a sample has 40,000 pairs. PyTorch would write and read tensors of them some fifteen times.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pydqn._util.jit import kernel
from pydqn.learning.distributions import quantile_huber
from pydqn.learning.pixels import is_traced


def quantile_huber_and_errors(q_tm1: Tensor, tau: Tensor, target: Tensor, kappa: float) -> tuple[Tensor, Tensor]:
    """Return (B,) quantile Huber losses, with a gradient for `q_tm1`, and (B,) sums of absolute errors, without.

    Args:
        q_tm1: (B, N) estimated quantiles.
        tau: (B, N) their levels.
        target: (B, M) samples of the target, without a gradient.
        kappa: see `quantile_huber`.

    Returns:
        The losses, and sum_i mean_j |target_j - q_i|.
    """
    tensors = (q_tm1, tau, target)
    if any(tensor.device.type != "cpu" or tensor.dtype != torch.float32 for tensor in tensors) or is_traced():
        errors = (target.unsqueeze(1) - q_tm1.detach().unsqueeze(2)).abs().mean(dim=2).sum(dim=1)
        return quantile_huber(q_tm1, tau, target, kappa), errors
    losses, errors = _OnePass.apply(q_tm1, tau, target, kappa)
    return losses, errors


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_tm1: Tensor, tau: Tensor, target: Tensor, kappa: float) -> tuple[Tensor, Tensor]:
        losses, errors = torch.empty((2, len(q_tm1)), device="cpu")
        slopes = torch.empty(q_tm1.shape, device="cpu")
        arrays = (np.ascontiguousarray(tensor.detach().numpy()) for tensor in (q_tm1, tau, target))
        _pairs(*arrays, np.float32(kappa), losses.numpy(), errors.numpy(), slopes.numpy())
        ctx.save_for_backward(slopes)
        ctx.mark_non_differentiable(errors)
        return losses, errors

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return gradients[0].unsqueeze(1) * slopes, None, None, None


@kernel(nogil=True, fastmath={"reassoc", "contract"}, error_model="numpy")  # sums in any order; NaN stays NaN
def _of_quantile(q, tau, targets, kappa):
    """Return the sums over all targets of the losses, their slopes in q, and the absolute errors."""
    loss, slope, total = np.float32(0), np.float32(0), np.float32(0)
    over, under = tau, np.float32(1) - tau
    for j in range(targets.size):
        error = targets[j] - q
        weight = under if error < 0 else over
        size = abs(error)
        inner = min(size, kappa)
        loss += weight * inner * (size - np.float32(0.5) * inner)
        slope -= weight * max(-kappa, min(error, kappa))
        total += size
    return loss, slope, total


@kernel(nogil=True, fastmath={"reassoc", "contract"}, error_model="numpy")
def _of_quantile_without_kappa(q, tau, targets):
    loss, slope, total = np.float32(0), np.float32(0), np.float32(0)
    over, under = tau, np.float32(1) - tau
    for j in range(targets.size):
        error = targets[j] - q
        weight = under if error < 0 else over
        size = abs(error)
        loss += weight * size
        slope -= over if error > 0 else (-under if error < 0 else np.float32(0))
        total += size
    return loss, slope, total


@kernel(nogil=True, error_model="numpy")
def _pairs(q, tau, target, kappa, losses, errors, slopes):
    mean = np.float32(1) / np.float32(target.shape[1])
    scale = mean / kappa if kappa > 0 else mean
    for b in range(q.shape[0]):
        losses[b], errors[b] = np.float32(0), np.float32(0)
        for i in range(q.shape[1]):
            if kappa > 0:
                loss, slope, total = _of_quantile(q[b, i], tau[b, i], target[b], kappa)
            else:
                loss, slope, total = _of_quantile_without_kappa(q[b, i], tau[b, i], target[b])
            losses[b] += loss * scale
            errors[b] += total * mean
            slopes[b, i] = slope * scale

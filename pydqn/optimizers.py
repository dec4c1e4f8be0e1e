"""The two RMSProps of the DQN literature that PyTorch does not have."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor


class RMSProp(torch.optim.Optimizer):
    """RMSProp with epsilon inside the root; PyTorch's own adds it outside.

    With s the running mean of g^2, and m that of g where `centered` (else 0), both with factor `decay`:

        d <- momentum * d + lr * g / sqrt(s - m^2 + eps)
        parameter <- parameter - d

    Plain, with s starting at 1, it is TensorFlow's (`tf.compat.v1.train.RMSPropOptimizer`). Centered, from 0, with
    momentum 0, it is that of Graves 2013 (https://arxiv.org/abs/1308.0850, section 4.2) as Mnih et al. 2015 use it, who
    call `decay` of the two means "gradient momentum" and "squared gradient momentum", and eps the "min squared
    gradient".

    No step waits for a CUDA device, and all of it can be captured in a graph; `lr` may be a tensor.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float | Tensor,
        decay: float,
        eps: float,
        *,
        momentum: float = 0.0,
        centered: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "decay": decay, "eps": eps, "momentum": momentum, "centered": centered})
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if centered:
                    state["square"] = torch.zeros_like(parameter)
                    state["mean"] = torch.zeros_like(parameter)
                else:
                    state["square"] = torch.ones_like(parameter)
                if momentum:
                    state["change"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Change the parameters that have a gradient."""
        assert closure is None
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters and parameters[0].device.type == "cpu":
                for parameter in parameters:
                    self._step_on_cpu(parameter, group)
            elif parameters:
                self._step_on_gpu(parameters, group)

    def _step_on_gpu(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """A few kernels for all parameters together."""
        grads: Any = [parameter.grad for parameter in parameters]
        states: list[dict[str, Tensor]] = [self.state[parameter] for parameter in parameters]
        squares = [state["square"] for state in states]
        torch._foreach_mul_(squares, group["decay"])
        torch._foreach_addcmul_(squares, grads, grads, 1 - group["decay"])
        if group["centered"]:
            means = [state["mean"] for state in states]
            torch._foreach_lerp_(means, grads, 1 - group["decay"])
            roots: Any = torch._foreach_addcmul(squares, means, means, -1)
            torch._foreach_add_(roots, group["eps"])
        else:
            roots = torch._foreach_add(squares, group["eps"])
        torch._foreach_sqrt_(roots)
        changes: Any = torch._foreach_div(grads, roots)
        torch._foreach_mul_(changes, group["lr"])
        if group["momentum"]:
            kept = [state["change"] for state in states]
            torch._foreach_mul_(kept, group["momentum"])
            torch._foreach_add_(kept, changes)
            changes = kept
        torch._foreach_sub_(parameters, changes)

    def _step_on_cpu(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """One pass over the memory, where each of the kernels above would make one."""
        assert parameter.grad is not None
        state, grad = self.state[parameter], parameter.grad
        if grad.stride() != parameter.stride():
            grad = torch.empty_like(parameter).copy_(grad)
        tensors = [parameter, grad, state["square"], state.get("mean"), state.get("change")]
        numbers = [np.float32(group[name]) for name in ("lr", "decay", "eps", "momentum")]
        _update(*map(_in_memory_order, tensors), *numbers)


_NONE = np.zeros(0, np.float32)


def _in_memory_order(tensor: Tensor | None) -> NDArray[np.float32]:
    """Return a dense tensor as the row of numbers that it is in memory, or nothing."""
    if tensor is None:
        return _NONE
    if not tensor.is_contiguous():  # then it is channels-last
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.detach().view(-1).numpy()


@njit(cache=True, nogil=True, error_model="numpy")
def _update(parameter, grad, square, mean, change, lr, decay, eps, momentum):
    one = np.float32(1)
    for i in range(parameter.size):
        g = grad[i]
        s = square[i] * decay + (one - decay) * g * g
        square[i] = s
        if mean.size:
            m = mean[i] + (one - decay) * (g - mean[i])
            mean[i] = m
            s -= m * m
        d = lr * g / np.sqrt(s + eps)
        if change.size:
            d += momentum * change[i]
            change[i] = d
        parameter[i] -= d

"""Optimizers: PyTorch's kernels on a GPU, one pass over the parameters on a CPU.

With g the gradient (scaled down to the largest norm), lr the learning rate, t the number of steps in which a parameter
had a gradient, and m, s and d starting at 0 unless said otherwise:

    adam              m <- m + (1 - beta1) (g - m)
                      s <- beta2 s + (1 - beta2) g^2
                      parameter <- parameter - lr / (1 - beta1^t) m / (sqrt(s / (1 - beta2^t)) + epsilon)
    adamw             parameter <- (1 - lr weight_decay) parameter, and then as adam
    rmsprop           s <- decay s + (1 - decay) g^2
                      d <- momentum d + g / (sqrt(s) + epsilon)
                      parameter <- parameter - lr d
    rmsprop_tf        s as in rmsprop, but starting at 1
                      d <- momentum d + lr g / sqrt(s + epsilon)
                      parameter <- parameter - d
    rmsprop_centered  m <- m + (1 - decay) (g - m), and s as in rmsprop
                      d <- momentum d + lr g / sqrt(s - m^2 + epsilon)
                      parameter <- parameter - d

These are `torch.optim.Adam`, `torch.optim.AdamW` (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101),
`torch.optim.RMSprop`, TensorFlow's `tf.compat.v1.train.RMSPropOptimizer`, and with momentum 0 that of Graves 2013
(https://arxiv.org/abs/1308.0850, section 4.2) as Mnih et al. 2015 use it, who call `decay` of the two means "gradient
momentum" and "squared gradient momentum", and epsilon "min squared gradient".

Parameters are float32. If a network computes in bfloat16, its layers have copies of the parameters in bfloat16 (see
`networks.mixed_precision_copy`): gradients are those of the copies, and each step rounds the new parameters into them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pydqn.learning.optimizer_kernels import BETA1, BETA2, adam, float32_to_bfloat16, rmsprop, sum_of_squares


class OptimizerSettings(NamedTuple):
    """What defines an optimizer, except for its learning rate."""

    name: str  # adam | adamw | rmsprop | rmsprop_tf | rmsprop_centered
    epsilon: float
    decay: float = 0.95  # (RMSProp)
    momentum: float = 0.0  # (RMSProp)
    weight_decay: float = 0.0  # (AdamW)


OptimizerState = list[dict[str, Tensor]]  # of each parameter, by name


class Optimizer(Protocol):
    """Changes the parameters of one network, and their copies."""

    def step(self, max_norm: float) -> Callable[[], Tensor]:
        """Scale the gradient down to `max_norm` (infinity leaves it) and take a step.

        A parameter without a gradient stays as it is.

        Returns:
            A function that returns the norm before scaling, of the latest gradient in the same tensors: where nothing
            is scaled, the norm is computed only if somebody asks.
        """

    def refresh(self) -> None:
        """Round the parameters into their copies, after they were changed by anything but `step`."""

    def state(self) -> OptimizerState:
        """Return the optimizer's own tensors, not copies of them."""

    def load_state(self, state: OptimizerState) -> None:
        """Go on from what `state` returned."""


def make_optimizer(
    settings: OptimizerSettings, parameters: Sequence[Tensor], copies: Sequence[Tensor], learning_rate: Tensor
) -> Optimizer:
    """Build the optimizer for the parameters' device.

    Args:
        settings: the method and its numbers.
        parameters: float32, dense in memory (contiguous or channels-last).
        copies: for each parameter, the parameter itself or its copy in bfloat16, in the same memory layout.
        learning_rate: one number on the parameters' device, read at each step.

    Raises:
        ValueError: a parameter is not float32.
    """
    for parameter in parameters:
        if parameter.dtype != torch.float32:
            raise ValueError(f"network: expected float32 parameters, got {parameter.dtype}")
    kind = OnePassOptimizer if learning_rate.device.type == "cpu" else TorchOptimizer
    return kind(settings, parameters, copies, learning_rate)


class TorchOptimizer:
    """PyTorch's fused or foreach kernels, for all parameters together.

    No step waits for the device, and a step can be captured in a CUDA graph.
    """

    def __init__(
        self, settings: OptimizerSettings, parameters: Sequence[Tensor], copies: Sequence[Tensor], learning_rate: Tensor
    ) -> None:
        self._parameters = list(parameters)
        self._copied = [(p, c) for p, c in zip(parameters, copies, strict=True) if p is not c]
        self._learning_rate = learning_rate
        self._optimizer: torch.optim.Optimizer
        on_gpu = learning_rate.device.type == "cuda"
        name, epsilon, decay, momentum, weight_decay = settings
        if name in ("adam", "adamw"):
            kind = torch.optim.Adam if name == "adam" else torch.optim.AdamW
            self._optimizer = kind(
                self._parameters,
                lr=learning_rate,
                eps=epsilon,
                weight_decay=weight_decay,
                fused=True,
                capturable=on_gpu,
            )
        elif name == "rmsprop":
            self._optimizer = torch.optim.RMSprop(
                self._parameters,
                lr=learning_rate,
                alpha=decay,
                eps=epsilon,
                momentum=momentum,
                foreach=True,
                capturable=on_gpu,
            )
        else:
            centered = name == "rmsprop_centered"
            self._optimizer = RMSProp(
                self._parameters, learning_rate, decay, epsilon, momentum=momentum, centered=centered
            )

    def step(self, max_norm: float) -> Callable[[], Tensor]:
        """See `Optimizer`."""
        for parameter, copy in self._copied:
            parameter.grad = None if copy.grad is None else copy.grad.to(torch.float32)
        grads = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norm = functools.partial(nn.utils.get_total_norm, grads, foreach=True)
        if max_norm < math.inf:
            total = norm()
            nn.utils.clip_grads_with_norm_(self._parameters, max_norm, total, foreach=True)
            norm = functools.partial(torch.Tensor.detach, total)
        self._optimizer.step()
        self.refresh()
        return norm

    def refresh(self) -> None:
        """See `Optimizer`."""
        if self._copied:
            with torch.no_grad():
                torch._foreach_copy_([copy for _, copy in self._copied], [parameter for parameter, _ in self._copied])

    def state(self) -> OptimizerState:
        """See `Optimizer`."""
        return [self._optimizer.state.get(parameter, {}) for parameter in self._parameters]

    def load_state(self, state: OptimizerState) -> None:
        """See `Optimizer`."""
        whole = self._optimizer.state_dict()
        # A parameter without saved state keeps its initial state.
        whole["state"] |= {
            number: {
                # In the parameter's memory layout, which a file does not keep.
                name: torch.empty_like(like).copy_(value) if value.shape == like.shape else value.to(like.device)
                for name, value in tensors.items()
            }
            for number, (tensors, like) in enumerate(zip(state, self._parameters, strict=True))
            if tensors
        }
        self._optimizer.load_state_dict(whole)
        # `load_state_dict` copies the learning rate; it has to be the tensor that the learner sets.
        self._optimizer.param_groups[0]["lr"] = self._learning_rate


class RMSProp(torch.optim.Optimizer):
    """The RMSProps with epsilon inside the root, which PyTorch lacks: rmsprop_tf, or rmsprop_centered."""

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
                self.state[parameter].update(_rmsprop_state(parameter, 0.0 if centered else 1.0, centered, momentum))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Change the parameters that have a gradient."""
        assert closure is None
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            grads: Any = [parameter.grad for parameter in parameters]
            states: list[dict[str, Tensor]] = [self.state[parameter] for parameter in parameters]
            squares = [state["square_avg"] for state in states]
            torch._foreach_mul_(squares, group["decay"])
            torch._foreach_addcmul_(squares, grads, grads, 1 - group["decay"])
            if group["centered"]:
                means = [state["grad_avg"] for state in states]
                torch._foreach_lerp_(means, grads, 1 - group["decay"])
                roots: Any = torch._foreach_addcmul(squares, means, means, -1)
                torch._foreach_add_(roots, group["eps"])
            else:
                roots = torch._foreach_add(squares, group["eps"])
            torch._foreach_sqrt_(roots)
            changes: Any = torch._foreach_div(grads, roots)
            torch._foreach_mul_(changes, group["lr"])
            if group["momentum"]:
                kept = [state["momentum_buffer"] for state in states]
                torch._foreach_mul_(kept, group["momentum"])
                torch._foreach_add_(kept, changes)
                changes = kept
            torch._foreach_sub_(parameters, changes)


def _rmsprop_state(parameter: Tensor, square: float, centered: bool, momentum: float) -> dict[str, Tensor]:
    """Return the initial s, m and d of a parameter, under PyTorch's names."""
    state = {"square_avg": torch.full_like(parameter, square)}
    if centered:
        state["grad_avg"] = torch.zeros_like(parameter)
    if momentum:
        state["momentum_buffer"] = torch.zeros_like(parameter)
    return state


class OnePassOptimizer:
    """A whole step in one pass over the parameters on a CPU; PyTorch makes a pass for each operation."""

    def __init__(
        self, settings: OptimizerSettings, parameters: Sequence[Tensor], copies: Sequence[Tensor], learning_rate: Tensor
    ) -> None:
        self._settings = settings
        self._learning_rate = learning_rate
        self._copies = list(copies)
        self._steps = [0] * len(self._copies)  # of each parameter; as in PyTorch, only those with a gradient
        self._state: OptimizerState = []
        # The tensors never move, so NumPy's views of them are made once.
        self._views: list[tuple[NDArray[Any], ...]] = []
        none, none16 = np.zeros(0, np.float32), np.zeros(0, np.uint16)
        for parameter, copy in zip(parameters, copies, strict=True):
            rounded = none16 if copy is parameter else _row(copy)
            if settings.name in ("adam", "adamw"):
                state = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                views = [*map(_row, state.values())]
            else:
                square = 1.0 if settings.name == "rmsprop_tf" else 0.0
                state = _rmsprop_state(parameter, square, settings.name == "rmsprop_centered", settings.momentum)
                names = ("square_avg", "grad_avg", "momentum_buffer")
                views = [_row(state[name]) if name in state else none for name in names]
            self._views.append((_row(parameter), rounded, *views))
            self._state.append(state)

    def step(self, max_norm: float) -> Callable[[], Tensor]:
        """See `Optimizer`."""
        grads = [None if copy.grad is None else _row(_in_layout(copy.grad, copy)) for copy in self._copies]
        norm = math.sqrt(sum(sum_of_squares(grad) for grad in grads if grad is not None))
        # As PyTorch clips: with a limit, a norm of NaN makes all gradients NaN.
        scale = max_norm / (norm + 1e-6) if max_norm < math.inf else 1.0
        scale = 1.0 if scale > 1 else scale
        rate = float(self._learning_rate)
        kernel: Callable[..., None] = adam if self._settings.name in ("adam", "adamw") else rmsprop
        numbers: dict[int, list[np.float32]] = {}  # by the number of steps, which parameters usually share
        for index, (grad, views) in enumerate(zip(grads, self._views, strict=True)):
            if grad is not None:
                self._steps[index] += 1
                steps = self._steps[index]
                if steps not in numbers:
                    numbers[steps] = [np.float32(number) for number in self._numbers(scale, rate, steps)]
                kernel(grad, *views, *numbers[steps])
        return lambda: torch.tensor(norm, device="cpu")

    def _numbers(self, scale: float, rate: float, steps: int) -> list[float]:
        """Return the kernel's scalar arguments for step number `steps` of a parameter."""
        name, epsilon, decay, momentum, weight_decay = self._settings
        if name in ("adam", "adamw"):
            kept = 1 - rate * weight_decay
            return [scale, rate / (1 - BETA1**steps), math.sqrt(1 - BETA2**steps), epsilon, kept]
        outside = name == "rmsprop"  # epsilon outside the root, and the rate after the momentum
        rate_before, rate_after = (1.0, rate) if outside else (rate, 1.0)
        return [scale, rate_before, rate_after, decay, epsilon, momentum, outside]

    def refresh(self) -> None:
        """See `Optimizer`."""
        for parameter, copy, *_ in self._views:
            float32_to_bfloat16(parameter.view(np.uint32), copy)

    def state(self) -> OptimizerState:
        """See `Optimizer`."""
        return [
            {**state, "step": torch.tensor(float(steps), device="cpu")} if steps else {}
            for state, steps in zip(self._state, self._steps, strict=True)
        ]

    def load_state(self, state: OptimizerState) -> None:
        """See `Optimizer`."""
        for index, (ours, theirs) in enumerate(zip(self._state, state, strict=True)):
            if theirs:  # `RMSProp` does not count its steps, but has taken at least one
                self._steps[index] = int(theirs.get("step", 1))
            for name in ours.keys() & theirs.keys():
                ours[name].copy_(theirs[name])


def _in_layout(grad: Tensor, like: Tensor) -> Tensor:
    return grad if grad.stride() == like.stride() else torch.empty_like(like).copy_(grad)


def _row(tensor: Tensor) -> NDArray[Any]:
    """Return a dense tensor's numbers in their order in memory, as a one-dimensional view; bfloat16 as its bits."""
    if not tensor.is_contiguous():  # then it is channels-last
        tensor = tensor.permute(0, 2, 3, 1)
    row = tensor.detach().view(-1)
    return row.view(torch.int16).numpy().view(np.uint16) if row.dtype == torch.bfloat16 else row.numpy()

"""Optimizers: one pass over the memory on a CPU, PyTorch's kernels on a GPU, and the RMSProps that PyTorch lacks.

Parameters are float32. Where a network computes in bfloat16, layers have copies of their parameters in it (see
`networks.lowered`): gradients are read from the copies, and each step rounds the new parameters into them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pydqn.learning.optimizer_kernels import BETA1, BETA2, adam, narrow, rmsprop, sum_of_squares


class Settings(NamedTuple):
    """What defines an optimizer, but for its learning rate."""

    name: str  # adam | rmsprop (PyTorch's) | rmsprop_tf | rmsprop_centered (both as `RMSProp`)
    epsilon: float
    decay: float = 0.95  # of the running mean of squares (RMSProp)
    momentum: float = 0.0  # (RMSProp)


State = list[dict[str, Tensor]]  # of each parameter, by name


class Optimizer(Protocol):
    """Steps the parameters of one network, and their copies."""

    def step(self, max_norm: float) -> Tensor:
        """Scale the gradient down to `max_norm` (infinity leaves it) and take a step; returns the norm before.

        A parameter without a gradient stays.
        """

    def refresh(self) -> None:
        """Round the parameters into their copies, after someone else has changed them."""

    def state(self) -> State:
        """Return the tensors that make up its memory, not copies of them."""

    def restore(self, state: State) -> None:
        """Go on from what `state` gave."""


def make_optimizer(
    settings: Settings, parameters: Sequence[Tensor], copies: Sequence[Tensor], learning_rate: Tensor
) -> Optimizer:
    """Build the optimizer for the parameters' device.

    Args:
        settings: which, and how.
        parameters: float32, dense in memory (contiguous or channels-last).
        copies: as many; each the parameter itself or its copy in bfloat16, in the same memory layout.
        learning_rate: one number on the parameters' device, read at each step.

    Raises:
        ValueError: a parameter is not float32.
    """
    for parameter in parameters:
        if parameter.dtype != torch.float32:
            raise ValueError(f"network: expected float32 parameters, got {parameter.dtype}")
    kind = OnePass if learning_rate.device.type == "cpu" else Kernels
    return kind(settings, parameters, copies, learning_rate)


# --- GPU: a few kernels for all parameters together ---


class Kernels:
    """PyTorch's fused or foreach kernels. No step waits for the device, and all of it can be captured in a graph."""

    def __init__(
        self, settings: Settings, parameters: Sequence[Tensor], copies: Sequence[Tensor], learning_rate: Tensor
    ) -> None:
        self._parameters = list(parameters)
        self._apart = [(p, c) for p, c in zip(parameters, copies, strict=True) if p is not c]
        self._learning_rate = learning_rate
        self._optimizer: torch.optim.Optimizer
        on_gpu = learning_rate.device.type == "cuda"
        name, epsilon, decay, momentum = settings
        if name == "adam":
            self._optimizer = torch.optim.Adam(
                self._parameters, lr=learning_rate, eps=epsilon, fused=True, capturable=on_gpu
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

    def step(self, max_norm: float) -> Tensor:
        """See `Optimizer`."""
        for parameter, copy in self._apart:
            parameter.grad = None if copy.grad is None else copy.grad.to(torch.float32)
        grads = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norm = nn.utils.get_total_norm(grads, foreach=True)
        if max_norm < math.inf:
            nn.utils.clip_grads_with_norm_(self._parameters, max_norm, norm, foreach=True)
        self._optimizer.step()
        self.refresh()
        return norm

    def refresh(self) -> None:
        """See `Optimizer`."""
        if self._apart:
            with torch.no_grad():
                torch._foreach_copy_([copy for _, copy in self._apart], [parameter for parameter, _ in self._apart])

    def state(self) -> State:
        """See `Optimizer`."""
        return [self._optimizer.state.get(parameter, {}) for parameter in self._parameters]

    def restore(self, state: State) -> None:
        """See `Optimizer`."""
        whole = self._optimizer.state_dict()
        # A parameter of which nothing was saved keeps what its memory began with.
        whole["state"] |= {
            number: {
                # In the parameter's own memory layout, which a file does not keep.
                name: torch.empty_like(like).copy_(value) if value.shape == like.shape else value.to(like.device)
                for name, value in tensors.items()
            }
            for number, (tensors, like) in enumerate(zip(state, self._parameters, strict=True))
            if tensors
        }
        self._optimizer.load_state_dict(whole)
        # Loading copies: the learning rate must be the very tensor that is set each step.
        self._optimizer.param_groups[0]["lr"] = self._learning_rate


class RMSProp(torch.optim.Optimizer):
    """RMSProp with epsilon inside the root; PyTorch's own adds it outside.

    With s the running mean of g^2, and m that of g where `centered` (else 0), both with factor `decay`:

        d <- momentum * d + lr * g / sqrt(s - m^2 + eps)
        parameter <- parameter - d

    Plain, with s starting at 1, it is TensorFlow's (`tf.compat.v1.train.RMSPropOptimizer`). Centered, from 0, with
    momentum 0, it is that of Graves 2013 (https://arxiv.org/abs/1308.0850, section 4.2) as Mnih et al. 2015 use it, who
    call `decay` of the two means "gradient momentum" and "squared gradient momentum", and eps the "min squared
    gradient".
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
                self.state[parameter].update(_memory(parameter, 0.0 if centered else 1.0, centered, momentum))

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


def _memory(parameter: Tensor, square: float, centered: bool, momentum: float) -> dict[str, Tensor]:
    """What RMSProp remembers of a parameter, under PyTorch's names."""
    memory = {"square_avg": torch.full_like(parameter, square)}
    if centered:
        memory["grad_avg"] = torch.zeros_like(parameter)
    if momentum:
        memory["momentum_buffer"] = torch.zeros_like(parameter)
    return memory


# --- CPU: one pass ---


class OnePass:
    """All of a step in one pass over the memory; a kernel per operation would make a pass each.

    The formulas are those of `torch.optim.Adam`, `torch.optim.RMSprop` and `RMSProp`.
    """

    def __init__(
        self, settings: Settings, parameters: Sequence[Tensor], copies: Sequence[Tensor], learning_rate: Tensor
    ) -> None:
        self._settings = settings
        self._learning_rate = learning_rate
        self._copies = list(copies)
        self._steps = [0] * len(self._copies)  # of each parameter, as PyTorch counts them: those with a gradient
        self._state: State = []
        # The memory never moves, so NumPy's views of it are made once.
        self._views: list[tuple[NDArray[Any], ...]] = []
        none, none16 = np.zeros(0, np.float32), np.zeros(0, np.uint16)
        for parameter, copy in zip(parameters, copies, strict=True):
            rounded = none16 if copy is parameter else _row(copy)
            if settings.name == "adam":
                state = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                views = [*map(_row, state.values())]
            else:
                square = 1.0 if settings.name == "rmsprop_tf" else 0.0
                state = _memory(parameter, square, settings.name == "rmsprop_centered", settings.momentum)
                names = ("square_avg", "grad_avg", "momentum_buffer")
                views = [_row(state[name]) if name in state else none for name in names]
            self._views.append((_row(parameter), rounded, *views))
            self._state.append(state)

    def step(self, max_norm: float) -> Tensor:
        """See `Optimizer`."""
        grads = [None if copy.grad is None else _row(_laid_out(copy.grad, copy)) for copy in self._copies]
        norm = math.sqrt(sum(sum_of_squares(grad) for grad in grads if grad is not None))
        # As PyTorch clips: a norm that is not a number spoils all gradients, one without a limit none.
        scale = max_norm / (norm + 1e-6) if max_norm < math.inf else 1.0
        scale = 1.0 if scale > 1 else scale
        rate = float(self._learning_rate)
        kernel: Callable[..., None] = adam if self._settings.name == "adam" else rmsprop
        numbers: dict[int, list[np.float32]] = {}  # by the number of steps, mostly the same for all parameters
        for index, (grad, views) in enumerate(zip(grads, self._views, strict=True)):
            if grad is not None:
                self._steps[index] += 1
                steps = self._steps[index]
                if steps not in numbers:
                    numbers[steps] = [np.float32(number) for number in self._numbers(scale, rate, steps)]
                kernel(grad, *views, *numbers[steps])
        return torch.tensor(norm, device="cpu")

    def _numbers(self, scale: float, rate: float, steps: int) -> list[float]:
        """Return what the kernel needs beside arrays, for a parameter's `steps`th step."""
        name, epsilon, decay, momentum = self._settings
        if name == "adam":
            return [scale, rate / (1 - BETA1**steps), math.sqrt(1 - BETA2**steps), epsilon]
        # PyTorch applies the rate behind the momentum, the others before it.
        within, behind = (1.0, rate) if name == "rmsprop" else (rate, 1.0)
        return [scale, within, behind, decay, epsilon, momentum, name == "rmsprop"]

    def refresh(self) -> None:
        """See `Optimizer`."""
        for parameter, copy, *_ in self._views:
            narrow(parameter.view(np.uint32), copy)

    def state(self) -> State:
        """See `Optimizer`."""
        return [
            {**state, "step": torch.tensor(float(steps), device="cpu")} if steps else {}
            for state, steps in zip(self._state, self._steps, strict=True)
        ]

    def restore(self, state: State) -> None:
        """See `Optimizer`."""
        for index, (ours, theirs) in enumerate(zip(self._state, state, strict=True)):
            if theirs:  # `RMSProp` does not count its steps, but it has taken some
                self._steps[index] = int(theirs.get("step", 1))
            for name in ours.keys() & theirs.keys():
                ours[name].copy_(theirs[name])


def _laid_out(grad: Tensor, like: Tensor) -> Tensor:
    return grad if grad.stride() == like.stride() else torch.empty_like(like).copy_(grad)


def _row(tensor: Tensor) -> NDArray[Any]:
    """Return a dense tensor as the row of numbers that it is in memory; bfloat16 as its bits."""
    if not tensor.is_contiguous():  # then it is channels-last
        tensor = tensor.permute(0, 2, 3, 1)
    row = tensor.detach().view(-1)
    return row.view(torch.int16).numpy().view(np.uint16) if row.dtype == torch.bfloat16 else row.numpy()

"""A lower bound of the time of an update: its arithmetic alone, at the measured speed of the machine.

It is the time of the floating-point operations of the forward and backward passes at the rate of matrix products, and
of the bytes that Adam reads and writes at the rate of copies.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

# Adam reads a parameter, its gradient and two running means, and writes all except the gradient, in float32.
ADAM_BYTES = 7 * 4
SIDE = 1024  # of the matrices: large enough for the full rate, small enough for the caches


class UpdateLimit:
    """A lower bound of an update of Q-learning with Adam.

    Args:
        network: a module from (batch, 4, 84, 84) to action values; its copy is the target network.
        batch: transitions per update.
        dtype: of the arithmetic.
    """

    def __init__(self, network: torch.nn.Module, batch: int, dtype: torch.dtype) -> None:
        obs = torch.zeros(batch, 4, 84, 84)
        with FlopCounterMode(display=False) as counter:
            with torch.no_grad():
                network(obs)  # the target network's pass
            network(obs).sum().backward()
        network.zero_grad()
        parameters = sum(parameter.numel() for parameter in network.parameters())
        self.flops = counter.get_total_flops()
        self.bytes = parameters * ADAM_BYTES
        self._left, self._right = (torch.rand(SIDE, SIDE).to(dtype) for _ in range(2))
        self._out = torch.empty(SIDE, SIDE, dtype=dtype)
        self._from = torch.zeros(4 * parameters)  # as large as what Adam works on
        self._to = torch.empty_like(self._from)

    def seconds(self) -> float:
        """Measure the two rates with PyTorch's current threads, and return the sum of both times."""
        multiply = _median(lambda: torch.mm(self._left, self._right, out=self._out))
        copy = _median(lambda: self._to.copy_(self._from))
        copied = 2 * self._from.nbytes  # read and written
        return self.flops * multiply / (2 * SIDE**3) + self.bytes * copy / copied


def _median(call, calls: int = 15) -> float:
    spent = []
    for number in range(calls + 2):
        started = time.perf_counter()
        call()
        if number >= 2:
            spent.append(time.perf_counter() - started)
    return float(np.median(spent))

"""One RMSProp step on the parameters of Nature's network: our one pass, its kernels for a GPU, and PyTorch's own."""

from __future__ import annotations

import pytest
import torch

from pydqn.networks import make_network
from pydqn.optimizers import RMSProp


def make(kind, centered):
    parameters = list(make_network("nature", 4, (84, 84), 4).to(memory_format=torch.channels_last).parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    if kind == "pytorch":
        optimizer = torch.optim.RMSprop(parameters, 1e-4, alpha=0.95, eps=0.01, centered=centered)
        return parameters, optimizer.step
    optimizer = RMSProp(parameters, 1e-4, decay=0.95, eps=0.01, centered=centered)
    if kind == "one pass":
        return parameters, optimizer.step
    group = optimizer.param_groups[0]

    def kernels():
        with torch.no_grad():
            optimizer._step_on_gpu(group["params"], group)

    return parameters, kernels


@pytest.mark.parametrize("centered", [False, True], ids=["tensorflow", "centered"])
@pytest.mark.parametrize("kind", ["one pass", "kernels", "pytorch"])
def bench_rmsprop(benchmark, kind, centered):
    parameters, step = make(kind, centered)
    before = parameters[0].detach().clone()
    benchmark(step)
    assert not torch.equal(before, parameters[0])
    if kind != "pytorch":  # the answer: after as many steps, both of ours are in the same place
        (one, step_one), (many, step_many) = make("one pass", centered), make("kernels", centered)
        for theirs, ours in zip(many, one, strict=True):
            theirs.data.copy_(ours.data)
            theirs.grad.copy_(ours.grad)
        for _ in range(3):
            step_one()
            step_many()
        for ours, theirs in zip(one, many, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)

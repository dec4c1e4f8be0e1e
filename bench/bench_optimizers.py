"""One step on the parameters of Nature's network: in one pass, and with PyTorch's kernels."""

from __future__ import annotations

import pytest
import torch

from pydqn.learning.networks import make_network, mixed_precision_copy
from pydqn.learning.optimizers import OnePassOptimizer, OptimizerSettings, TorchOptimizer


def make(kind, name, low):
    network = make_network("nature", 4, (84, 84), 4).to(memory_format=torch.channels_last)
    parameters = list(network.parameters())
    copies = list(mixed_precision_copy(network, torch.bfloat16).parameters()) if low else parameters
    generator = torch.Generator().manual_seed(0)
    for copy in copies:
        copy.grad = torch.empty_like(copy).copy_(torch.randn(copy.shape, generator=generator))
    return parameters, copies, kind(OptimizerSettings(name, 1e-4), parameters, copies, torch.tensor(1e-4))


@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["adam", "rmsprop", "rmsprop_tf", "rmsprop_centered"])
@pytest.mark.parametrize("kind", [OnePassOptimizer, TorchOptimizer], ids=["one pass", "kernels"])
def bench_optimizer(benchmark, kind, name, low):
    parameters, _, optimizer = make(kind, name, low)
    before = parameters[0].detach().clone()
    benchmark(optimizer.step, 10.0)
    assert not torch.equal(before, parameters[0])
    # Both give the same parameters after the same number of steps.
    (one, _, first), (many, _, second) = (make(kind, name, low) for kind in (OnePassOptimizer, TorchOptimizer))
    for _ in range(3):
        for copy in first._copies:
            copy.grad = copy.grad.clone()  # clipping changes float32 gradients in place
        first.step(10.0)
        second.step(10.0)
    for ours, theirs in zip(one, many, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)

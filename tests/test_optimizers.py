"""Both RMSProps against slow twins, element by element in float64."""

from __future__ import annotations

import math

import pytest
import torch

from pydqn.optimizers import RMSProp

SETTINGS = [
    {"decay": 0.99, "eps": 1e-6},
    {"decay": 0.9, "eps": 1e-10, "momentum": 0.9},
    {"decay": 0.95, "eps": 0.01, "centered": True},
    {"decay": 0.95, "eps": 0.01 / 32**2, "momentum": 0.5, "centered": True},
]


class Twin:
    """One number, as the definitions say it."""

    def __init__(self, value, lr, decay, eps, momentum=0.0, centered=False):
        self.value, self.lr, self.decay, self.eps, self.momentum, self.centered = (
            value,
            lr,
            decay,
            eps,
            momentum,
            centered,
        )
        self.square = 0.0 if centered else 1.0
        self.mean = self.change = 0.0

    def step(self, grad):
        self.square = self.decay * self.square + (1 - self.decay) * grad**2
        variance = self.square
        if self.centered:
            self.mean = self.decay * self.mean + (1 - self.decay) * grad
            variance -= self.mean**2
        self.change = self.momentum * self.change + self.lr * grad / math.sqrt(variance + self.eps)
        self.value -= self.change


def make_parameters(generator):
    dense = torch.randn(3, 5, generator=generator)
    image = torch.randn(4, 2, 3, 3, generator=generator).contiguous(memory_format=torch.channels_last)
    return [torch.nn.Parameter(dense), torch.nn.Parameter(image)]


def on_cpu(optimizer):
    optimizer.step()


def on_gpu(optimizer):
    """The kernels of a GPU, which a CPU has as well."""
    with torch.no_grad():
        optimizer._step_on_gpu(optimizer.param_groups[0]["params"], optimizer.param_groups[0])


@pytest.mark.parametrize("step", [on_cpu, on_gpu])
@pytest.mark.parametrize("settings", SETTINGS)
def test_against_the_twin(settings, step):
    generator = torch.Generator().manual_seed(0)
    parameters = make_parameters(generator)
    rate = torch.tensor(0.01)
    optimizer = RMSProp(parameters, rate, **settings)
    twins = [[Twin(value, 0.01, **settings) for value in parameter.flatten().tolist()] for parameter in parameters]
    for count in range(30):
        rate.fill_(0.01 / (1 + count % 3))
        for parameter, row in zip(parameters, twins, strict=True):
            grad = torch.randn(parameter.shape, generator=generator)
            parameter.grad = grad.clone()  # contiguous: another layout than that of the image
            for twin, value in zip(row, grad.flatten().tolist(), strict=True):
                twin.lr = float(rate)
                twin.step(value)
        step(optimizer)
    for parameter, row in zip(parameters, twins, strict=True):
        expected = torch.tensor([twin.value for twin in row]).view(parameter.shape)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-4, atol=1e-5)


def test_the_mean_over_a_batch_with_a_scaled_epsilon_is_the_sum_of_the_paper():
    """Mnih et al. 2015 add 0.01 to the variance of gradients summed over 32 samples; ours are means."""
    ours, theirs = (torch.nn.Parameter(torch.ones(6)) for _ in range(2))
    of_means = RMSProp([ours], 2.5e-4, decay=0.95, eps=0.01 / 32**2, centered=True)
    of_sums = RMSProp([theirs], 2.5e-4, decay=0.95, eps=0.01, centered=True)
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        total = torch.randn(6, generator=generator) * torch.tensor([0.01, 0.1, 1, 5, 10, 100])
        ours.grad, theirs.grad = total / 32, total
        of_means.step()
        of_sums.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    assert not torch.equal(ours.detach(), torch.ones(6))


def test_pytorch_has_another():
    """The reason why there is one of our own: far from each other where gradients are small."""
    ours, theirs = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    for parameter in (ours, theirs):
        parameter.grad = torch.full((1,), 1e-3)
    RMSProp([ours], 1.0, decay=0.95, eps=0.01, centered=True).step()
    torch.optim.RMSprop([theirs], 1.0, alpha=0.95, eps=0.01, centered=True).step()
    assert ours.item() == pytest.approx(-1e-3 / math.sqrt(0.05e-6 - 0.0025e-6 + 0.01), rel=1e-4)
    assert abs(theirs.item() / ours.item()) > 5


def test_parameters_without_a_gradient_stay():
    used, unused = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    used.grad = torch.ones(2)
    RMSProp([used, unused], 0.1, decay=0.9, eps=1e-6).step()
    assert torch.equal(unused.detach(), torch.ones(2))
    assert not torch.equal(used.detach(), torch.ones(2))

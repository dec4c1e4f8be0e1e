"""All optimizers against slow references, element by element in float64."""

from __future__ import annotations

import math

import pytest
import torch

from pydqn.learning.optimizers import OnePassOptimizer, OptimizerSettings, RMSProp, TorchOptimizer, make_optimizer

METHODS = [
    OptimizerSettings("adam", 1e-8),
    OptimizerSettings("adam", 1e-3),
    OptimizerSettings("adamw", 1e-3, weight_decay=0.0),
    OptimizerSettings("adamw", 1e-8, weight_decay=3.0),
    OptimizerSettings("rmsprop", 1e-6, 0.9),
    OptimizerSettings("rmsprop", 1e-6, 0.9, 0.9),
    OptimizerSettings("rmsprop_tf", 1e-6, 0.99),
    OptimizerSettings("rmsprop_tf", 1e-10, 0.9, 0.9),
    OptimizerSettings("rmsprop_centered", 0.01, 0.95),
    OptimizerSettings("rmsprop_centered", 0.01 / 32**2, 0.95, 0.5),
]


class Reference:
    """One parameter of one number, by the definitions."""

    def __init__(self, value, settings):
        self.value, self.settings = value, settings
        self.square = 1.0 if settings.name == "rmsprop_tf" else 0.0
        self.mean = self.change = 0.0
        self.steps = 0

    def step(self, grad, rate):
        name, epsilon, decay, momentum, weight_decay = self.settings
        self.steps += 1
        if name in ("adam", "adamw"):
            self.value *= 1 - rate * weight_decay
            self.mean = 0.9 * self.mean + 0.1 * grad
            self.square = 0.999 * self.square + 0.001 * grad**2
            mean, square = self.mean / (1 - 0.9**self.steps), self.square / (1 - 0.999**self.steps)
            self.value -= rate * mean / (math.sqrt(square) + epsilon)
            return
        self.square = decay * self.square + (1 - decay) * grad**2
        variance = self.square
        if name == "rmsprop_centered":
            self.mean = decay * self.mean + (1 - decay) * grad
            variance -= self.mean**2
        if name == "rmsprop":  # PyTorch's: epsilon outside the root, the rate after the momentum
            self.change = momentum * self.change + grad / (math.sqrt(variance) + epsilon)
            self.value -= rate * self.change
        else:
            self.change = momentum * self.change + rate * grad / math.sqrt(variance + epsilon)
            self.value -= self.change


def make(settings, kind, rate, seed=0, low=False):
    """Return a matrix and a channels-last parameter, their copies, and an optimizer of them."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(3, 5, generator=generator)
    image = torch.randn(4, 2, 3, 3, generator=generator).contiguous(memory_format=torch.channels_last)
    parameters = [torch.nn.Parameter(dense), torch.nn.Parameter(image)]
    copies = [torch.nn.Parameter(p.detach().to(torch.bfloat16)) for p in parameters] if low else parameters
    return parameters, copies, kind(settings, parameters, copies, rate)


def set_grads(copies, generator):
    grads = [torch.randn(copy.shape, generator=generator).to(copy.dtype) for copy in copies]
    for copy, grad in zip(copies, grads, strict=True):
        copy.grad = torch.empty_like(copy).copy_(grad)  # in the same layout, as autograd leaves it
    return [grad.float() for grad in grads]


@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("max_norm", [math.inf, 2.0])
@pytest.mark.parametrize("kind", [OnePassOptimizer, TorchOptimizer])
@pytest.mark.parametrize("settings", METHODS, ids=str)
def test_against_the_reference(settings, kind, max_norm, low):
    generator = torch.Generator().manual_seed(1)
    rate = torch.tensor(0.01)
    parameters, copies, optimizer = make(settings, kind, rate, low=low)
    references = [[Reference(value, settings) for value in parameter.flatten().tolist()] for parameter in parameters]
    for count in range(30):
        rate.fill_(0.01 / (1 + count % 3))
        grads = set_grads(copies, generator)
        norm = math.sqrt(sum(float(grad.double().pow(2).sum()) for grad in grads))
        scale = min(1.0, max_norm / (norm + 1e-6))
        for row, grad in zip(references, grads, strict=True):
            for reference, value in zip(row, grad.flatten().tolist(), strict=True):
                reference.step(value * scale, float(rate))
        assert float(optimizer.step(max_norm)()) == pytest.approx(norm, rel=1e-5)
    for parameter, copy, row in zip(parameters, copies, references, strict=True):
        expected = torch.tensor([reference.value for reference in row]).view(parameter.shape)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(copy.detach(), parameter.detach().to(copy.dtype))


def test_many_numbers_and_a_gradient_in_bfloat16_against_pytorch():
    """More than one block, the last one incomplete."""
    generator = torch.Generator().manual_seed(2)
    parameter = torch.nn.Parameter(torch.randn(10_001, generator=generator))
    other = torch.nn.Parameter(parameter.detach().clone())
    copy = torch.nn.Parameter(parameter.detach().to(torch.bfloat16))
    ours = OnePassOptimizer(OptimizerSettings("adam", 1e-8), [parameter], [copy], torch.tensor(1e-2))
    theirs = torch.optim.Adam([other], lr=1e-2)
    for _ in range(5):
        copy.grad = torch.randn(10_001, generator=generator).to(torch.bfloat16)
        other.grad = copy.grad.float()
        norm = ours.step(math.inf)()
        torch.testing.assert_close(norm, other.grad.norm(), rtol=1e-5, atol=0)
        theirs.step()
    torch.testing.assert_close(parameter, other, rtol=1e-5, atol=1e-6)
    assert torch.equal(copy.detach(), parameter.detach().to(torch.bfloat16))


GAPS = [(True, True), (True, False), (False, False), (True, False), (False, True), (True, True)]  # who has a gradient


def stepped(optimizer, copies, generator, rounds):
    """Take steps in some of which a parameter has no gradient."""
    for count in range(rounds):
        set_grads(copies, generator)
        for has_one, copy in zip(GAPS[count % len(GAPS)], copies, strict=True):
            copy.grad = copy.grad if has_one else None
        optimizer.step(math.inf)


@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [OnePassOptimizer, TorchOptimizer])
@pytest.mark.parametrize("settings", METHODS, ids=str)
def test_only_steps_with_a_gradient_count(settings, kind, low):
    """Each parameter has its own count: its reference takes only steps with a gradient."""
    rate, generator = torch.tensor(0.01), torch.Generator().manual_seed(1)
    parameters, copies, optimizer = make(settings, kind, rate, low=low)
    references = [[Reference(value, settings) for value in parameter.flatten().tolist()] for parameter in parameters]
    for count in range(30):
        grads = set_grads(copies, generator)
        for has_one, copy, row, grad in zip(GAPS[count % len(GAPS)], copies, references, grads, strict=True):
            if not has_one:
                copy.grad = None
                continue
            for reference, value in zip(row, grad.flatten().tolist(), strict=True):
                reference.step(value, 0.01)
        optimizer.step(math.inf)
    assert references[0][0].steps == 20
    assert references[1][0].steps == 15
    for parameter, row in zip(parameters, references, strict=True):
        expected = torch.tensor([reference.value for reference in row]).view(parameter.shape)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", METHODS, ids=str)
@pytest.mark.parametrize("saves", [OnePassOptimizer, TorchOptimizer])
@pytest.mark.parametrize("loads", [OnePassOptimizer, TorchOptimizer])
def test_steps_of_each_parameter_are_saved(settings, saves, loads):
    """Also of a parameter that has had no gradient yet."""
    rate, generator = torch.tensor(0.01), torch.Generator().manual_seed(2)
    parameters, copies, _ = make(settings, saves, rate)
    unused = torch.nn.Parameter(torch.ones(2))
    first = saves(settings, [*parameters, unused], [*copies, unused], rate)
    stepped(first, copies, generator, 4)
    others, other_copies, _ = make(settings, loads, rate)
    for other, parameter in zip(others, parameters, strict=True):
        other.data.copy_(parameter.data)
    other_unused = torch.nn.Parameter(torch.ones(2))
    second = loads(settings, [*others, other_unused], [*other_copies, other_unused], rate)
    second.load_state([{name: value.clone() for name, value in row.items()} for row in first.state()])
    if settings.name == "adam":
        for optimizer in (first, second):
            assert [int(row["step"]) if row else 0 for row in optimizer.state()] == [3, 1, 0]
    for optimizer, these in ((first, copies), (second, other_copies)):
        stepped(optimizer, these, torch.Generator().manual_seed(3), 6)
    for ours, theirs in zip(others, parameters, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert torch.equal(other_unused.detach(), torch.ones(2))


def test_one_count_for_all_parameters_can_be_loaded():
    """As in older files, which also counted steps without a gradient."""
    rate = torch.tensor(0.1)
    (parameter, other), _, optimizer = make(OptimizerSettings("adam", 1e-8), OnePassOptimizer, rate)
    zeros = [{name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")} for p in (parameter, other)]
    optimizer.load_state([{**row, "step": torch.tensor(7.0)} for row in zeros])
    assert [int(row["step"]) for row in optimizer.state()] == [7, 7]


@pytest.mark.parametrize("kind", [OnePassOptimizer, TorchOptimizer])
@pytest.mark.parametrize("max_norm", [math.inf, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradients_that_are_not_finite_have_the_same_effect_in_both(kind, max_norm, bad):
    """Clipping by a norm of NaN changes all parameters; without clipping, NaN stays in its parameter."""
    one, other = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    one.grad, other.grad = torch.tensor([bad, 1.0]), torch.ones(2)
    kind(OptimizerSettings("adam", 1e-8), [one, other], [one, other], torch.tensor(0.1)).step(max_norm)
    assert torch.isnan(one[0])
    spoiled = max_norm < math.inf and math.isnan(bad)
    assert torch.isnan(other).all() == spoiled
    if not spoiled:
        assert torch.isfinite(other).all()


@pytest.mark.parametrize("settings", METHODS, ids=str)
def test_each_goes_on_from_the_state_of_the_other(settings):
    """The state has the same names and meanings on every device."""
    rate = torch.tensor(0.01)
    parameters, copies, first = make(settings, OnePassOptimizer, rate)
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        set_grads(copies, generator)
        first.step(math.inf)
    state = [{name: value.clone() for name, value in tensors.items()} for tensors in first.state()]
    results = []
    for kind in (OnePassOptimizer, TorchOptimizer):
        others, _, second = make(settings, kind, rate)
        for other, parameter in zip(others, parameters, strict=True):
            other.data.copy_(parameter.data)
        second.load_state(state)
        generator = torch.Generator().manual_seed(4)
        for _ in range(3):
            set_grads(others, generator)
            second.step(math.inf)
        results.append(others)
    generator = torch.Generator().manual_seed(4)
    for _ in range(3):
        set_grads(copies, generator)
        first.step(math.inf)
    for expected, one_pass, kernels in zip(parameters, *results, strict=True):
        assert torch.equal(expected, one_pass)
        torch.testing.assert_close(expected, kernels, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", METHODS, ids=str)
@pytest.mark.parametrize("taken", [0, 3])
@pytest.mark.parametrize("saves", [OnePassOptimizer, TorchOptimizer])
@pytest.mark.parametrize("loads", [OnePassOptimizer, TorchOptimizer])
def test_a_loaded_state_is_returned_again_and_goes_on(settings, taken, saves, loads):
    """Also before the first step, when there may be no state yet."""
    rate = torch.tensor(0.1)
    parameters, _, first = make(settings, saves, rate)
    generator = torch.Generator().manual_seed(4)
    for _ in range(taken):
        set_grads(parameters, generator)
        first.step(math.inf)
    copies, _, second = make(settings, loads, rate)
    second.load_state([{name: value.clone() for name, value in row.items()} for row in first.state()])
    if taken:
        for ours, theirs in zip(second.state(), first.state(), strict=True):
            for name in (ours.keys() | theirs.keys()) - {"step"}:
                torch.testing.assert_close(ours[name], theirs[name])
    set_grads(copies, generator)
    second.step(math.inf)
    assert all(torch.isfinite(copy).all() for copy in copies)


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


def test_rmsprop_differs_from_pytorchs():
    """This is why pydqn has its own: with small gradients the two are far apart."""
    ours, theirs = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    for parameter in (ours, theirs):
        parameter.grad = torch.full((1,), 1e-3)
    RMSProp([ours], 1.0, decay=0.95, eps=0.01, centered=True).step()
    torch.optim.RMSprop([theirs], 1.0, alpha=0.95, eps=0.01, centered=True).step()
    assert ours.item() == pytest.approx(-1e-3 / math.sqrt(0.05e-6 - 0.0025e-6 + 0.01), rel=1e-4)
    assert abs(theirs.item() / ours.item()) > 5


def test_a_gradient_may_have_another_layout():
    rate = torch.tensor(0.01)
    settings = OptimizerSettings("adam", 1e-8)
    (one, _, first), (two, _, second) = (make(settings, OnePassOptimizer, rate) for _ in range(2))
    set_grads(one, torch.Generator().manual_seed(0))
    for ours, theirs in zip(one, two, strict=True):
        theirs.grad = ours.grad.contiguous()
    first.step(math.inf)
    second.step(math.inf)
    assert all(map(torch.equal, one, two))


@pytest.mark.parametrize("kind", [OnePassOptimizer, TorchOptimizer])
@pytest.mark.parametrize("name", ["adam", "rmsprop", "rmsprop_tf"])
def test_parameters_without_a_gradient_stay(name, kind):
    used, unused = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    used.grad = torch.ones(2)
    kind(OptimizerSettings(name, 1e-6), [used, unused], [used, unused], torch.tensor(0.1)).step(math.inf)
    assert torch.equal(unused.detach(), torch.ones(2))
    assert not torch.equal(used.detach(), torch.ones(2))


def test_parameters_are_float32():
    parameter = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    with pytest.raises(ValueError, match="^network: expected float32"):
        make_optimizer(OptimizerSettings("adam", 1e-6), [parameter], [parameter], torch.tensor(0.1))

"""Losses of distributions against references written from the equations, in float64 and with loops."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from pydqn.learning.distributions import cross_entropy, histogram_of, project, quantile_huber
from pydqn.learning.munchausen import bonus, scaled_log_policy, soft_value
from pydqn.learning.quantile_kernel import quantile_huber_and_errors
from pydqn.learning.values import midpoints

F64 = torch.float64


def rand(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def masses(*shape, seed=0):
    return rand(*shape, seed=seed, scale=3.0).softmax(-1)


# --- categorical ---


def slow_project(support, z, p):
    """Each mass goes to its neighbours in proportion to their nearness; to one atom if it lies on that."""
    support, out = support.tolist(), torch.zeros(len(z), len(support), dtype=F64)
    for b, (positions, probabilities) in enumerate(zip(z.tolist(), p.tolist(), strict=True)):
        for position, mass in zip(positions, probabilities, strict=True):
            position = min(max(position, support[0]), support[-1])
            for i, atom in enumerate(support):
                if position == atom:
                    out[b, i] += mass
                elif i + 1 < len(support) and atom < position < support[i + 1]:
                    share = (position - atom) / (support[i + 1] - atom)
                    out[b, i] += (1 - share) * mass
                    out[b, i + 1] += share * mass
    return out


@pytest.mark.parametrize(("batch", "atoms", "masses_t"), [(7, 5, 5), (5, 5, 5), (3, 51, 51), (4, 2, 9), (1, 11, 1)])
def test_projection(batch, atoms, masses_t):
    support = torch.linspace(-3, 5, atoms, dtype=F64)
    z, p = rand(batch, masses_t, scale=4.0), masses(batch, masses_t, seed=1)
    expected = slow_project(support, z, p)
    torch.testing.assert_close(project(support, z, p), expected, rtol=1e-12, atol=1e-12)
    rough = project(support.float(), z.float(), p.float())
    torch.testing.assert_close(rough.double(), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(rough.sum(1), 1, atol=1e-6)


def test_projection_of_masses_on_atoms_at_the_ends_and_beyond():
    """A projection with floor and ceil would lose all of them: floor and ceil of an atom are the same."""
    support = torch.linspace(-10, 10, 51)
    for position in (*support.tolist(), -10.5, 10.5, -1e30, 1e30):
        found = project(support, torch.full((1, 51), position), torch.full((1, 51), 1 / 51))
        assert found.sum().item() == pytest.approx(1, abs=1e-6)
        nearest = (support - min(max(position, -10), 10)).abs().argmin()
        assert found[0, nearest].item() == pytest.approx(1, abs=1e-4)


def test_projection_after_termination():
    """With discount 0 all atoms move to the reward."""
    support = torch.linspace(-10, 10, 51, dtype=F64)
    found = project(support, torch.tensor([[1.3]], dtype=F64) + 0 * support, masses(1, 51))
    share = (1.3 - 1.2) / 0.4
    expected = torch.zeros(51, dtype=F64)
    expected[28], expected[29] = 1 - share, share
    torch.testing.assert_close(found[0], expected)


def test_projection_keeps_the_mean_within_the_support():
    support = torch.linspace(-10, 10, 51, dtype=F64)
    z, p = rand(20, 51, scale=3.0), masses(20, 51)
    torch.testing.assert_close(project(support, z, p) @ support, (z * p).sum(1))


def test_cross_entropy():
    logits, p = rand(6, 11), masses(6, 11, seed=2)
    expected = [
        -sum(mass * math.log(math.exp(x) / sum(map(math.exp, row))) for x, mass in zip(row, target, strict=True))
        for row, target in zip(logits.tolist(), p.tolist(), strict=True)
    ]
    np.testing.assert_allclose(cross_entropy(logits, p), expected)
    # Its gradient is the difference of both distributions.
    logits.requires_grad_(True)
    (gradient,) = torch.autograd.grad(cross_entropy(logits, p).sum(), logits)
    torch.testing.assert_close(gradient, logits.detach().softmax(1) - p)


# --- HL-Gauss ---


def slow_histogram(edges, y, sigma):
    out = []
    for value in y.tolist():
        value = min(max(value, edges[0]), edges[-1])
        below = [math.erf((edge - value) / (math.sqrt(2) * sigma)) for edge in edges]
        whole = below[-1] - below[0]
        out.append([(high - low) / whole for low, high in itertools.pairwise(below)])
    return torch.tensor(out, dtype=F64)


@pytest.mark.parametrize("sigma", [0.05, 0.3, 2.0])
def test_histogram(sigma):
    edges = torch.linspace(-10, 10, 52, dtype=F64)
    y = torch.tensor([0.0, 0.1, -3.33, 9.99, 10.0, 10.1, 1e9, -9.99, -10.0, -1e9], dtype=F64)
    expected = slow_histogram(edges.tolist(), y, sigma)
    torch.testing.assert_close(histogram_of(edges, y, sigma), expected)
    rough = histogram_of(edges.float(), y.float(), sigma)
    torch.testing.assert_close(rough.double(), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(rough.sum(1), 1, atol=1e-6)


def test_the_mean_of_a_histogram_is_its_centre():
    edges = torch.linspace(-10, 10, 52, dtype=F64)
    y, centres = torch.linspace(-8, 8, 33, dtype=F64), (edges[1:] + edges[:-1]) / 2
    torch.testing.assert_close(histogram_of(edges, y, 0.75 * 20 / 51) @ centres, y, atol=1e-3, rtol=0)


# --- quantiles ---


def slow_quantile_huber(q, tau, target, kappa):
    losses = []
    for b in range(len(q)):
        loss = 0.0
        for i in range(q.shape[1]):
            total = 0.0
            for j in range(target.shape[1]):
                u = (target[b, j] - q[b, i]).item()
                size = abs(u)
                huber = size if not kappa else 0.5 * u * u if size <= kappa else kappa * (size - 0.5 * kappa)
                total += abs(tau[b, i].item() - (u < 0)) * huber / (kappa or 1.0)
            loss += total / target.shape[1]
        losses.append(loss)
    return losses


@pytest.mark.parametrize("kappa", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize(
    ("batch", "count", "count_t"), [(3, 4, 6), (6, 4, 4), (5, 5, 5), (4, 4, 7), (7, 2, 7), (2, 1, 1)]
)
def test_quantile_huber(batch, count, count_t, kappa):
    """Sizes that are equal or not: a level that belongs to the wrong axis would broadcast in silence."""
    q, target = rand(batch, count, scale=2.0), rand(batch, count_t, seed=1, scale=2.0)
    tau = torch.rand(batch, count, dtype=F64, generator=torch.Generator().manual_seed(2))
    np.testing.assert_allclose(quantile_huber(q, tau, target, kappa), slow_quantile_huber(q, tau, target, kappa))
    fixed = midpoints(count).double()
    expected = slow_quantile_huber(q, fixed.expand(batch, -1), target, kappa)
    np.testing.assert_allclose(quantile_huber(q, fixed, target, kappa), expected)


def test_quantiles_are_those_of_their_levels():
    """Learned from samples; with a wrong sign, the quantile of level tau would be that of 1 - tau."""
    samples = torch.linspace(0, 1, 1001, dtype=F64)[None] ** 2
    tau = torch.tensor([[0.1, 0.5, 0.9]], dtype=F64)
    q = torch.zeros(1, 3, dtype=F64, requires_grad=True)
    for step in range(600):
        (gradient,) = torch.autograd.grad(quantile_huber(q, tau, samples, 0.01).sum(), q)
        with torch.no_grad():
            q -= 0.5 / (1 + step / 50) * gradient
    np.testing.assert_allclose(q.detach()[0], [0.01, 0.25, 0.81], atol=0.01)


def test_midpoints():
    assert midpoints(4).tolist() == [0.125, 0.375, 0.625, 0.875]


# --- Munchausen ---


@pytest.mark.parametrize("temperature", [0.03, 1.0, 10.0])
def test_the_scaled_log_policy(temperature):
    q = rand(5, 4, scale=2.0)
    expected = temperature * (q / temperature).log_softmax(1)
    torch.testing.assert_close(scaled_log_policy(q, temperature), expected)
    assert torch.isfinite(scaled_log_policy(1e4 * q.float(), 0.03)).all()


def test_the_bonus_is_clipped():
    q = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=F64)
    log_half = 0.03 * math.log(0.5)
    for action, expected in ((0, [0.0, 0.9 * log_half]), (1, [-0.9, 0.9 * log_half])):
        found = bonus(q, torch.tensor([action] * 2), 0.9, 0.03, -1.0)
        np.testing.assert_allclose(found, expected, atol=1e-12)
    np.testing.assert_allclose(bonus(q, torch.tensor([1, 1]), 0.5, 0.5, -0.1), [-0.05, -0.05])


def test_the_soft_value_of_equal_actions_has_the_entropy():
    """Of A equal actions with the value q it is q + temperature * ln A; without entropy it is the best one's."""
    samples, q = torch.full((1, 4, 3), 2.0, dtype=F64), torch.full((1, 4), 2.0, dtype=F64)
    np.testing.assert_allclose(soft_value(samples, q, 0.5), [[2 + 0.5 * math.log(4)] * 3])
    samples, q = rand(1, 4, 3), torch.tensor([[0.0, 5.0, 0.0, 0.0]], dtype=F64)
    torch.testing.assert_close(soft_value(samples, q, 0.01), samples[:, 1])


def test_munchausen_has_the_fixed_point_of_two_states():
    """States 0 (two actions: reward 1 and to state 1, or reward 0 and stay) and 1 (ends with reward 2).

    With pi = softmax(q / t), q = r + alpha t ln pi + gamma v', and the soft value is v = t ln sum exp(q / t), since
    q - t ln pi = v for each action. State 1 has one action, so q = v = 2 there.
    """
    alpha, t, gamma = 0.9, 0.3, 0.8
    q = torch.zeros(1, 2, dtype=F64)
    for _ in range(3000):
        v = soft_value(q.unsqueeze(2), q, t)[0, 0]
        bonuses = [bonus(q, torch.tensor([a]), alpha, t, -1e9)[0] for a in (0, 1)]
        q = torch.stack([1 + bonuses[0] + gamma * 2.0, bonuses[1] + gamma * v])[None]
    # By substitution q_a = x_a + alpha (q_a - v), with x = (2.6, gamma v), so q_a = (x_a - alpha v) / (1 - alpha).
    v = 0.0
    for _ in range(100_000):
        new = t * np.logaddexp((2.6 - alpha * v) / (1 - alpha) / t, (gamma * v - alpha * v) / (1 - alpha) / t)
        v += 0.01 * (new - v)
    expected = [(2.6 - alpha * v) / (1 - alpha), (gamma * v - alpha * v) / (1 - alpha)]
    np.testing.assert_allclose(q[0], expected, rtol=1e-6)


def test_gradients():
    """Against differences, in the arguments that the online network computes."""
    p, target = masses(3, 5), rand(3, 6, seed=3)
    tau = torch.rand(3, 5, dtype=F64, generator=torch.Generator().manual_seed(1))
    for function, shape in (
        (lambda x: cross_entropy(x, p), (3, 5)),
        (lambda x: quantile_huber(x, tau, target), (3, 5)),
        (lambda x: quantile_huber(x, tau, target, 0.3), (3, 5)),
    ):
        assert torch.autograd.gradcheck(function, (rand(*shape, seed=4).requires_grad_(True),))


@pytest.mark.parametrize("kappa", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize(("batch", "count", "count_t"), [(3, 4, 6), (5, 5, 5), (7, 2, 33), (2, 200, 200), (1, 1, 1)])
def test_the_compiled_loss_its_slope_and_errors(batch, count, count_t, kappa):
    """Against the formula and autograd in float64, with ties among the errors."""
    q, target = rand(batch, count, scale=2.0), rand(batch, count_t, seed=1, scale=2.0)
    target[:, 0] = q[:, 0].float().double()
    q[:, 0] = target[:, 0]
    tau = torch.rand(batch, count, dtype=F64, generator=torch.Generator().manual_seed(2))
    weights = torch.rand(batch, dtype=F64, generator=torch.Generator().manual_seed(3))
    found = []
    for dtype in (torch.float32, F64):  # compiled, and PyTorch's operations
        x = q.to(dtype).requires_grad_(True)
        losses, errors = quantile_huber_and_errors(x, tau.to(dtype), target.to(dtype), kappa)
        assert not errors.requires_grad
        losses.backward(weights.to(dtype))
        found.append([losses.detach().double(), errors.double(), x.grad.double()])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[1][0], slow_quantile_huber(q, tau, target, kappa))


def test_the_compiled_loss_keeps_nan():
    for name in ("q", "target"):
        q, target = torch.zeros(2, 3, requires_grad=True), torch.ones(2, 4)
        with torch.no_grad():
            (q if name == "q" else target)[1, 2] = torch.nan
        losses, errors = quantile_huber_and_errors(q, midpoints(3).expand(2, -1), target, 1.0)
        assert losses.isnan().tolist() == errors.isnan().tolist() == [False, True]

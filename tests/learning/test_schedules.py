from __future__ import annotations

import math

import numpy as np
import pytest

from pydqn import preset
from pydqn.learning.schedules import epsilon, exponential, learning_rate, linear, piecewise, priority_beta


def test_linear():
    assert [linear(step, 1.0, 0.2, 4) for step in range(6)] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.2])
    assert linear(4, 1.0, 0.2, 4) == 0.2


def test_piecewise_is_interpolation():
    knots = [(10, 1.0), (30, 0.1), (30, 0.3), (100, 0.0)]
    steps = [step for step in range(130) if step != 30]
    expected = np.interp(steps, *zip(*knots, strict=True))
    np.testing.assert_allclose([piecewise(step, knots) for step in steps], expected)
    assert piecewise(30, knots) == 0.3  # a jump has happened at its step
    assert piecewise(5, [(7, 2.5)]) == piecewise(50, [(7, 2.5)]) == 2.5


def test_exponential():
    assert exponential(0, 1.0, 0.01, 1000) == 1.0
    assert exponential(1000, 1.0, 0.01, 1000) == pytest.approx(0.01 + 0.99 / math.e)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("cartpole", lambda t: 0.01 + 0.99 * math.exp(-0.001 * t)),
        ("pong-book", lambda t: max(0.01, 1 - t / 150_000)),
        ("breakout", lambda t: max(0.1, 1 - 0.9 * t / 500_000)),
        ("nature", lambda t: max(0.1, 1 - 0.9 * t / 1_000_000)),
        ("frozenlake", lambda t: 1.0),
        (
            "breakout-dueling",
            lambda t: np.interp(t, [0, 50_000, 1_050_000, 25_000_000], [1.0, 1.0, 0.1, 0.01]),
        ),
    ],
)
def test_the_presets_explore_as_published(name, published):
    config = preset(name)
    for step in [*range(0, 2_000_000, 7_919), 10_000_000, 24_999_999, 25_000_000, 60_000_000]:
        assert epsilon(config, step) == pytest.approx(published(step), abs=1e-12)


def test_the_learning_rate():
    config = preset("pong", learning_rate=1e-3, learning_rate_end=1e-4, learning_rate_decay_steps=100)
    assert [learning_rate(config, step) for step in (0, 50, 100, 1000)] == pytest.approx([1e-3, 5.5e-4, 1e-4, 1e-4])
    assert learning_rate(preset("pong", learning_rate_decay_steps=0), 10**7) == preset("pong").learning_rate


def test_importance_weights_reach_full_compensation_at_the_end():
    config = preset("pong", total_steps=1000, priority_beta=0.4)
    assert [priority_beta(config, step) for step in (0, 500, 1000, 1008)] == pytest.approx([0.4, 0.7, 1.0, 1.0])

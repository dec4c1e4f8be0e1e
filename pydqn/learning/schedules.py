"""Schedules: pure functions of the step, and periodic events."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pydqn.config import Config


def linear(step: int, start: float, end: float, duration: int) -> float:
    """Return the value at `step` of a straight line from `start` to `end` over `duration` steps; `end` from then on."""
    if step >= duration:
        return end
    return start + (end - start) * step / duration


def piecewise(step: int, knots: Sequence[tuple[int, float]]) -> float:
    """Return the value at `step` of straight lines between `knots`, (step, value) in order; outside it is constant."""
    position, value = knots[0]
    if step <= position:
        return value
    for next_position, next_value in knots[1:]:
        if step < next_position:
            return linear(step - position, value, next_value, next_position - position)
        position, value = next_position, next_value
    return value


def exponential(step: int, start: float, end: float, duration: int) -> float:
    """Return the value at `step` of an exponential decay from `start` to `end` with time constant `duration`."""
    return end + (start - end) * math.exp(-step / duration)


def epsilon(config: Config, step: int) -> float:
    """Return the probability of a random action at `step`."""
    if 0 < config.epsilon_off_steps <= step:
        return 0.0
    start, end, duration = config.epsilon_start, config.epsilon_end, config.epsilon_decay_steps
    hold = config.epsilon_hold_steps
    if config.epsilon_schedule == "exponential":
        return exponential(max(0, step - hold), start, end, duration)
    knots = [(hold, start), (hold + duration, end)]
    if config.epsilon_schedule == "piecewise":
        knots.append((config.total_steps, config.epsilon_final))
    return piecewise(step, knots)


def epsilons(config: Config, step: int) -> NDArray[np.float64]:
    """Return each environment's probability of a random action at `step`, (num_envs,).

    With a ladder, that is epsilon^(1 + ladder i / (N - 1)): Horgan et al. 2018 (https://arxiv.org/abs/1803.00933,
    section 4.1).
    """
    powers = 1 + config.epsilon_ladder * np.linspace(0, 1, config.num_envs)
    return np.asarray(epsilon(config, step) ** powers)


def learning_rate(config: Config, step: int) -> float:
    """Return the optimizer's step size at `step`."""
    if not config.learning_rate_decay_steps:
        return config.learning_rate
    return linear(step, config.learning_rate, config.learning_rate_end, config.learning_rate_decay_steps)


def priority_beta(config: Config, step: int) -> float:
    """Return the exponent of the importance weights at `step`, which changes linearly until the end of the run."""
    return linear(step, config.priority_beta, config.priority_beta_end, config.total_steps)


class Due:
    """Tells whether another `every` steps or episodes have passed (0: never)."""

    def __init__(self, every: int, now: int) -> None:
        self._every = every
        self.next: float = (now // every + 1) * every if every else math.inf

    def __call__(self, now: int) -> bool:
        """Return True once at or after each multiple of `every`."""
        if now < self.next:
            return False
        self.next = (now // self._every + 1) * self._every
        return True

"""Value functions of small tasks, as pictures to be drawn by `pydqn.plotting.curves.plot_values`."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pydqn.config import Config
from pydqn.envs.gym import Outline, make_lanes, outline
from pydqn.evaluation.evaluate import load_policy, load_run
from pydqn.plotting.curves import Grid, Surface
from pydqn.learning.policy import Policy

_POINTS = 60  # on each axis of a surface
_NO_CHOICE = "HGC"  # cells of a map on which nothing is chosen: hole, goal, cliff
_AXES = {"MountainCar-v0": ("position", "velocity")}


def values_of(run: str | os.PathLike[str]) -> list[Surface | Grid]:
    """Evaluate max Q(s, .) of a run's best weights all over a small task.

    Tasks with two numbers (MountainCar, as cost to go: -max Q) and Blackjack (with and without a usable ace) give
    surfaces; maps (FrozenLake, CliffWalking) a grid with the greedy actions.

    Raises:
        ValueError: `run` is not the folder of a run with weights, or its task cannot be drawn in this way.
    """
    config = load_run(run)
    lanes = make_lanes(config, 1, 0)
    try:
        policy, _ = load_policy(run, config, lanes)
    finally:
        lanes.close()
    task = outline(config)
    if task.letters:
        return [_grid(config, policy, task)]
    if len(task.sizes) == 3:
        return _blackjack(config, policy, task)
    if task.bounds is not None and task.bounds[0].shape == (2,):
        return [_surface(config, policy, task)]
    raise ValueError(f"run: the values of {config.env_id} are not on two axes")


def _surface(config: Config, policy: Policy, task: Outline) -> Surface:
    assert task.bounds is not None
    low, high = task.bounds
    if not np.isfinite([low, high]).all():
        raise ValueError(f"run: the observations of {config.env_id} have no bounds to draw between")
    x, y = (np.linspace(low[axis], high[axis], _POINTS) for axis in (0, 1))
    points = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2).astype(np.float32)
    values = _action_values(config, policy, points).max(axis=1).reshape(_POINTS, _POINTS)
    costs = config.env_id in _AXES
    x_label, y_label = _AXES.get(config.env_id, ("first number", "second number"))
    label = "cost to go (discounted steps)" if costs else "value (discounted return)"
    return Surface(config.env_id, x_label, y_label, label, x, y, -values if costs else values)


def _blackjack(config: Config, policy: Policy, task: Outline) -> list[Surface | Grid]:
    values = _action_values(config, policy, np.eye(math.prod(task.sizes), dtype=np.float32)).max(axis=1)
    table = values.reshape(task.sizes)
    player, dealer = np.arange(12, 22), np.arange(1, 11)
    return [
        Surface(title, "dealer's card", "player's sum", "value (return)", dealer, player, table[12:22, 1:11, ace])
        for ace, title in enumerate(("no usable ace", "usable ace"))
    ]


def _grid(config: Config, policy: Policy, task: Outline) -> Grid:
    shape = len(task.letters), len(task.letters[0])
    values = _action_values(config, policy, np.eye(task.sizes[0], dtype=np.float32))
    letters = np.array([list(row) for row in task.letters])
    arrows = np.array(task.directions, float)[values.argmax(axis=1)].reshape(*shape, 2)
    best = values.max(axis=1).astype(float).reshape(shape)
    nothing = np.isin(letters, list(_NO_CHOICE))
    arrows[nothing], best[nothing] = 0, np.nan
    return Grid(config.env_id, best, arrows, task.letters)


def _action_values(config: Config, policy: Policy, frames: NDArray[Any]) -> NDArray[np.float32]:
    """Return (n, A) action values of n frames, each of which has stood still for a whole stack."""
    return policy.values(np.repeat(frames[:, None], config.stack, axis=1))

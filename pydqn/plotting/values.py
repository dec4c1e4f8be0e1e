"""Value functions of small tasks: evaluating and drawing them."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pydqn.config import Config
from pydqn.envs.checked import close
from pydqn.envs.make import make_envs
from pydqn.envs.single import open_env
from pydqn.envs.spaces import States, bounds_of
from pydqn.evaluation.build import trained_policy
from pydqn.learning.policy import Policy
from pydqn.plotting.figure import require_suffix, write_figure
from pydqn.runs.layout import load_run

_POINTS = 60  # on each axis of a surface
_NO_CHOICE = "HGC"  # cells of a map in which no action is chosen: hole, goal, cliff
_AXES = {"MountainCar-v0": ("position", "velocity")}


class Surface(NamedTuple):
    """Values over two numbers."""

    title: str
    x_label: str
    y_label: str
    z_label: str
    x: NDArray[Any]  # (nx,)
    y: NDArray[Any]  # (ny,)
    z: NDArray[Any]  # (ny, nx)


class Grid(NamedTuple):
    """The value of each cell of a map, and the direction of its greedy action."""

    title: str
    values: NDArray[Any]  # (rows, columns); NaN where no action is chosen
    arrows: NDArray[Any]  # (rows, columns, 2): right and up; zeros for no arrow
    letters: list[str]  # the letters of the cells, one string per row


class Outline(NamedTuple):
    """The shape of a small task, as far as it is needed to draw its value function."""

    bounds: tuple[NDArray[Any], NDArray[Any]] | None  # lowest and highest Box observation
    sizes: tuple[int, ...]  # of Discrete observations, or of the parts of a tuple of them
    letters: list[str]  # the rows of a map, for tasks that have one
    directions: tuple[tuple[int, int], ...]  # (right, up) of each action on that map


def values_of(run: str | os.PathLike[str]) -> list[Surface | Grid]:
    """Evaluate max Q(s, .) of a run's best weights over all states of a small task.

    Tasks with two numbers (MountainCar, as cost to go: -max Q) and Blackjack (with and without a usable ace) give
    surfaces; maps (FrozenLake, CliffWalking) give a grid with the greedy actions.

    Raises:
        ValueError: `run` is not the folder of a run with weights, or its task cannot be drawn in this way.
    """
    config = load_run(run)
    envs = make_envs(config, 1, 0)
    try:
        policy, _ = trained_policy(run, config, envs)
    finally:
        envs.close()
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
    no_choice = np.isin(letters, list(_NO_CHOICE))
    arrows[no_choice], best[no_choice] = 0, np.nan
    return Grid(config.env_id, best, arrows, task.letters)


def _action_values(config: Config, policy: Policy, frames: NDArray[Any]) -> NDArray[np.float32]:
    """Return (n, A) action values of n observations, each a stack of one repeated frame."""
    return policy.values(np.repeat(frames[:, None], config.stack, axis=1))


def outline(config: Config) -> Outline:
    """Return the outline of a task."""
    env, checked = open_env(config, 0, 1, 0)
    try:
        space, bare = env.observation_space, env.unwrapped
        bounds = bounds_of(space)
        if bounds is not None:
            return Outline(bounds, (), [], ())
        states = States.of(space)
        sizes = () if states is None else states.sizes
        left, down, right, up = (-1, 0), (0, -1), (1, 0), (0, 1)
        kind = type(bare).__name__
        if kind == "FrozenLakeEnv":
            return Outline(None, sizes, [b"".join(row).decode() for row in bare.desc], (left, down, right, up))
        if kind == "CliffWalkingEnv":
            rows, columns = bare.shape
            letters = ["F" * columns] * (rows - 1) + ["S" + "C" * (columns - 2) + "G"]
            return Outline(None, sizes, letters, (up, right, down, left))
        return Outline(None, sizes, [], ())
    finally:
        close(env, checked)


def plot_values(functions: Sequence[Surface | Grid], output: str | os.PathLike[str]) -> None:
    """Draw value functions side by side.

    Raises:
        ValueError: `output` has an unknown ending.
    """
    require_suffix(output)
    write_figure(draw_values(functions), output)


def draw_values(functions: Sequence[Surface | Grid]) -> Any:
    """Return the figure of value functions."""
    from matplotlib.figure import Figure

    sizes = [_size(function) for function in functions]
    width, height = sum(size[0] for size in sizes), max(size[1] for size in sizes)
    figure = Figure(figsize=(width, height), layout="constrained")
    for number, function in enumerate(functions, 1):
        if isinstance(function, Grid):
            _draw_grid(figure.add_subplot(1, len(functions), number), function)
        else:
            axes: Any = figure.add_subplot(1, len(functions), number, projection="3d")
            x, y = np.meshgrid(function.x, function.y)
            drawn = axes.plot_surface(x, y, function.z, cmap="viridis", rcount=60, ccount=60, linewidth=0)
            axes.set(title=function.title)
            axes.set_xlabel(function.x_label, labelpad=8)
            axes.set_ylabel(function.y_label, labelpad=8)
            axes.locator_params(nbins=5)
            axes.view_init(elev=32, azim=-125)
            figure.colorbar(drawn, ax=axes, shrink=0.6, pad=0.08, label=function.z_label)
    return figure


def _size(function: Surface | Grid) -> tuple[float, float]:
    """Return the width and height of one drawing, in inches."""
    if isinstance(function, Surface):
        return 6.2, 5.0
    rows, columns = function.values.shape
    cell = 1.0 if columns < 10 else 0.85
    return cell * columns + 1.7, cell * rows + 0.9


def _draw_grid(axes: Any, grid: Grid) -> None:
    image = axes.imshow(np.ma.masked_invalid(grid.values), cmap="viridis")
    axes.set_facecolor("lightgray")  # for cells without a value
    axes.set(title=f"{grid.title}: value and greedy action", xlabel="column", ylabel="row")
    axes.set(xticks=range(grid.values.shape[1]), yticks=range(grid.values.shape[0]))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for (row, column), value in np.ndenumerate(grid.values):
        ink = "black"
        if np.isfinite(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
            axes.text(column, row + 0.32, f"{value:.3g}", color=ink, fontsize=9, ha="center", va="center")
        axes.text(column - 0.42, row - 0.3, grid.letters[row][column], color=ink, fontsize=8, va="center")
        right, up = grid.arrows[row, column] * 0.22
        if right or up:
            axes.annotate(
                "",
                (column + right, row - 0.08 - up),
                (column - right, row - 0.08 + up),
                arrowprops={"arrowstyle": "-|>", "color": ink, "linewidth": 1.8, "mutation_scale": 14},
            )
    axes.figure.colorbar(image, ax=axes, shrink=0.8, label="value (discounted return)")

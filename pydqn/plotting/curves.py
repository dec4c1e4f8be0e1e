"""Learning curves, drawn from the logs of runs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pydqn.config import RENAMED, Config
from pydqn.plotting.figure import require_suffix, write_figure
from pydqn.runs.layout import CONFIG, EPISODES, PROGRESS
from pydqn.runs.logs import read_csv

_MAY_DIFFER = ("seed", "torch_threads", "emulator_threads")  # between the runs of a group
_POINTS = 400  # at which the seeds of a group are averaged
_MOST_DOTS = 4_000  # more would only slow down the drawing
_FEW_SEEDS = 5  # with fewer, the spread is from lowest to highest; else one standard deviation
Columns = dict[str, NDArray[np.float64]]


class Group(NamedTuple):
    """Runs that differ only in their seeds."""

    label: str
    progress: list[Columns]
    episodes: list[Columns]


class Curve(NamedTuple):
    """The mean of several curves and their spread, over the range that all of them cover."""

    x: NDArray[np.float64]
    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


def plot_runs(
    runs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    panels: Sequence[str] | None = None,
    smooth_episodes: int = 10,
    each: bool = False,
) -> None:
    """Draw the learning curves of one or more runs.

    Runs that differ only in their seeds are drawn as one curve: the mean over the seeds, with its spread.

    Args:
        runs: folders of runs.
        output: image to write: .png, .svg or .pdf.
        panels: names of `PANELS`; None for all of them.
        smooth_episodes: number of episodes over which returns and lengths are averaged.
        each: draw every run as its own curve.

    Raises:
        ValueError: a folder holds no run, or a name is unknown.
    """
    require_suffix(output)
    chosen = list(PANELS) if panels is None else list(panels)
    for name in chosen:
        if name not in PANELS:
            raise ValueError(f"panels: expected some of {', '.join(PANELS)}, got {name!r}")
    if smooth_episodes < 1:
        raise ValueError(f"smooth_episodes: expected at least 1, got {smooth_episodes}")
    write_figure(draw_runs(group_runs(runs, each=each), chosen, smooth_episodes), output)


def group_runs(runs: Sequence[str | os.PathLike[str]], *, each: bool = False) -> list[Group]:
    """Read the logs of runs and group runs that differ only in their seeds (unless `each`), in the given order."""
    groups: dict[str, list[Path]] = {}
    for run in map(Path, runs):
        if not (run / PROGRESS).is_file():
            raise ValueError(f"run: {os.fspath(run)!r} is not the folder of a run (it has no {PROGRESS})")
        groups.setdefault(os.fspath(run) if each else _setting(run), []).append(run)
    return [
        Group(_label(paths), [_table(run, PROGRESS) for run in paths], [_table(run, EPISODES) for run in paths])
        for paths in groups.values()
    ]


def rolling_mean(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Return at each index the mean of the last `window` values (fewer at the beginning)."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - window, 0)
    means: NDArray[np.float64] = (total[end] - total[start]) / (end - start)
    return means


def spread(curves: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]]) -> Curve:
    """Average curves, (x, y) with increasing x, over the range that all of them cover."""
    start, end = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    common = np.linspace(start, max(start, end), _POINTS)
    rows = np.stack([np.interp(common, x, y) for x, y in curves])
    mean = rows.mean(axis=0)
    if len(rows) < _FEW_SEEDS:
        return Curve(common, mean, rows.min(axis=0), rows.max(axis=0))
    deviation = rows.std(axis=0, ddof=1)
    return Curve(common, mean, mean - deviation, mean + deviation)


def _setting(run: Path) -> str:
    """Return the settings that the runs of a group share. A run without a readable config forms its own group.

    Fields that were added after a run was made had their default values.
    """
    try:
        config = Config().to_dict()
        config |= {RENAMED.get(name, name): value for name, value in json.loads((run / CONFIG).read_text()).items()}
        return json.dumps({name: value for name, value in config.items() if name not in _MAY_DIFFER}, sort_keys=True)
    except (OSError, ValueError, TypeError, AttributeError):
        return os.fspath(run)


def _label(runs: list[Path]) -> str:
    folder = runs[0].resolve()
    # Folders named after their seeds need the name of their parent.
    above = f"{folder.parent.name}/" if folder.name.startswith("seed") else ""
    if len(runs) == 1:
        return above + folder.name
    shared = os.path.commonprefix([run.resolve().name for run in runs])  # noqa: RUF071 (a prefix of characters is meant)
    return f"{above.rstrip('/') or shared.rstrip('-_.0123456789') or folder.name} ({len(runs)} seeds)"


def _table(run: Path, name: str) -> Columns:
    """Read a CSV, without a last line that is still being written."""
    path = run / name
    if not path.is_file():
        return {}
    columns = {column: np.array(values) for column, values in read_csv(path).items()}
    if name == PROGRESS and not all(len(columns.get(column, ())) for column in ("frames", "seconds", "mean_return")):
        raise ValueError(f"run: {os.fspath(run)!r} has no rows to draw yet")
    return columns


def _pairs(
    tables: list[Columns], x: str, y: str, scale: float = 1.0
) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Return the points (x, y) of each table at which both columns have a value."""
    pairs = []
    for table in tables:
        if x in table and y in table:
            finite = np.isfinite(table[x]) & np.isfinite(table[y])
            if finite.any():
                pairs.append((table[x][finite] / scale, table[y][finite]))
    return pairs


def draw_runs(groups: list[Group], panels: list[str], smooth_episodes: int) -> Any:
    """Return a figure with the given panels."""
    from matplotlib.figure import Figure

    columns = len(panels) if len(panels) < 4 else (len(panels) + 1) // 2
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(max(4.5 * columns, 5.5), 3.6 * rows), layout="constrained")
    subplots = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, name in zip(subplots, panels, strict=False):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        for number, group in enumerate(groups):
            PANELS[name](axes, group, f"C{number % 10}", smooth_episodes)
        if not axes.has_data():
            axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", va="center", color="gray")
        axes.set_xlim(left=0)
    for axes in subplots[len(panels) :]:
        axes.set_visible(False)
    handles, labels = next((found for axes in subplots if (found := axes.get_legend_handles_labels())[0]), ([], []))
    if handles:
        columns = min(4, len(labels), 2 * min(2, len(panels)))  # as many as fit below the panels of a row
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    return figure


def _draw(axes: Any, group: Group, color: str, curves: list[tuple[NDArray[np.float64], NDArray[np.float64]]]) -> None:
    """Draw a single run as a line; several as thin lines below their mean."""
    if len(curves) == 1:
        axes.plot(*curves[0], color=color, linewidth=1.6, label=group.label)
    elif curves:
        for x, y in curves:
            axes.plot(x, y, color=color, linewidth=0.7, alpha=0.45)
        curve = spread(curves)
        what = "lowest to highest" if len(curves) < _FEW_SEEDS else "one standard deviation"
        axes.fill_between(curve.x, curve.low, curve.high, color=color, alpha=0.15, linewidth=0)
        axes.plot(curve.x, curve.mean, color=color, linewidth=2.2, label=f"{group.label}: mean, {what}")


def _return_frames(axes: Any, group: Group, color: str, smooth: int) -> None:
    _draw(axes, group, color, _pairs(group.progress, "frames", "mean_return", 1e6))
    axes.set(xlabel="frames (millions)", ylabel="mean return of the latest episodes")


def _return_minutes(axes: Any, group: Group, color: str, smooth: int) -> None:
    _draw(axes, group, color, _pairs(group.progress, "seconds", "mean_return", 60))
    axes.set(xlabel="wall-clock (minutes)", ylabel="mean return of the latest episodes")


def _return_episodes(axes: Any, group: Group, color: str, smooth: int) -> None:
    _each_episode(axes, group, color, "return", smooth)
    axes.set(xlabel="episodes", ylabel=f"return, mean of {smooth} episodes")


def _length_episodes(axes: Any, group: Group, color: str, smooth: int) -> None:
    _each_episode(axes, group, color, "length_steps", smooth)
    axes.set(xlabel="episodes", ylabel=f"length (steps), mean of {smooth} episodes")


def _each_episode(axes: Any, group: Group, color: str, column: str, smooth: int) -> None:
    pairs = _pairs(group.episodes, "episode", column)
    for x, y in pairs:
        every = -(-len(x) // _MOST_DOTS)
        axes.plot(x[::every], y[::every], ".", color=color, markersize=2, alpha=0.2, zorder=1)
    _draw(axes, group, color, [_thinned(x, rolling_mean(y, smooth)) for x, y in pairs])


def _episodes_steps(axes: Any, group: Group, color: str, smooth: int) -> None:
    curves = [_thinned(steps, episode) for steps, episode in _pairs(group.episodes, "steps", "episode", 1e3)]
    _draw(axes, group, color, curves)
    axes.set(xlabel="steps (thousands)", ylabel="episodes finished")


def _q_steps(axes: Any, group: Group, color: str, smooth: int) -> None:
    for x, y in _pairs(group.progress, "steps", "max_q", 1e3):
        axes.plot(x, y, color=color, linewidth=0.8, linestyle=":")
    _draw(axes, group, color, _pairs(group.progress, "steps", "mean_q", 1e3))
    axes.set(xlabel="steps (thousands)", ylabel="action value, mean (dotted: largest)")


def _thinned(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    every = -(-len(x) // _MOST_DOTS)
    return x[::every], y[::every]


PANELS: dict[str, Callable[[Any, Group, str, int], None]] = {
    "return-frames": _return_frames,
    "return-minutes": _return_minutes,
    "return-episodes": _return_episodes,
    "length-episodes": _length_episodes,
    "episodes-steps": _episodes_steps,
    "q-steps": _q_steps,
}

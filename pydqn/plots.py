"""Figures from the logs of runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from pydqn.logs import PROGRESS, read_csv

_SUFFIXES = (".png", ".svg", ".pdf")


def plot_runs(runs: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str]) -> None:
    """Draw the mean return of each run over its frames and over its minutes.

    Raises:
        ValueError: a folder holds no run, or the name of the picture has an unknown ending.
    """
    if Path(output).suffix not in _SUFFIXES:
        raise ValueError(f"output: expected a name that ends in {', '.join(_SUFFIXES)}, got {os.fspath(output)!r}")
    tables = []
    for run in runs:
        if not (Path(run) / PROGRESS).is_file():
            raise ValueError(f"run: {os.fspath(run)!r} is not the folder of a run (it has no {PROGRESS})")
        table = read_csv(Path(run) / PROGRESS)
        if not all(table.get(name) for name in ("frames", "seconds", "mean_return")):
            raise ValueError(f"run: {os.fspath(run)!r} has no rows to draw yet")
        tables.append(table)

    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    by_frames, by_time = figure.subplots(1, 2, sharey=True)
    for run, table in zip(runs, tables, strict=True):
        by_frames.plot([frames / 1e6 for frames in table["frames"]], table["mean_return"], label=Path(run).name)
        by_time.plot([seconds / 60 for seconds in table["seconds"]], table["mean_return"])
    by_frames.set(xlabel="frames (millions)", ylabel="mean return of the latest games")
    by_time.set(xlabel="wall-clock (minutes)")
    for axes in (by_frames, by_time):
        axes.grid(alpha=0.3)
        axes.set_xlim(left=0)
        axes.spines[["top", "right"]].set_visible(False)
    by_frames.legend(frameon=False)
    figure.savefig(output, dpi=150)

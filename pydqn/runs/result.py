"""The result of a run, and the error of one that diverged."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Result(NamedTuple):
    """The result of a run."""

    returns: list[float]  # the true return of every whole episode, in the order in which they ended
    steps: int
    frames: int
    updates: int
    seconds: float
    logdir: Path
    reason: str  # why the run ended, beginning with the name of the setting that ended it; or "interrupted"


class Diverged(RuntimeError):
    """A loss or a weight is no longer finite. Such numbers are never saved."""

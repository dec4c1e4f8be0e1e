"""What a run comes to: a result, what its learner has to tell meanwhile, or numbers that are not finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray


class Result(NamedTuple):
    """What a run came to."""

    returns: list[float]  # the true return of every whole episode, in the order in which they ended
    steps: int
    frames: int
    updates: int
    seconds: float
    logdir: Path
    reason: str  # why the run ended, beginning with the name of the setting that ended it; or "interrupted"


class Learned(NamedTuple):
    """What a learner has to tell. Numbers that have no value yet are NaN."""

    updates: int
    loss: float
    mean_q: float
    max_q: float
    grad_norm: float
    samples: dict[str, NDArray[Any]]  # for histograms


class Diverged(RuntimeError):
    """A loss or a weight is no finite number any more. Nothing of that is ever saved."""

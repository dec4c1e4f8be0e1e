"""Choosing, on this very GPU, the fastest form of a function that agrees with PyTorch's own."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

F = TypeVar("F")

REPLAYS = 50  # that are timed
_MOST_SECONDS = 15.0  # for all of them together
_TOLERANCE = 0.05  # TensorFloat-32, which PyTorch allows convolutions, has ten bits


class Trial(NamedTuple):
    """What became of a form."""

    name: str
    seconds: float | None  # per call; None if it was dropped
    reason: str = ""  # why it was dropped


class Disagreement(Exception):
    """A form computes something else than PyTorch."""


def choose(
    forms: Mapping[str, F], attempt: Callable[[str, F], float], clock: Callable[[], float] = time.perf_counter
) -> tuple[str, list[Trial]]:
    """Try forms; return the name of the fastest of those that work, and what became of each.

    Args:
        forms: by name; the first is PyTorch's own, which is taken if none works.
        attempt: returns the seconds that a form takes. Raises what it likes if it is not to be taken: `Disagreement`,
            or what a library raised.
        clock: seconds.
    """
    started, trials = clock(), list[Trial]()
    for name, form in forms.items():
        if clock() - started > _MOST_SECONDS:
            trials.append(Trial(name, None, f"not tried after {_MOST_SECONDS:g} seconds"))
            continue
        try:
            trials.append(Trial(name, attempt(name, form)))
        except Exception as error:  # whatever a driver, a compiler or a library does not like about this machine
            lines = str(error).strip().splitlines() or [""]
            trials.append(Trial(name, None, f"{type(error).__name__}: {lines[0]}"))
    times = {trial.name: trial.seconds for trial in trials if trial.seconds is not None}
    return min(times, key=times.__getitem__, default=next(iter(forms))), trials


def described(chosen: str, trials: Sequence[Trial]) -> str:
    """Say in one line what was chosen, and what became of the others."""
    parts = [
        f"{trial.name} {trial.seconds * 1e6:,.0f} us" if trial.seconds is not None else f"{trial.name} {trial.reason}"
        for trial in trials
    ]
    return f"{chosen} ({'; '.join(parts)})"


def require_agreement(found: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None]) -> None:
    """Compare tensors by name. The difference may be a twentieth of the norm, and its largest entry of the largest.

    Raises:
        Disagreement: it is larger, something is not finite, or a tensor is missing.
    """
    for name, other in expected.items():
        one = found[name]
        if one is None or other is None:
            if one is not other:
                raise Disagreement(f"{name} is missing")
            continue
        difference = one - other
        numbers = torch.stack([difference.norm(), other.norm(), difference.abs().max(), other.abs().max()]).tolist()
        for off, size in zip(numbers[::2], numbers[1::2], strict=True):
            if not off <= _TOLERANCE * size + 1e-12:
                raise Disagreement(f"{name} is off by {off / max(size, 1e-30):.3g} of its size")

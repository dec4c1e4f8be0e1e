"""Schedules: pure functions of the step."""

from __future__ import annotations


def linear(step: int, start: float, end: float, duration: int) -> float:
    """Return the value at `step` of a straight line from `start` to `end` over `duration` steps; `end` from then on."""
    if step >= duration:
        return end
    return start + (end - start) * step / duration

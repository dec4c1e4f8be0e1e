"""Hints at what a misspelt name may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping


def did_you_mean(name: str, known: Mapping[str, Iterable[str]], *, most: int = 3, likeness: float = 0.75) -> str:
    """Return "did you mean A or B?" with the names that are most like `name`, or "" where none is like it.

    Args:
        name: what was given.
        known: for each name that `name` is compared with, the names to propose.
        most: how many of `known` are proposed.
        likeness: how much they must be like `name`, from 0 to 1 (see `difflib`).
    """
    near = difflib.get_close_matches(name, known, n=most, cutoff=likeness)
    proposed = [proposal for match in near for proposal in known[match]]
    return f"did you mean {' or '.join(proposed[:4])}?" if proposed else ""

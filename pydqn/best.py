"""The best weights that a run has had so far, and their file."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydqn.checkpoint import load_weights, save_weights
from pydqn.files import Damaged

if TYPE_CHECKING:
    import torch

    Weights = dict[str, torch.Tensor]


class BestWeights:
    """Writes the best weights, but the next ones not before so many steps have gone by; they are copied meanwhile.

    Early in a run nearly every episode may bring a new best mean, and each write waits for the disk, and for the GPU.

    Args:
        path: of the file.
        every_steps: between one write and the next.
        check: returns the weights that may be written, or raises.
    """

    def __init__(self, path: Path, every_steps: int, check: Callable[[Weights], Weights]) -> None:
        self._path, self._every_steps, self._check = path, every_steps, check
        self._kept: tuple[Weights, dict[str, Any]] | None = None  # not written yet
        self._next = -math.inf  # steps

    def keep(self, weights: Weights, metadata: dict[str, Any]) -> None:
        """Take a copy of weights that are better than all before. On a GPU nothing waits for it."""
        self._kept = {name: tensor.detach().clone() for name, tensor in weights.items()}, metadata

    def write(self, steps: float = math.inf) -> None:
        """Write what is kept, if that is due after so many steps of the run; without them, in any case."""
        if self._kept is None or steps < self._next:
            return
        weights, metadata = self._kept
        save_weights(self._path, self._check(weights), metadata)
        self._kept = None
        self._next = max(metadata["steps"], steps if steps < math.inf else 0) + self._every_steps

    def mean_on_disk(self) -> float:
        """Return the mean return of the weights that are in the file; minus infinity where there is none."""
        with suppress(OSError, Damaged):
            mean = load_weights(self._path)[1].get("mean_return")
            return mean if isinstance(mean, float) else -math.inf
        return -math.inf

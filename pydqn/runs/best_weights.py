"""The best weights that a run has had so far, and their file."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydqn._util.files import Damaged
from pydqn._util.weights import load_weights, save_weights

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
        self._value = -math.inf  # of the weights in the file, or kept for it
        self._next = -math.inf  # steps

    def keep(self, weights: Weights, metadata: dict[str, Any]) -> None:
        """Take a copy of weights if they are better than those before. On a GPU nothing waits for it.

        Args:
            weights: they are as good as `metadata["best"]` says.
            metadata: what the file says beside them.
        """
        if metadata["best"] <= self._value:
            return
        self._value = metadata["best"]
        self._kept = {name: tensor.detach().clone() for name, tensor in weights.items()}, metadata

    def write(self, steps: float = math.inf) -> None:
        """Write what is kept, if that is due after so many steps of the run; without them, in any case."""
        if self._kept is None or steps < self._next:
            return
        weights, metadata = self._kept
        save_weights(self._path, self._check(weights), metadata)
        self._kept = None
        self._next = max(metadata["steps"], steps if steps < math.inf else 0) + self._every_steps

    def go_on(self, is_ours: Callable[[dict[str, Any]], bool]) -> None:
        """Take up the file when a run goes on: what is in it stays until it is beaten.

        Args:
            is_ours: whether weights with such metadata are those of the run's environment; others are removed.
        """
        with suppress(OSError, Damaged):
            metadata = load_weights(self._path)[1]
            if not is_ours(metadata):
                self._path.unlink()
            elif isinstance(value := metadata.get("best"), float):
                self._value = value

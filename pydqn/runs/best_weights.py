"""The best weights of a run so far, and their file."""

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
    """Keeps a copy of the best weights, and writes them at most once in a number of steps.

    Early in a run nearly every episode may bring a new best mean, and each write waits for the disk and the GPU.

    Args:
        path: the file.
        every_steps: steps between two writes.
        check: returns the weights, or raises if they must not be written.
    """

    def __init__(self, path: Path, every_steps: int, check: Callable[[Weights], Weights]) -> None:
        self._path, self._every_steps, self._check = path, every_steps, check
        self._kept: tuple[Weights, dict[str, Any]] | None = None  # not written yet
        self._value = -math.inf  # of the weights kept, or in the file
        self._next = -math.inf  # steps

    def keep(self, weights: Weights, metadata: dict[str, Any]) -> None:
        """Copy the weights if `metadata["best"]` is larger than before. Does not wait for a GPU."""
        if metadata["best"] <= self._value:
            return
        self._value = metadata["best"]
        self._kept = {name: tensor.detach().clone() for name, tensor in weights.items()}, metadata

    def write(self, steps: float = math.inf) -> None:
        """Write the copy, if there is one and enough steps have passed; without `steps`, in any case."""
        if self._kept is None or steps < self._next:
            return
        weights, metadata = self._kept
        save_weights(self._path, self._check(weights), metadata)
        self._kept = None
        self._next = max(metadata["steps"], steps if steps < math.inf else 0) + self._every_steps

    def resume(self, is_of_same_env: Callable[[dict[str, Any]], bool]) -> None:
        """Read the file of a resumed run: only better weights will replace it.

        Args:
            is_of_same_env: whether weights with this metadata were trained in the run's environment; the file is
                removed if not.
        """
        with suppress(OSError, Damaged):
            metadata = load_weights(self._path)[1]
            if not is_of_same_env(metadata):
                self._path.unlink()
            elif isinstance(value := metadata.get("best"), float):
                self._value = value

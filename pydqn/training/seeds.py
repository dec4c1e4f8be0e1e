"""The seeds of a training run."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Seeds(NamedTuple):
    """One seed for each source of randomness. Their order must not change, or a seed would give another run."""

    exploration: int
    evaluation: int
    envs: int
    replay: int
    network: int
    learner: int
    noise: int

    @classmethod
    def of(cls, seeds: np.random.SeedSequence) -> Seeds:
        """Draw the seeds."""
        return cls(*map(int, seeds.generate_state(7)))

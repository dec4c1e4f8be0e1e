"""What is random in a training run, each with a seed of its own."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Seeds(NamedTuple):
    """One for each thing that is random; the order is part of what a seed means."""

    own: int
    evaluation: int
    envs: int
    replay: int
    network: int

    @classmethod
    def of(cls, seeds: np.random.SeedSequence) -> Seeds:
        """Draw them."""
        return cls(*map(int, seeds.generate_state(5)))

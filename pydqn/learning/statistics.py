"""Statistics of an update."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from numpy.typing import NDArray


class Statistics(NamedTuple):
    """Numbers that describe the latest update. A number without a value is NaN."""

    loss: float  # weighted mean of the losses per sample
    mean_q: float  # mean over the batch of the values of the actions taken
    max_q: float  # largest action value of the batch
    grad_norm: float  # before clipping
    # For histograms: "loss_per_sample" (B,); "q_values" (B, A), if there are any; and of distributions of returns
    # "return_quantiles" (B, 21), those of the actions that were taken.
    samples: dict[str, NDArray[Any]]

    @classmethod
    def nothing(cls) -> Statistics:
        """Return the statistics before the first update."""
        return cls(math.nan, math.nan, math.nan, math.nan, {})

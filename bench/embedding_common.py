"""What the embedding_*.py scripts share: the command line, and the measurements, printed as one line of JSON."""

from __future__ import annotations

import argparse
import json
import resource
import time

import numpy as np
import psutil
import torch


def arguments(doc, buffers, steps, capacity):
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--buffer", choices=buffers, default=buffers[-1])
    parser.add_argument("--task", choices=("cartpole", "atari"), default="atari")
    parser.add_argument(
        "--steps", type=int, default=steps, help="with learning, after the buffer has been filled (atari)"
    )
    parser.add_argument("--total", type=int, default=100_000, help="steps in all (cartpole with TorchRL)")
    parser.add_argument("--capacity", type=int, default=capacity, help="transitions in the buffer (atari)")
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(1 if chosen.task == "cartpole" else 2)
    return chosen


class Meter:
    """Measures memory and time; to be made after the imports and before anything is built."""

    def __init__(self):
        self._before = psutil.Process().memory_info().rss
        self._started = None

    def learning(self):
        """Start the clock: the buffer is full, and the first update is next."""
        if self._started is None:
            self._filled = psutil.Process().memory_info().rss
            self._started = time.perf_counter()

    def report(self, steps, sample, buffer_bytes, returns):
        """Print the measurements; `sample` draws a batch."""
        seconds = time.perf_counter() - self._started
        for _ in range(20):
            sample()
        times = []
        for _ in range(200):
            started = time.perf_counter()
            sample()
            times.append(time.perf_counter() - started)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        line = {
            "steps_per_s": steps / seconds,
            "sample_ms": float(np.median(times)) * 1e3,
            "buffer_bytes": int(buffer_bytes),
            "filled_rss_mb": (self._filled - self._before) / 1e6,
            "peak_rss_mb": (peak - self._before) / 1e6,  # beyond that of the imports
            "return": float(np.mean(returns)) if len(returns) else None,
        }
        print(json.dumps(line))

"""The whole loop: environment steps with learning at the preset's replay ratio."""

from __future__ import annotations

import itertools

from pydqn import preset
from pydqn.training.loop import Run


def bench_pong_160_steps(benchmark, tmp_path):
    """Ten steps of 16 environments, about 27 updates."""
    config = preset("pong", learning_starts_steps=200, replay_capacity_frames=10_000, log_every_steps=200)
    with Run(config, tmp_path) as run:
        list(itertools.islice(run.reports(), 2))
        steps, updates = run.steps, run.updates

        def ten_steps():
            for _ in range(10):
                run.step()

        benchmark(ten_steps)
        done = (run.updates - updates) * config.train_period_steps
        assert abs((run.steps - steps) - done) < 32

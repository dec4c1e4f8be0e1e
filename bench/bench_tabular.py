"""FrozenLake: updates of the table with 20 test episodes after each; 1,000 with the model, 100 step by step."""

from __future__ import annotations

import numpy as np
import pytest

from pydqn import preset
from pydqn.envs.discrete import StateEnv
from pydqn.training.tabular import ModelledTask, SteppedTask, Trials


@pytest.mark.parametrize(("kind", "steps"), [("modelled", 1_000), ("stepped", 100)])
def bench_frozenlake(benchmark, kind, steps):
    config = preset("frozenlake")
    envs = StateEnv(config, 0), StateEnv(config, 1)
    generators = [np.random.default_rng(seed) for seed in (0, 1)]
    model = envs[0].model()
    task = (
        ModelledTask(model, envs[0].most_steps, config, generators)
        if kind == "modelled"
        else SteppedTask(envs, config, generators)
    )
    table = np.zeros((16, 4))
    # A table that plays well, whose test episodes are long.
    task.learn(table, np.ones(20_000), Trials(0, 0, 0, np.inf))
    outcome = benchmark(task.learn, table, np.ones(steps), Trials(0, 1, 20, np.inf))
    assert outcome.steps == steps
    assert 0 <= outcome.test_mean <= 1
    assert table[14].max() > 0.3  # next to the goal

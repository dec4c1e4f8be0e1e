"""Learning with each value representation: CartPole for 100,000 steps, and MinAtar's Breakout for 500,000.

    python bench/value_learning.py results/value-learning       # about three hours, two runs at a time
    python bench/value_learning.py DIR --tasks CartPole-v1 --seeds 1 --values scalar

Each run becomes DIR/TASK/VALUE-SEED.json with its settings, learning curve, evaluations (if its preset has any) and
final score: the mean return of 100 episodes of the final network, under the preset's protocol of evaluation. What is
there already is not run again. The run folders are kept in --runs. At the end, a table of means and standard
deviations over seeds is printed.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import time
from pathlib import Path

from classic_control import EPISODES, run_all

TASKS = {
    "CartPole-v1": {"preset": "dqn", "total_steps": 100_000},
    "MinAtar/Breakout-v0": {"preset": "minatar-dqn", "total_steps": 500_000},
}
SEEDS = {"CartPole-v1": [7, 8, 9], "MinAtar/Breakout-v0": [2, 3, 4]}  # nothing was chosen on these
_FEW_LEVELS = {"num_taus": 8, "num_target_taus": 8, "num_action_taus": 8}  # 64 of them take several times as long
# What differs from the task's preset. The support in Breakout is that of Revisiting Rainbow (Obando-Ceron and Castro
# 2021), which has no hl_gauss: as many bins as its atoms would be too coarse for returns of about 10.
VALUES: dict[str, dict[str, dict[str, object]]] = {
    "CartPole-v1": {
        "scalar": {},
        "categorical": {"value_min": 0.0, "value_max": 100.0},  # the sum of 0.99^t is 100
        "hl_gauss": {"value_min": 0.0, "value_max": 100.0},
        "quantile": {"num_quantiles": 50},
        "implicit_quantile": _FEW_LEVELS,
    },
    "MinAtar/Breakout-v0": {
        "scalar": {},
        "categorical": {"value_min": -100.0, "value_max": 100.0},
        "hl_gauss": {"value_min": -100.0, "value_max": 100.0, "num_atoms": 101},
        "quantile": {},
        "implicit_quantile": _FEW_LEVELS,
    },
}


def one(chosen):
    """Train and evaluate once, in this process; print a line of JSON."""
    import pydqn
    from pydqn.evaluation.evaluate import score

    (task,), (seed,), (value,) = chosen.tasks, chosen.seeds, chosen.values
    start = time.monotonic()
    settings = {**TASKS[task], "value": value, **VALUES[task][value]}
    name = settings.pop("preset")
    config = pydqn.preset(name, env_id=task, seed=seed, **settings, device="cpu", torch_threads=1)
    logdir = Path(chosen.runs) / task / f"{value}-{seed}"
    pydqn.train(config, logdir)
    with open(logdir / "progress.csv") as file:
        rows = list(csv.DictReader(file))
    curve = [[int(row["steps"]), float(row["mean_return"])] for row in rows if row["mean_return"]]
    evaluations = [[int(row["steps"]), float(row["evaluation_return"])] for row in rows if row["evaluation_return"]]
    returns = score(logdir, EPISODES, weights="last").returns
    done = {"task": task, "value": value, "seed": seed, "settings": {"preset": name, **settings}}
    done |= {"seconds": round(time.monotonic() - start, 1), "mean": statistics.mean(returns), "returns": returns}
    environment = json.loads((logdir / "environment.json").read_text())
    print(json.dumps({**done, "curve": curve, "evaluations": evaluations, "environment": environment}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="Where results are written.")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, help="(default: 7 to 9 in CartPole, 2 to 4 in Breakout)")
    parser.add_argument("--values", nargs="+", default=list(VALUES["CartPole-v1"]))
    parser.add_argument("--runs", default="runs/value-learning", help="Where the run folders are kept.")
    parser.add_argument("--at-once", type=int, default=2, help="How many runs at a time, one thread each.")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        one(chosen)
        return
    seeds = {task: chosen.seeds or SEEDS[task] for task in chosen.tasks}
    jobs = [(task, seed, value) for task in chosen.tasks for seed in seeds[task] for value in chosen.values]
    run_all(__file__, chosen, "--values", jobs)


if __name__ == "__main__":
    main()

"""Steps per second of a slow environment while learning: stepped in worker processes and in the main process, in turns.

    python bench/workers.py                          # about 3 minutes, on a machine that is otherwise quiet
    python bench/workers.py --seconds 1 --rounds 1   # checks that it runs

The environment is CartPole whose step waits 20 ms, as one that asks a server or a simulator in another process. The
preset is `dqn`: eight environments, double DQN, batches of 128, two hidden layers of 256.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from gymnasium.envs.classic_control import CartPoleEnv
from timing import Elsewhere

STEP_SECONDS = 0.02


class Slow(CartPoleEnv):
    """CartPole with slow steps."""

    def step(self, action):
        time.sleep(STEP_SECONDS)
        return super().step(action)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", type=int, default=8)
    parser.add_argument("--periods", type=float, nargs="+", default=[1.0, 2.0, 4.0], help="train_period_steps")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-o", "--output", help="JSON file for the rows, versions and machine")
    arguments = parser.parse_args()
    rows = []
    print(f"{'steps per update':>16s} {'in processes':>13s} {'in one':>8s} {'ratio':>6s}")
    for period in arguments.periods:
        rates = {"auto": [], 0: []}
        with ExitStack() as stack:
            runs = {}
            for workers in rates:
                runs[workers] = Elsewhere(steps_per_second, arguments.envs, workers, period, arguments.seconds)
                stack.callback(runs[workers].close)
            for _ in range(arguments.rounds):
                for workers, run in runs.items():
                    rates[workers].append(run())
        several, one = median(rates["auto"]), median(rates[0])
        named = {"in_processes": rates["auto"], "in_one": rates[0]}
        rows.append({"steps_per_update": period, "envs": arguments.envs, "ratio": several / one, **named})
        print(f"{period:16g} {several:13.1f} {one:8.1f} {several / one:6.2f}", flush=True)
    if arguments.output:
        from pydqn.runs.provenance import provenance

        about = {"date": datetime.date.today().isoformat(), **provenance()}
        Path(arguments.output).write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


def steps_per_second(num_envs, workers, period, seconds):
    """Return a function that trains for some seconds, with all that a step does, and returns steps per second."""
    from pydqn._util.machine import bound_spinning

    bound_spinning()  # before torch is imported
    from pydqn.envs.own import registered
    from pydqn.presets import preset
    from pydqn.training.benchmark import warm_run

    opened = ExitStack()
    own = opened.enter_context(registered(Slow, ""))
    config = preset("dqn", **own, num_envs=num_envs, env_workers=workers, train_period_steps=period)
    run = opened.enter_context(warm_run(config))

    def rate(opened=opened):  # keeps the run open
        run.step()
        steps, started = run.steps, time.perf_counter()
        while time.perf_counter() - started < seconds:
            run.step()
        return (run.steps - steps) / (time.perf_counter() - started)

    return rate


if __name__ == "__main__":
    main()

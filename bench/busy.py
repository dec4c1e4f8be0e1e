"""A preset's updates per second beside other busy processes, and the cost of bounded spinning on a quiet machine.

    python bench/busy.py                     # about 4 minutes, on a machine that is otherwise quiet
    python bench/busy.py --seconds 1 --rounds 1 --preset cartpole     # checks that it runs

Three runs take turns, each in its own process: as `pydqn train` starts them (waiting OpenMP threads soon sleep), with
`GOMP_SPINCOUNT` unset (waiting threads spin), and with one thread. Each is timed on the quiet machine, and beside one
and two busy processes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

from timing import Elsewhere

WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME", "KMP_LIBRARY")
SETTINGS = {"default": (True, 0), "GOMP_SPINCOUNT unset": (False, 0), "--torch-threads 1": (True, 1)}
BUSY = (0, 1, 2)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="pong")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-o", "--output", help="JSON file for the rows, versions and machine")
    arguments = parser.parse_args()
    for name in WAITING:
        os.environ.pop(name, None)
    rates = {(setting, busy): [] for setting in SETTINGS for busy in BUSY}
    with ExitStack() as stack:
        runs = {}
        for name, (bounded, threads) in SETTINGS.items():
            runs[name] = Elsewhere(updates_per_second, arguments.preset, bounded, threads, arguments.seconds)
            stack.callback(runs[name].close)
        for _ in range(arguments.rounds):
            for busy in BUSY:
                for name, run in runs.items():
                    with busy_processes(busy):
                        rates[name, busy].append(run())
    rows = [
        {
            "setting": name,
            "busy_processes": busy,
            "updates_per_second": median(rates[name, busy]),
            "all": rates[name, busy],
            "of_quiet": median(rates[name, busy]) / median(rates[name, 0]),
        }
        for name in SETTINGS
        for busy in BUSY
    ]
    print(f"{'setting':22s} {'busy processes':>14s} {'updates/s':>10s} {'of quiet':>9s}")
    for row in rows:
        print("{setting:22s} {busy_processes:14d} {updates_per_second:10.1f} {of_quiet:9.2f}".format(**row))
    spinning = median(rates["GOMP_SPINCOUNT unset", 0])
    print(f"quiet, default by GOMP_SPINCOUNT unset: {median(rates['default', 0]) / spinning:.2f}")
    if arguments.output:
        from pydqn.runs.provenance import provenance

        about = {"date": datetime.date.today().isoformat(), "preset": arguments.preset, **provenance()}
        Path(arguments.output).write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


def updates_per_second(preset_name, bounded, threads, seconds):
    """Return a function that trains for some seconds, with all that a step does, and returns updates per second."""
    if bounded:
        from pydqn._util.machine import bound_spinning

        bound_spinning()  # before torch is imported
    from pydqn.presets import preset
    from pydqn.training.benchmark import warm_run

    opened = warm_run(preset(preset_name, torch_threads=threads))
    run = opened.__enter__()

    def rate(opened=opened):  # keeps the run open
        run.step()
        updates, started = run.updates, time.perf_counter()
        while time.perf_counter() - started < seconds:
            run.step()
        return (run.updates - updates) / (time.perf_counter() - started)

    return rate


@contextmanager
def busy_processes(count):
    """Run `count` busy processes until the block ends."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=count_for_ever, daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    time.sleep(0.5 if processes else 0)  # until they have started
    try:
        yield
    finally:
        for process in processes:
            process.terminate()
            process.join()


def count_for_ever():
    number = 0
    while True:
        number += 1


if __name__ == "__main__":
    main()

"""How speed scales: with environments, batch size, buffer size, threads and parallel runs. Prints tables.

python bench/scaling.py -o bench/results/DATE-scaling.json --image docs/scaling.png    # about 6 minutes
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import json
import multiprocessing
import sys
import time
from pathlib import Path

import matplotlib as mpl
import numpy as np
import psutil
import torch
from other_libraries import BATCH, Pydqn

from pydqn import preset
from pydqn._util.files import write_json
from pydqn.runs.provenance import provenance
from pydqn.training.benchmark import measure

NUM_ENVS = (1, 2, 4, 8, 16, 32, 64, 128)
BATCHES = (32, 64, 128, 256, 512)
CAPACITIES = (10_000, 100_000, 1_000_000, 2_000_000, 4_000_000)
FRAME = 84 * 84


def stages(seconds, **settings):
    """Measure the preset `pong`, changed by `settings`: stage to rate per second."""
    rows = list(measure(preset("pong", **settings), seconds))
    return {row.stage.split(" ")[0].rstrip(","): row.per_second for row in rows if row.unit != "emulator frames"}


def table(title, rows):
    print(f"\n{title}")
    for setting, figures in rows:
        print(
            f"  {setting!s:>28s}  " + "  ".join(f"{name} {value:,.0f}" for name, value in figures.items()), flush=True
        )
    return [{"setting": setting, **figures} for setting, figures in rows]


def buffers():
    """Microseconds to sample 32 from full replay buffers; those that do not fit into memory are left out."""
    for size in CAPACITIES:
        if size * FRAME > 0.8 * psutil.virtual_memory().available:
            print(f"  (a buffer of {size:,} frames is left out: {size * FRAME / 1e9:.0f} GB do not fit)")
            continue
        buffer = Pydqn(size)
        for i in range(size + 1):
            buffer.add(i)
        spent = []
        for _ in range(1500):
            started = time.perf_counter()
            buffer.sample()
            spent.append(time.perf_counter() - started)
        yield size, {"us": float(np.median(spent)) * 1e6, "bytes/frame": buffer.replay.nbytes / size}
        del buffer


def loop(settings):
    """Steps per second of the whole loop."""
    return stages(4.0, **settings)["whole"]


def together(runs, threads):
    """Return the steps per second of each of several parallel runs."""
    settings = [{"seed": seed, "torch_threads": threads, "emulator_threads": threads} for seed in range(runs)]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(runs, mp_context=context) as pool:
        return list(pool.map(loop, settings))


def several():
    cores = torch.get_num_threads()
    for runs, threads in dict.fromkeys([(1, cores), (1, 1), (cores, cores), (cores, 1)]):
        each = together(runs, threads)
        name = f"{runs} run{'s' * (runs > 1)}, {threads} thread{'s' * (threads > 1)} each"
        yield name, {"steps/s each": float(np.mean(each)), "steps/s together": float(np.sum(each))}


def draw(results, path):
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    def column(sweep, name):
        return [row["setting"] for row in results[sweep]], [row[name] for row in results[sweep]]

    figure, panels = plt.subplots(2, 2, figsize=(10, 7.2), layout="constrained")
    envs, batches, ring, runs = panels.flat
    for name, label in (("environments", "environments alone"), ("whole", "whole loop, an update per 4 steps")):
        envs.plot(*column("envs", name), "o-", label=label)
    envs.set(xscale="log", yscale="log", xlabel="environments", ylabel="steps per second", title="Environments")
    sizes, rates = column("batch", "update")
    batches.plot(sizes, rates, "o-", label="updates")
    learned = [size * rate for size, rate in zip(sizes, rates, strict=True)]
    batches.plot(sizes, learned, "o-", label="transitions learned from")
    batches.set(xscale="log", yscale="log", xlabel="transitions per update", ylabel="per second", title="Batch")
    ring.plot(*column("ring", "us"), "o-", label="sample(32)")
    ring.set(xscale="log", xlabel="frames", ylabel="microseconds", title="Replay buffer", ylim=(0, None))
    names = [row["setting"].replace(", ", ",\n") for row in results["runs"]]
    totals, each = ([row[f"steps/s {kind}"] for row in results["runs"]] for kind in ("together", "each"))
    runs.bar(names, totals, color="C0", width=0.6, label="together")
    runs.bar(names, each, color="C1", width=0.3, label="each")
    runs.set(ylabel="steps per second", title="Parallel runs")
    for panel in panels.flat:
        panel.grid(alpha=0.3, axis="y" if panel is runs else "both")
        panel.legend(frameon=False)
        panel.spines[["top", "right"]].set_visible(False)
    for panel, ticks in ((envs, NUM_ENVS), (batches, BATCHES)):
        panel.set_xticks(ticks, list(map(str, ticks)))
        panel.minorticks_off()
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", help="JSON file")
    parser.add_argument("--image", help=".png, .svg or .pdf")
    parser.add_argument("--from-json", metavar="FILE", help="draw earlier results")
    parser.add_argument("--seconds", type=float, default=1.5, help="for each stage (default: 1.5)")
    arguments = parser.parse_args()
    if arguments.from_json:
        results = json.loads(Path(arguments.from_json).read_text())
    else:
        cores = torch.get_num_threads()
        several_threads = dict.fromkeys([(1, 1), (1, cores), (cores, 1), (cores, cores)])
        results = {
            "about": {"date": datetime.date.today().isoformat(), **provenance()},
            "envs": table("environments", [(n, stages(arguments.seconds, num_envs=n)) for n in NUM_ENVS]),
            "batch": table("batch", [(n, stages(arguments.seconds, batch_size=n)) for n in BATCHES]),
            "ring": table(f"replay buffer: sample({BATCH})", list(buffers())),
            "threads": table(
                "threads of PyTorch, of the emulators",
                [
                    (f"{a}, {b}", stages(arguments.seconds, torch_threads=a, emulator_threads=b))
                    for a, b in several_threads
                ],
            ),
        }
        torch.set_num_threads(cores)
        results["runs"] = table("parallel runs", list(several()))
    if arguments.output:
        write_json(arguments.output, results)
    if arguments.image:
        draw(results, arguments.image)
    return 0


if __name__ == "__main__":
    sys.exit(main())

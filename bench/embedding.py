"""Other libraries' trainers with their own buffers and with ours, in turns, each in its own process: ratios of medians.

    pip install -c constraints.txt -e '.[adapters,test]'
    python bench/embedding.py -o rows.json               # all four: half an hour on a quiet machine, 4 GB of memory
    python bench/embedding.py sb3 --steps 200 --capacity 2000 --rounds 1   # a quick trial

Prints, for each of their buffers, ours divided by theirs: below 1 is good for memory and sampling, above 1 for steps
per second.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from statistics import median

from pydqn.runs.provenance import provenance

LIBRARIES = {
    "sb3": ("stable-baselines3", ("own", "optimized", "pydqn")),
    "cleanrl": ("stable-baselines3", ("own", "optimized", "pydqn")),
    "torchrl": ("torchrl", ("own", "pydqn")),
    "tianshou": ("tianshou", ("own", "optimized", "pydqn")),
}
MEASURES = ("buffer_bytes", "filled_rss_mb", "sample_ms", "steps_per_s")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("libraries", nargs="*", metavar="LIBRARY", help=f"some of: {', '.join(LIBRARIES)}")
    parser.add_argument("--task", choices=("atari", "cartpole"), default="atari")
    parser.add_argument("--steps", type=int, default=1_500, help="with learning, after the buffer has been filled")
    parser.add_argument("--capacity", type=int, default=20_000, help="transitions in the buffer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-o", "--output", help="JSON file for the rows, versions and machine")
    chosen = parser.parse_args()
    unknown = sorted(set(chosen.libraries) - set(LIBRARIES))
    if unknown:
        parser.error(f"libraries: expected some of {', '.join(LIBRARIES)}, got {unknown[0]!r}")
    rows = []
    for library in chosen.libraries or LIBRARIES:
        package, buffers = LIBRARIES[library]
        lines = {buffer: [] for buffer in buffers}
        for turn in range(chosen.rounds):
            for buffer in buffers:
                lines[buffer].append(run(library, buffer, chosen, seed=turn + 1))
        about = {"library": f"{package} {version(package)}", "script": f"embedding_{library}.py", "task": chosen.task}
        rows += [{**about, "buffer": buffer, "runs": runs} for buffer, runs in lines.items()]
        table(library, lines)
        if chosen.output:
            settings = {"steps": chosen.steps, "capacity": chosen.capacity, "date": datetime.date.today().isoformat()}
            content = {"about": {**settings, **provenance()}, "rows": rows}
            Path(chosen.output).write_text(json.dumps(content, indent=1) + "\n")


def run(library, buffer, chosen, seed):
    script = Path(__file__).with_name(f"embedding_{library}.py")
    options = {"buffer": buffer, "task": chosen.task, "steps": chosen.steps, "capacity": chosen.capacity, "seed": seed}
    command = [
        sys.executable,
        str(script),
        *(part for name, value in options.items() for part in (f"--{name}", str(value))),
    ]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    line = json.loads(printed.splitlines()[-1])
    print(
        f"{library} {buffer:10s} " + ", ".join(f"{name} {value:.4g}" for name, value in line.items() if value),
        flush=True,
    )
    return line


def table(library, lines):
    ours = {name: median(run[name] for run in lines["pydqn"]) for name in MEASURES}
    for buffer in lines:
        if buffer != "pydqn":
            theirs = {name: median(run[name] for run in lines[buffer]) for name in MEASURES}
            ratios = ", ".join(f"{name} {ours[name] / theirs[name]:.3f}" for name in MEASURES if theirs[name])
            print(f"{library}: pydqn by {buffer}: {ratios}", flush=True)


if __name__ == "__main__":
    main()

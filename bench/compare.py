"""Compares every stage with other libraries: ratios of medians, each with its goal.

    pip install -c constraints.txt -e '.[test,peers]'
    python bench/compare.py                  # all stages: about 20 minutes on a quiet machine, 16 GB of memory
    python bench/compare.py update loop      # some of them

The libraries take turns, so that changes of the machine's speed affect all of them. A library that is not installed is
named and left out. Times are those of this machine; ratios carry over to others.
"""

from __future__ import annotations

import argparse
import datetime
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import stages_frames
import stages_learning
import stages_replay
from timing import ROWS, check_stages, head

from pydqn.runs.provenance import provenance

STAGES = {
    "start": stages_learning.start,
    "preprocess": stages_frames.preprocess,
    "emulators": stages_frames.emulators,
    "append": stages_replay.append,
    "prioritized": stages_replay.prioritized,
    "update": stages_learning.update,
    "loop": stages_learning.loop,
    "sample": stages_replay.sample,
}
LIBRARIES = ("stable-baselines3", "cpprb", "torchrl", "tianshou", "envpool", "opencv-python-headless", "ale-py")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"some of: {', '.join(STAGES)}")
    parser.add_argument("--quick", action="store_true", help="measure little, to see that it runs")
    parser.add_argument("-o", "--output", help="write the rows, versions and machine to this JSON file")
    arguments = parser.parse_args()
    check_stages(parser, arguments.stages, STAGES)
    head()
    for name in arguments.stages or STAGES:
        STAGES[name](arguments.quick)
        if arguments.output:
            about = {
                "date": datetime.date.today().isoformat(),
                **provenance(),
                "other_libraries": dict(map(installed, LIBRARIES)),
            }
            Path(arguments.output).write_text(json.dumps({"about": about, "rows": ROWS}, indent=1) + "\n")


def installed(name):
    try:
        return name, version(name)
    except PackageNotFoundError:
        return name, None


if __name__ == "__main__":
    main()

"""For every preset, the same seed gives the same run in another process, also if that is killed and resumed.

Another seed gives another run.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pydqn.presets import PRESETS

ROOT = Path(__file__).parents[2]

# A short run of each preset that learns and saves; with "killed" as the second argument, it is killed between the first
# checkpoint and the next one, and resumed.
PROGRAM = """
import csv, hashlib, json, sys, tempfile
from pathlib import Path

import torch

from pydqn import preset, resume
from pydqn.runs.checkpoint import latest_checkpoint, load_checkpoint
from pydqn.presets import PRESETS
from pydqn.training.start import open_run
from tests.helpers.runs import kill

CLOCK = {"seconds", "frames_per_second", "updates_per_second", "cpu_percent", "memory_mb", "memory_percent"}
SMALL = {
    "total_steps": 300, "learning_starts_steps": 60, "replay_capacity_frames": 2000, "max_episode_steps": 70,
    "checkpoint_every_steps": 120, "checkpoint_every_episodes": 0, "log_every_steps": 50, "log_every_episodes": 0,
    "video_every_episodes": 0, "epsilon_decay_steps": 200, "train_period_steps": 8.0,
    "device": "cpu", "torch_threads": 1,
}
LARGE = {"total_steps": 180, "checkpoint_every_steps": 100, "batch_size": 4, "num_taus": 4, "num_target_taus": 4}
TABLE = {"total_steps": 5000, "checkpoint_every_steps": 1500, "stop_evaluation_return": float("inf")}
for name in PRESETS:
    settings = TABLE if name == "frozenlake" else SMALL
    if PRESETS[name].config.total_steps == 50_000_000 and name != "nature":
        settings = {**SMALL, **LARGE, "num_envs": 2 if name == "btr" else 1}
    config = preset(name, seed=int(sys.argv[1]), **settings)
    total = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        if sys.argv[2] == "killed":
            run, after = open_run(config, folder), 1.25 * config.checkpoint_every_steps
            next(report for report in run.reports() if report.steps >= after)
            assert latest_checkpoint(folder).name.endswith(f"{config.checkpoint_every_steps}")
            kill(run)
            updates = resume(folder).updates
        else:
            with open_run(config, folder) as run:
                for report in run.reports():
                    pass
                updates = run.result().updates
        for file in ("progress.csv", "episodes.csv"):
            for row in csv.DictReader(open(Path(folder) / file)):
                total.update(repr([value for key, value in row.items() if key not in CLOCK]).encode())
        for key, tensor in sorted(load_checkpoint(latest_checkpoint(folder)).tensors.items()):
            total.update(key.encode() + tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    print(json.dumps([name, updates, total.hexdigest()]), flush=True)
"""


@pytest.fixture(scope="module")
def hashes():
    """Hashes of all presets' runs, by the seed and how they ran."""

    def start(seed, how):
        command = [sys.executable, "-c", PROGRAM, str(seed), how]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    # Two at a time, as nearly every machine has two cores.
    found = {}
    for pair in ([(0, "whole"), (0, "killed")], [(1, "whole")]):
        for key, process in [(key, start(*key)) for key in pair]:
            out, _ = process.communicate()
            assert process.returncode == 0
            found[key] = {name: (updates, digest) for name, updates, digest in map(json.loads, out.splitlines())}
    return found


@pytest.mark.parametrize("name", PRESETS)
def test_the_same_seed_is_the_same_run(hashes, name):
    updates, digest = hashes[0, "whole"][name]
    assert updates > 10
    assert (updates, digest) == hashes[0, "killed"][name]
    assert digest != hashes[1, "whole"][name][1]

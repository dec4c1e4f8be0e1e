"""For every preset, the same seed gives the same run in another process; another seed gives another run."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from pydqn.presets import PRESETS

# A short run of each preset that learns, evaluates and saves.
PROGRAM = """
import csv, hashlib, json, sys, tempfile
from pathlib import Path

import torch

from pydqn import preset
from pydqn.runs.checkpoint import latest_checkpoint, load_checkpoint
from pydqn.presets import PRESETS
from pydqn.training.start import open_run

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
    """Hashes of all presets' runs, by (seed, process)."""

    def start(seed):
        return subprocess.Popen([sys.executable, "-c", PROGRAM, str(seed)], stdout=subprocess.PIPE, text=True)

    # Two at a time, as nearly every machine has two cores.
    found = {}
    for pair in ([(0, "one"), (0, "other")], [(1, "one")]):
        for key, process in [(key, start(key[0])) for key in pair]:
            out, _ = process.communicate()
            assert process.returncode == 0
            found[key] = {name: (updates, digest) for name, updates, digest in map(json.loads, out.splitlines())}
    return found


@pytest.mark.parametrize("name", PRESETS)
def test_the_same_seed_is_the_same_run(hashes, name):
    updates, digest = hashes[0, "one"][name]
    assert updates > 10
    assert (updates, digest) == hashes[0, "other"][name]
    assert digest != hashes[1, "one"][name][1]

"""Small runs, and how tests compare and interrupt them."""

from __future__ import annotations

import hashlib
import os

from pydqn._util.weights import load_weights
from pydqn.runs.logs import Report

CARTPOLE = {
    "env_id": "CartPole-v1",
    "network": "mlp",
    "hidden_units": (32, 32),
    "stack": 1,
    "clip_rewards": False,
    "device": "cpu",
    "precision": "float32",
    "torch_threads": 1,
    "mean_episodes": 20,
    "n_step": 1,
    "stop_return": float("inf"),
}
SMALL = {**CARTPOLE, "total_steps": 300, "checkpoint_every_steps": 50, "learning_starts_steps": 20, "num_envs": 2}

# Columns of progress.csv that depend on the machine's speed and memory, and those that do not.
CLOCK = {"seconds", "frames_per_second", "updates_per_second", "cpu_percent", "memory_mb", "memory_percent"}
EXACT = [name for name in Report.__annotations__ if name not in CLOCK]


def digest(logdir):
    """Return a hash of weights and episodes, which is equal for equal runs."""
    weights, _ = load_weights(logdir / "weights" / "last.safetensors")
    total = hashlib.sha256()
    for name in sorted(weights):
        total.update(weights[name].numpy().tobytes())
    total.update((logdir / "episodes.csv").read_bytes())
    return total.hexdigest()


def kill(run):
    """Leave a run as SIGKILL would: what Python has buffered is not written."""
    with open(os.devnull, "w") as nowhere:
        for file in (run._log._progress_file, run._log._episodes_file):
            os.dup2(nowhere.fileno(), file.fileno())
    run._log.close()
    run.close()
    run._until_closed.close()
    run._folder_lock.release()  # as the operating system does

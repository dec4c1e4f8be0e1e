"""Functions of the user's that make environments, in other threads and processes, and in tasks of Ray."""

from __future__ import annotations

import importlib.util
import multiprocessing
import subprocess
import sys
import threading

import pytest

import pydqn
from tests.helpers.own import QUICK, own_ids, short_poles


def test_runs_in_threads_share_a_function(tmp_path):
    errors = []

    def go(name):
        try:
            pydqn.train(QUICK, tmp_path / name, make_env=short_poles)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=go, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert own_ids() == []
    weights = [(tmp_path / name / "weights" / "last.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]


def test_a_function_in_a_spawned_process(tmp_path):
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_train_there, args=(str(tmp_path),))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    assert (tmp_path / "weights" / "last.safetensors").exists()


def _train_there(folder):
    pydqn.train(QUICK, folder, make_env=short_poles)


SPAWNING_SCRIPT = """
import multiprocessing, sys

import gymnasium

import pydqn


class ShortPoles(gymnasium.Wrapper):  # of this script, which is not the main module of the process that trains
    def __init__(self):
        super().__init__(gymnasium.wrappers.TimeLimit(gymnasium.make("CartPole-v1"), 9))


def train(folder, workers):
    settings = {"total_steps": 200, "learning_starts_steps": 40, "hidden_units": (16,), "env_workers": workers}
    config = pydqn.preset("dqn", device="cpu", torch_threads=1, **settings)
    assert max(pydqn.train(config, folder, make_env=ShortPoles).returns) == 9.0


if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.starmap(train, [(folder, workers) for workers, folder in enumerate(sys.argv[1:])])
"""


def test_a_class_of_the_script_in_spawned_processes_with_workers(tmp_path):
    (tmp_path / "script.py").write_text(SPAWNING_SCRIPT)
    runs = [tmp_path / name for name in ("serial", "one", "two")]
    subprocess.run([sys.executable, tmp_path / "script.py", *runs], check=True, timeout=300)
    weights = [(run / "weights" / "last.safetensors").read_bytes() for run in runs]
    assert weights[0] == weights[1] == weights[2]


RAY_SCRIPT = """
import sys

import gymnasium
import ray

import pydqn


def make_env():  # of this script: a task gets it by value
    return gymnasium.wrappers.TimeLimit(gymnasium.make("CartPole-v1"), 9)


def train(folder, workers=0):
    settings = {"total_steps": 200, "learning_starts_steps": 40, "hidden_units": (16,), "env_workers": workers}
    config = pydqn.preset("dqn", env_id="own/make_env", device="cpu", torch_threads=1, **settings)
    return max(pydqn.train(config, folder, make_env=make_env).returns)


ray.init(_node_ip_address="127.0.0.2", include_dashboard=False, num_cpus=2)
task, (here, one, other) = ray.remote(train), sys.argv[1:]
assert ray.get([task.remote(one), task.remote(other, 2)]) == [9.0, 9.0] == 2 * [train(here)]
ray.shutdown()
"""


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs pip install ray")
def test_a_function_in_ray_tasks(tmp_path):
    """The runs are those of this process."""
    (tmp_path / "script.py").write_text(RAY_SCRIPT)
    runs = [tmp_path / name for name in ("here", "one", "other")]
    subprocess.run([sys.executable, tmp_path / "script.py", *runs], check=True, timeout=300)
    weights = [(run / "weights" / "last.safetensors").read_bytes() for run in runs]
    assert weights[0] == weights[1] == weights[2]

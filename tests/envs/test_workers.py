"""Environments in processes of their own are those of one process, bit for bit; a process that dies is named."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace

import gymnasium
import numpy as np
import psutil
import pytest
from gymnasium import spaces

import pydqn
from pydqn.cli.main import main
from pydqn.envs.checked import CloseWarning
from pydqn.envs.gym import GymEnvs
from pydqn.envs.make import make_envs
from pydqn.envs.workers import WorkerDied, WorkerEnvs

pytestmark = pytest.mark.skipif(os.name != "posix", reason="processes of environments need Linux or macOS")
QUICK = pydqn.Config(
    env_id="Odd-v0",
    **{"network": "auto", "hidden_units": (16,), "stack": 2, "num_envs": 5, "device": "cpu", "torch_threads": 1},
    **{"learning_starts_steps": 50, "batch_size": 8, "replay_capacity_frames": 600, "total_steps": 300},
    **{"checkpoint_every_steps": 0},
)


class Odd(gymnasium.Env):
    """Episodes of random lengths, with masks, an image and two numbers. May fail, end its process, or be slow."""

    observation_space = spaces.Dict(image=spaces.Box(0, 255, (12, 12), np.uint8), numbers=spaces.Box(-1, 1, (2,)))
    action_space = spaces.Discrete(4, start=2)
    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012

    def __init__(self, end="", after=40, seconds=0.0, render_mode=None):
        self.render_mode, self._end, self._after, self._seconds = render_mode, end, after, seconds
        self._count = 0

    def _seen(self):
        image = self.np_random.integers(0, 256, (12, 12), np.uint8)
        mask = self.np_random.random(4) < 0.7
        mask[self.np_random.integers(4)] = True
        self._mask = mask
        return {"image": image, "numbers": self.np_random.random(2, np.float32)}, {"action_mask": mask}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._seen()

    def step(self, action):
        assert self._mask[action - 2]
        time.sleep(self._seconds)
        self._count += 1
        if self._count == self._after:
            if self._end == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self._end == "exit":
                os._exit(3)
            if self._end == "raise":
                raise OSError("the simulator is gone")
        end = self.np_random.random()
        return *self._seen()[:1], self.np_random.normal(), end < 0.1, 0.1 <= end < 0.15, {"action_mask": self._mask}

    def render(self):
        return np.full((20, 30, 3), self._count, np.uint8)

    def close(self):
        if self._end == "close":
            raise RuntimeError("will not close")


@pytest.fixture(autouse=True)
def odd():
    gymnasium.register("Odd-v0", entry_point=Odd)
    yield
    gymnasium.registry.pop("Odd-v0")
    assert not [child for child in psutil.Process().children() if "pydqn.envs.workers" in " ".join(child.cmdline())]


def played(envs, steps=60):
    """Return all that environments give, over some steps and two seeds."""
    generator, slot = np.random.default_rng(0), np.zeros((envs.num_envs, *envs.frame_shape), envs.dtype)
    found = []
    for seed in (None, 7):
        envs.reset(slot, seed)
        found.append(slot.copy())
        for _ in range(steps):
            allowed = np.unpackbits(slot[:, -1:], axis=1, bitorder="little")[:, :4]
            envs.send(np.array([generator.choice(np.flatnonzero(row)) if row.any() else 0 for row in allowed]))
            step = envs.recv(slot)
            found += [slot.copy(), *step[:4], np.array(step.episodes), np.array(step.frames)]
    return found


@pytest.mark.parametrize("workers", [1, 2, 5, 9])
def test_the_same_as_in_one_process(workers):
    one, several = GymEnvs(QUICK, 5, 3), WorkerEnvs(QUICK, 5, 3, workers)
    try:
        for name in ("num_envs", "num_actions", "action_names", "layout", "frame_shape", "dtype", "fps"):
            assert getattr(one, name) == getattr(several, name)
        assert several.stepping == f"{min(workers, 5)} processes"
        for expected, found in zip(played(one), played(several), strict=True):
            np.testing.assert_array_equal(found, expected)
    finally:
        one.close()
        several.close()


def test_a_run_is_the_same_and_says_how_it_steps(tmp_path):
    weights = []
    for workers in (0, 3):
        run = pydqn.train(replace(QUICK, env_workers=workers), tmp_path / str(workers)).logdir
        weights.append((run / "weights" / "last.safetensors").read_bytes())
        about = json.loads((run / "environment.json").read_text())
        assert about.get("env_workers") == ("3 processes" if workers else None)
    assert weights[0] == weights[1]
    assert pydqn.resume(run, total_steps=350, env_workers=2).steps >= 350
    assert len(pydqn.evaluate(run, 3)) == 3
    *steps, _ = pydqn.play_episode(run, env_workers=1)
    assert steps[0].image.shape == (20, 30, 3)


@pytest.mark.parametrize(("seconds", "expected"), [(0.0, GymEnvs), (0.003, WorkerEnvs)])
def test_slow_environments_get_processes(seconds, expected):
    config = replace(QUICK, env_kwargs={"seconds": seconds})
    envs = make_envs(config, 3, 5)
    serial = GymEnvs(config, 3, 5)
    try:
        assert isinstance(envs, expected)
        if expected is WorkerEnvs:
            assert envs.stepping.startswith("3 processes (a step takes 3.")
        for one, other in zip(played(envs, 15), played(serial, 15), strict=True):  # measuring has changed nothing
            np.testing.assert_array_equal(one, other)
    finally:
        envs.close()
        serial.close()
    alone = make_envs(config, 1, 0)
    assert isinstance(alone, GymEnvs)
    alone.close()


@pytest.mark.parametrize(("end", "how"), [("kill", "by signal SIGKILL"), ("exit", "with exit code 3")])
def test_a_process_that_dies_is_named(tmp_path, end, how):
    config = replace(QUICK, env_kwargs={"end": end}, env_workers=2)
    with pytest.raises(
        WorkerDied, match=rf"^env_id: Odd-v0, env indices [02] to [14]: the process \(pid \d+\) ended {how};"
    ):
        pydqn.train(config, tmp_path)
    assert (tmp_path / "weights" / "last.safetensors").exists()


def test_an_error_is_that_of_one_process(tmp_path):
    messages = []
    for workers in (0, 2):
        with pytest.raises(RuntimeError, match=r"^env_id: Odd-v0, env index \d .*step 40: .*the simulator") as error:
            pydqn.train(replace(QUICK, env_kwargs={"end": "raise"}, env_workers=workers), tmp_path / str(workers))
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    with pytest.raises(ValueError, match="^env_id: Gymnasium knows no 'Od-v0'"):
        WorkerEnvs(replace(QUICK, env_id="Od-v0"), 2, 0, 2)
    with pytest.raises(RuntimeError, match="unexpected keyword argument 'sise'"):
        WorkerEnvs(replace(QUICK, env_kwargs={"sise": 3}), 2, 0, 2)


@pytest.mark.parametrize("end", ["kill", "raise"])
def test_processes_are_replaced(tmp_path, end):
    """No transition leads from a lost episode into the new one."""
    config = replace(QUICK, env_kwargs={"end": end}, restart_envs=True)  # implies processes
    with pytest.warns(RuntimeWarning, match="^replaced: env_id: Odd-v0, env ind"):
        result = pydqn.train(config, tmp_path)
    assert result.steps >= 300
    envs = WorkerEnvs(replace(config, env_kwargs={"end": end, "after": 8}), 2, 0, 2)
    slot = np.zeros((2, *envs.frame_shape), envs.dtype)
    envs.reset(slot)
    lost = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(40):
            allowed = np.unpackbits(slot[:, -1:], axis=1, bitorder="little")[:, :4]
            envs.send(allowed.argmax(axis=1))
            before = [worker._process.pid for worker in envs._workers]
            step = envs.recv(slot)
            replaced = [worker._process.pid != pid for worker, pid in zip(envs._workers, before, strict=True)]
            lost += sum(replaced)
            assert step.first[replaced].all()
            assert not (step.terminated | step.truncated)[replaced].any()
            assert not step.reward[replaced].any()
    envs.close()
    assert lost >= 4


def test_the_command_takes_a_number_or_auto(tmp_path, capsys):
    given = ["train", "dqn", "--total-steps", "8", "--device", "cpu", "--logdir", str(tmp_path / "run")]
    assert main([*given, "--env-workers", "auto"]) == 0
    assert main([*given[:-1], str(tmp_path / "other"), "--env-workers", "2"]) == 0
    assert "env_workers 2 processes" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*given, "--env-workers", "all"])
    assert "argument --env-workers: invalid integer value: 'all'" in capsys.readouterr().err


def test_atari_games_have_threads_instead():
    with pytest.raises(ValueError, match="^env_workers: expected auto or 0 for pong, got 2: Atari's emulators"):
        make_envs(pydqn.Config(env_id="pong", env_workers=2), 2, 0)


def test_what_close_says_is_a_warning():
    envs = WorkerEnvs(replace(QUICK, env_kwargs={"end": "close"}), 2, 0, 1)
    with pytest.warns(CloseWarning, match=r"env index \d .*close\(\) failed: RuntimeError: will not close"):
        envs.close()


def test_a_script_without_a_guard_and_ctrl_c(tmp_path):
    """Its environment is sent by value; its own lines run once. Ctrl-C, which all processes get, saves the run."""
    script = tmp_path / "script.py"
    script.write_text(f"""
import time, gymnasium, numpy as np, pydqn
print("once", flush=True)

class Mine(gymnasium.Env):
    observation_space, action_space = gymnasium.spaces.Box(-1, 1, (2,)), gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {{}}

    def step(self, action):
        time.sleep(0.003)
        return np.zeros(2, np.float32), 0.0, self.np_random.random() < 0.1, False, {{}}

config = pydqn.preset("dqn", total_steps=10**6, device="cpu", torch_threads=1, learning_starts_steps=100)
for report in pydqn.run(config, {str(tmp_path / "first")!r}, make_env=Mine):
    break
print("ready", flush=True)
pydqn.train(config, {str(tmp_path / "run")!r}, make_env=Mine)
""")
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    lines = [process.stdout.readline().strip() for _ in range(2)]
    assert lines == ["once", "ready"]
    while not (tmp_path / "run" / "config.json").exists():
        time.sleep(0.1)
    time.sleep(5)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors
    assert (tmp_path / "run" / "weights" / "last.safetensors").exists()
    about = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert about["env_workers"].startswith("4 processes (a step takes 3.")


def test_workers_end_with_their_run(tmp_path):
    """Also if the run is killed."""
    program = """
import pydqn, time
from tests.envs import test_workers as here
import gymnasium
gymnasium.register("Odd-v0", entry_point=here.Odd)
envs = here.WorkerEnvs(here.QUICK, 2, 0, 2)
print(*[worker._process.pid for worker in envs._workers], flush=True)
time.sleep(100)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2
    process.kill()
    process.wait()
    end = time.monotonic() + 20
    while any(map(psutil.pid_exists, pids)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(map(psutil.pid_exists, pids))

"""Runs that end early: signals, numbers that are not finite, environments that fail."""

from __future__ import annotations

import dataclasses
import errno
import math
import os
import signal
import threading

import gymnasium
import numpy as np
import pytest
import torch

from pydqn import preset, resume, train
from pydqn.cli.main import main
from pydqn.config import Config
from pydqn.envs.make import make_envs
from pydqn.learning.policy import Policy
from pydqn.runs.checkpoint import checkpoints, latest_checkpoint, load_checkpoint, read_state
from pydqn.runs.locks import FolderLock
from pydqn.runs.logs import read_csv
from pydqn.runs.result import Diverged
from pydqn.training.loop import Run
from pydqn.training.signals import deferred
from pydqn.training.start import open_run
from tests.helpers.runs import SMALL


@pytest.fixture
def small():
    return preset("pong", **SMALL, log_every_steps=20, prioritized=False)


# --- signals ---


@pytest.fixture(autouse=True)
def _python_takes_interrupts():
    """As in a foreground process: a shell lets background processes ignore them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_run_stops_after_its_step(small, tmp_path):
    with Run(small, tmp_path) as run:
        for report in run.reports():
            if report.steps >= 100:
                run.stop()
    assert run.stopped
    state = read_state(latest_checkpoint(tmp_path))
    assert state["steps"] == run.steps == read_csv(tmp_path / "progress.csv")["steps"][-1]
    assert 100 <= run.steps < 110
    assert state["finished"] is False
    assert resume(tmp_path).steps >= 300


def test_a_finished_run_was_not_stopped(small, tmp_path):
    with Run(small, tmp_path) as run:
        for report in run.reports():
            if report.steps >= 300:
                run.stop()
    assert not run.stopped


def test_an_evaluation_does_not_hold_up_a_stop(small, tmp_path, monkeypatch):
    """It counts as not done, and is made when the run is resumed."""
    config = dataclasses.replace(small, evaluation_every_steps=100, evaluation_episodes=50)
    policy_values, asked = Policy.values, []
    with Run(config, tmp_path) as run:

        def values(self, obs):  # called in evaluations
            asked.append(run.steps)
            if len(asked) == 5:
                run.stop()
            return policy_values(self, obs)

        monkeypatch.setattr(Policy, "values", values)
        list(run.reports())
    assert run.stopped
    assert len(asked) == 5
    assert run.steps == asked[0]
    assert math.isnan(run._evaluation)
    monkeypatch.undo()
    with Run(config, tmp_path, resume=True) as run:
        for report in run.reports():
            if report.steps > asked[0]:
                break
    assert not math.isnan(run._evaluation)


def test_a_table_stops_too(tmp_path):
    config = preset("frozenlake", total_steps=100_000, stop_evaluation_return=math.inf, evaluation_every_steps=0)
    with open_run(config, tmp_path) as run:
        for report in run.reports():
            if report.steps >= 5_000:
                run.stop()
    assert run.stopped
    assert read_state(latest_checkpoint(tmp_path))["steps"] == run.steps < 10_000


def signal_in_step(monkeypatch, number):
    """Send a signal in the middle of a step; returns a list of `run.steps` after each completed step."""
    learn, step, whole = Run._learn, Run.step, []

    def interrupted(self):
        if len(whole) == 37:
            os.kill(os.getpid(), number)
        learn(self)

    monkeypatch.setattr(Run, "_learn", interrupted)
    monkeypatch.setattr(Run, "step", lambda self: (step(self), whole.append(self.steps)))
    return whole


def test_signals_wait_until_the_run_is_saved(small, tmp_path, monkeypatch):
    """`train` handles them, and raises them again when everything is saved."""
    whole = signal_in_step(monkeypatch, signal.SIGINT)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(small, tmp_path)
    assert len(whole) == 38
    assert read_state(latest_checkpoint(tmp_path))["steps"] == whole[-1]
    assert signal.getsignal(signal.SIGINT) is before


def test_sigterm_reaches_the_caller(small, tmp_path, monkeypatch):
    received, whole = [], signal_in_step(monkeypatch, signal.SIGTERM)
    before = signal.signal(signal.SIGTERM, lambda *_: received.append(latest_checkpoint(tmp_path).name))
    try:
        train(small, tmp_path)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [f"step-{whole[-1]:012d}"]


def test_an_interrupt_in_the_middle_of_a_step_saves_nothing(small, tmp_path, monkeypatch):
    """After a KeyboardInterrupt, weights may be half of an update."""
    whole = signal_in_step(monkeypatch, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Run(small, tmp_path) as run:
        list(run.reports())
    assert read_state(latest_checkpoint(tmp_path))["steps"] < whole[-1]
    assert not (tmp_path / "weights" / "last.safetensors").exists()
    monkeypatch.undo()
    assert resume(tmp_path).steps >= 300


def test_ignored_signals_stay_ignored():
    """As under nohup."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with deferred() as signals:
            os.kill(os.getpid(), signal.SIGINT)
        assert signals.received is None
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_second_signal_ends_it_at_once():
    with pytest.raises(KeyboardInterrupt), deferred() as signals:
        signals.stop = lambda: None
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)


def test_other_threads_leave_signals_alone():
    before, inside = signal.getsignal(signal.SIGTERM), []

    def look():
        with deferred():
            inside.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert inside == [before]


# --- numbers that are not finite ---


@pytest.mark.parametrize("prioritized", [False, True])
@pytest.mark.parametrize("where", ["errors", "weights"])
def test_a_run_that_diverges_stops_and_keeps_its_checkpoints(small, tmp_path, prioritized, where):
    config = dataclasses.replace(small, prioritized=prioritized)
    run = Run(config, tmp_path)
    with pytest.raises(Diverged) as raised, run:
        for report in run.reports():
            if report.steps >= 110:
                with torch.no_grad():
                    for parameter in run.learner.online.parameters():
                        parameter.fill_(math.nan if where == "weights" else 1e30)
                    run.learner._optimizer.refresh()
                good = latest_checkpoint(tmp_path)
    message = str(raised.value)
    assert "the learning rate is" in message
    assert f"the last good checkpoint is {good}" in message
    assert latest_checkpoint(tmp_path) == good
    for path in checkpoints(tmp_path):
        tensors = load_checkpoint(path).tensors
        assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    assert not (tmp_path / "weights" / "last.safetensors").exists()
    assert resume(tmp_path).steps >= 300


def test_a_learning_rate_that_is_far_too_large(tmp_path, capsys):
    """On the command line."""
    options = [
        *("--learning-rate", "1e30", "--optimizer", "rmsprop", "--max-grad-norm", "0", "--loss", "mse"),
        *("--checkpoint-every-steps", "20", "--total-steps", "2000", "--learning-starts-steps", "100"),
        *("--device", "cpu", "--torch-threads", "1", "--precision", "float32"),
    ]
    assert main(["train", "cartpole", *options, "--logdir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "pydqn: error: diverged at step " in error
    assert "the loss of update" in error
    assert f"pydqn train --resume {tmp_path}" in error
    assert "Traceback" not in error


def test_weights_that_are_not_finite_are_not_saved(small, tmp_path):
    run = Run(small, tmp_path)
    with pytest.raises(Diverged, match=r"holds a number that is not finite"), run:
        for report in run.reports():
            if report.steps >= 120:
                with torch.no_grad():
                    next(iter(run.learner.target.parameters())).fill_(math.inf)
                good = checkpoints(tmp_path)
                run._checkpoint()
    assert checkpoints(tmp_path) == good


def test_a_table_that_diverges(tmp_path):
    run = open_run(preset("frozenlake", total_steps=10_000, checkpoint_every_steps=2_000), tmp_path)
    with pytest.raises(Diverged, match=r"online.values holds a number that is not finite"), run:
        for report in run.reports():
            if report.steps >= 3_000:
                run.table[0, 0] = math.nan
    assert load_checkpoint(latest_checkpoint(tmp_path)).state["steps"] == 2_000


# --- environments ---


class Failing(gymnasium.Env):
    """Fails at the fifth step of its second episode, or gives a reward that is NaN."""

    observation_space = gymnasium.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)
    made = 0

    def __init__(self, how="raise", env_index=2):
        self.number, Failing.made = Failing.made, Failing.made + 1
        self.how, self.failing, self.steps = how, env_index, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(3, np.float32), {}

    def step(self, action):
        self.steps += 1
        reward = 1.0
        if self.number == self.failing and self.steps == 25:
            if self.how == "raise":
                raise OSError("the console has caught fire")
            reward = math.nan
        return np.zeros(3, np.float32), reward, self.steps % 20 == 0, False, {}


@pytest.fixture
def failing():
    Failing.made = 0
    gymnasium.register("pydqn-test/Failing-v0", Failing)
    yield "pydqn-test/Failing-v0"
    del gymnasium.registry["pydqn-test/Failing-v0"]


def test_an_environment_that_fails_is_named(failing, small, tmp_path):
    config = dataclasses.replace(small, env_id=failing, num_envs=4, checkpoint_every_steps=0)
    run = Run(config, tmp_path)
    seeds = run.envs._seeds
    with pytest.raises(RuntimeError) as raised, run:
        list(run.reports())
    assert str(raised.value) == (
        f"env_id: {failing}, env index 2 (seed {seeds[2]}), step 25: "
        "step() failed: OSError: the console has caught fire"
    )
    assert isinstance(raised.value.__cause__, OSError)
    # All steps before the one that failed are saved.
    state = read_state(latest_checkpoint(tmp_path))
    assert state["steps"] == run.steps == read_csv(tmp_path / "progress.csv")["steps"][-1]
    Failing.made = 10
    assert resume(tmp_path).steps >= 300


@pytest.mark.parametrize("place", ["save_weights", "save_checkpoint", "RunLog.close"])
def test_a_full_disk_does_not_hide_what_failed_first(failing, small, tmp_path, monkeypatch, place):
    """The environment's failure is the error, the disk's is a warning."""
    run = Run(dataclasses.replace(small, env_id=failing, num_envs=4, checkpoint_every_steps=0), tmp_path)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(f"pydqn.training.base.{place}", full)
    warned = pytest.warns(UserWarning, match=r"^not everything could be saved: .*No space left on device")
    with warned, pytest.raises(RuntimeError, match="step 25: .* the console has caught fire"), run:
        list(run.reports())
    monkeypatch.undo()
    run._log.close()
    FolderLock(tmp_path).release()  # the folder is not locked any more


def test_a_full_disk_is_an_error_where_nothing_failed_before(small, tmp_path, monkeypatch):
    run = Run(small, tmp_path)
    monkeypatch.setattr(
        "pydqn.training.base.save_weights", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full"))
    )
    with pytest.raises(OSError, match="full"), run:
        run.stop()


def test_a_reward_that_is_not_finite_is_refused(failing, small, tmp_path, monkeypatch):
    monkeypatch.setattr(Failing.__init__, "__defaults__", ("nan", 1))
    config = dataclasses.replace(small, env_id=failing, checkpoint_every_steps=0)
    with pytest.raises(
        RuntimeError, match=r"env index 1 \(seed \d+\), step 25: step\(\) returned a reward that is not finite: nan"
    ):
        train(config, tmp_path)


def test_an_observation_that_is_not_finite_is_refused(failing, small, tmp_path, monkeypatch):
    """Before it is stored in the replay buffer."""
    step = Failing.step
    monkeypatch.setattr(Failing, "observation_space", gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32))
    monkeypatch.setattr(
        Failing, "step", lambda self, action: (np.array([0, math.inf, 0], np.float32), *step(self, action)[1:])
    )
    config = dataclasses.replace(small, env_id=failing, checkpoint_every_steps=0)
    with pytest.raises(
        RuntimeError, match=r"env index 0 \(seed \d+\), step 1: returned an observation that is not finite"
    ):
        train(config, tmp_path)


def test_a_table_names_its_environment(failing, tmp_path, monkeypatch):
    monkeypatch.setattr(Failing, "observation_space", gymnasium.spaces.Discrete(3))
    monkeypatch.setattr(Failing, "reset", lambda self, *, seed=None, options=None: (0, {}))
    monkeypatch.setattr(Failing, "step", lambda self, action: 1 / 0)
    config = Config(agent="tabular", env_id=failing, num_envs=1, total_steps=100)
    with pytest.raises(RuntimeError, match=r"env index 0 \(seed \d+\), step 1: step\(\) failed: ZeroDivisionError"):
        train(config, tmp_path)


@pytest.mark.parametrize("when", ["reset", "send", "recv"])
def test_an_emulator_that_fails_is_named_as_far_as_it_can_be(tiny, when):
    envs = make_envs(tiny, 2, 0)
    frames = np.zeros((2, 84, 84), np.uint8)
    envs.reset(frames)

    def fail(*_, **__):
        raise RuntimeError("illegal instruction")

    class Broken:
        num_envs = 2
        reset = envs._env.reset if when != "reset" else fail
        send = envs._env.send if when != "send" else fail
        recv = envs._env.recv if when != "recv" else fail
        close = envs._env.close

    for name in ("reset", "send", "recv"):
        setattr(Broken, name, staticmethod(getattr(Broken, name)))
    envs._env = Broken()
    seeds = envs._seeds
    with pytest.raises(RuntimeError) as raised:
        envs.reset(frames)
        envs.send(np.zeros(2, np.int64))
        envs.recv(frames)
    assert str(raised.value) == (
        f"env_id: pong failed in one of the environments 0 (seed {seeds[0]}), 1 (seed {seeds[1]}): illegal instruction"
    )

"""The best weights are written rarely, but never late."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch

from pydqn import preset, resume, train
from pydqn._util import weights as weights_module
from pydqn._util.weights import load_weights
from pydqn.runs.best_weights import BestWeights
from pydqn.runs.result import Diverged
from pydqn.training.loop import Run
from pydqn.training.start import open_run
from tests.helpers.runs import kill

BEST = "weights/best.safetensors"
EVERY = 100  # steps
SETTINGS = {
    **{"env_id": "pydqn-test/Rising-v0", "total_steps": 600, "stop_successes": 0, "success_steps": 0},
    **{"max_episode_steps": 0, "hidden_units": (8,), "device": "cpu", "torch_threads": 1, "mean_episodes": 1},
    **{"log_every_steps": EVERY, "log_every_episodes": 0, "checkpoint_every_steps": 0},
}


class Rising(gymnasium.Env):
    """Episodes of five steps, each worth more than the one before."""

    observation_space = gymnasium.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)
    episodes = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.episodes = 0, self.episodes + 1
        return self.np_random.random(3, np.float32), {}

    def step(self, action):
        self.steps += 1
        return self.np_random.random(3, np.float32), float(self.episodes), self.steps == 5, False, {}


@pytest.fixture(autouse=True, scope="module")
def _rising():
    gymnasium.register("pydqn-test/Rising-v0", Rising)
    yield
    del gymnasium.registry["pydqn-test/Rising-v0"]


@pytest.fixture
def config():
    return preset("cartpole", **SETTINGS)


@pytest.fixture
def written(monkeypatch):
    """A list with one entry for each time that best weights are written."""
    paths, write = [], weights_module.atomic_write

    def counted(path):
        if str(path).endswith(BEST):
            paths.append(path)
        return write(path)

    monkeypatch.setattr(weights_module, "atomic_write", counted)
    return paths


def test_a_run_that_always_improves_writes_rarely(config, tmp_path, written):
    train(config, tmp_path)
    metadata = load_weights(tmp_path / BEST)[1]
    assert (metadata["steps"], metadata["mean_return"]) == (600, 600.0)
    assert len(written) == 7  # the first, after every hundred steps, and at the end


def test_the_weights_written_are_those_that_were_best(config, tmp_path, monkeypatch):
    """Not the current ones at the time of writing."""
    kept, keep, step = {}, BestWeights.keep, Run.step

    def keep_and_note(self, weights, metadata):
        kept[metadata["steps"]] = {name: tensor.clone() for name, tensor in weights.items()}
        keep(self, weights, metadata)

    def step_and_look(self):
        step(self)
        if kept:
            weights, metadata = load_weights(tmp_path / BEST)
            assert all(torch.equal(weights[name], tensor) for name, tensor in kept[metadata["steps"]].items())
            assert metadata["steps"] >= max(steps for steps in kept if steps <= max(5, self.steps - EVERY))

    monkeypatch.setattr(BestWeights, "keep", keep_and_note)
    monkeypatch.setattr(Run, "step", step_and_look)
    train(config, tmp_path)
    assert len(kept) == 120


def test_they_are_written_before_checkpoints_and_at_the_end(config, tmp_path):
    """Also if an error ends the run."""

    def on_disk(name):
        return load_weights(tmp_path / name / BEST)[1]["steps"]

    run = Run(config, tmp_path / "failed")
    with pytest.raises(OSError, match="a cable has come loose"), run:
        next(run.reports())
        assert (run.steps, on_disk("failed")) == (100, 5)
        run._checkpoint()
        assert on_disk("failed") == 100
        while run.steps < 170:
            run.step()
        assert on_disk("failed") == 100
        raise OSError("a cable has come loose")
    assert on_disk("failed") == 170
    with Run(config, tmp_path / "stopped") as run:
        next(run.reports())
        run.stop()
    assert on_disk("stopped") == 100


def test_a_run_that_diverges_keeps_the_best_from_before(config, tmp_path):
    run = Run(config, tmp_path)
    with pytest.raises(Diverged, match="a loss"), run:
        reports = run.reports()
        next(reports)
        while run.steps < 170:
            run.step()
        with torch.no_grad():
            next(iter(run.learner.online.parameters())).fill_(np.nan)
        raise run._diverged("a loss is not finite")
    weights, metadata = load_weights(tmp_path / BEST)
    assert metadata["steps"] == 170
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    assert not (tmp_path / "weights" / "last.safetensors").exists()


def test_best_weights_that_have_diverged_are_not_written(config, tmp_path):
    with pytest.raises(Diverged, match="a loss"), Run(config, tmp_path) as run:
        next(run.reports())
        with torch.no_grad():
            next(iter(run.learner.online.parameters())).fill_(np.nan)
        run._keep_if_best(1e6)
        raise run._diverged("a loss is not finite")
    assert load_weights(tmp_path / BEST)[1]["steps"] == 5


def test_a_run_that_is_killed_ends_with_the_same_best_weights(tmp_path):
    config = preset("cartpole", **{**SETTINGS, "env_id": "CartPole-v1", "checkpoint_every_steps": 150})
    train(config, tmp_path / "whole")
    for number, steps in enumerate((190, 320, 400, 470)):
        run = Run(config, tmp_path / "killed", resume=number > 0)
        reports = run.reports()
        next(reports)
        while run.steps < steps:
            next(reports)
        kill(run)
    resume(tmp_path / "killed")
    assert (tmp_path / "killed" / BEST).read_bytes() == (tmp_path / "whole" / BEST).read_bytes()


def test_tables_write_rarely_too(tmp_path, written):
    """At first, every test is better than the one before."""
    config = preset("frozenlake", total_steps=3_000, evaluation_every_steps=1, stop_evaluation_return=2.0)
    with open_run(config, tmp_path) as run:
        reports = run.reports()
        next(reports)
        keep, kept = run._best_weights.keep, []
        run._best_weights.keep = lambda *those: (kept.append(those[1]), keep(*those))
        for _ in reports:
            pass
    assert load_weights(tmp_path / BEST)[1] == kept[-1]
    assert len(written) <= min(len(kept), 5)

"""Resuming with other settings: what is refused, with which advice, and what is not."""

from __future__ import annotations

import dataclasses
import math
import re
import shlex

import gymnasium
import numpy as np
import pytest

from pydqn import preset, resume, train
from pydqn._util.files import read_json, write_json
from pydqn._util.weights import load_weights
from pydqn.cli.main import main
from pydqn.config import RENAMED, TRANSITIONS, Config
from pydqn.learning.policy import resolve_device
from pydqn.runs.checkpoint import latest_checkpoint, read_state
from pydqn.runs.layout import load_run
from pydqn.runs.logs import read_csv
from pydqn.runs.resuming import changes, transition_settings
from pydqn.training.loop import Run

WITHOUT = "--no-checkpoint-replay (in Python checkpoint_replay=False) resumes with an empty replay buffer"
SMALL = {
    **{"env_id": "pydqn-test/One-v0", "total_steps": 60, "stop_successes": 0, "success_steps": 0, "num_envs": 2},
    **{"max_episode_steps": 0, "hidden_units": (8,), "device": "cpu", "torch_threads": 1, "mean_episodes": 2},
    **{"skip_first_steps": 0, "replay_capacity_frames": 500, "checkpoint_every_steps": 1_000},
}

OLD_NAMES = {new: old for old, new in RENAMED.items()}
# Another value of each field on which stored transitions depend.
OTHERS = {
    **{"env_id": "pydqn-test/Two-v0", "clip_rewards": True, "success_steps": 5, "terminal_on_life_loss": True},
    **{"full_action_space": True, "preprocess": "crop_area", "max_pool": False, "frame_skip": 2, "frame_skip_max": 7},
    **{"sticky_actions": 0.25, "env_kwargs": '{"reward": 2}', "input_scaling": "none"},
}
# Another value of each setting of the replay buffer, and the buffer's own name for it.
OF_REPLAY = {
    **{"replay_capacity_frames": ("capacity", 300), "stack": ("stack", 2), "n_step": ("n_step", 3)},
    **{"gamma": ("gamma", 0.9), "padding": ("padding", "first"), "prioritized": ("prioritized", True)},
    **{"priority_alpha": ("alpha", 0.5), "num_envs": ("num_envs", 1)},
}


class Plain(gymnasium.Env):
    """Episodes of ten steps."""

    observation_space = gymnasium.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, reward):
        self.reward, self.steps = reward, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.np_random.random(3, np.float32), {}

    def step(self, action):
        self.steps += 1
        return self.np_random.random(3, np.float32), self.reward, self.steps == 10, False, {}


@pytest.fixture(autouse=True, scope="module")
def _tasks():
    """Two tasks with the same shapes."""
    gymnasium.register("pydqn-test/One-v0", Plain, kwargs={"reward": 1.0})
    gymnasium.register("pydqn-test/Two-v0", Plain, kwargs={"reward": 0.1})
    yield
    del gymnasium.registry["pydqn-test/One-v0"], gymnasium.registry["pydqn-test/Two-v0"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, _tasks):
    """The folder of a finished run. Tests must not change it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(preset("cartpole", **SMALL), folder)
    return folder


@pytest.fixture
def run(tmp_path, _tasks):
    """The folder of a finished run, for one test."""
    train(preset("cartpole", **SMALL), tmp_path / "run")
    return tmp_path / "run"


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_such_field_is_tested():
    assert OTHERS.keys() == set(TRANSITIONS)


@pytest.mark.parametrize("name", OTHERS)
def test_transitions_of_another_task_are_not_learned_from(finished, name):
    """Even if they have the right shapes."""
    before, value = content(finished), OTHERS[name]
    old = getattr(load_run(finished), name)
    message = f"{name}: the checkpoint's replay buffer holds transitions of {name} {old!r}, got {value!r}; {WITHOUT}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        resume(finished, total_steps=100, **{name: value})
    assert content(finished) == before


@pytest.mark.parametrize("name", OF_REPLAY)
def test_a_replay_buffer_with_other_settings_is_refused_with_advice(finished, name):
    before, (setting, value) = content(finished), OF_REPLAY[name]
    if name == "stack":  # the network is refused first, as its shape differs
        message = "checkpoint: does not fit the config (.*); leave the settings of network and optimizer as they were"
    else:
        old = getattr(load_run(finished), name)
        message = f"replay: the replay buffer has {setting} {old}, expected {value}; {re.escape(WITHOUT)}$"
    with pytest.raises(ValueError, match=message):
        resume(finished, total_steps=100, **{name: value})
    assert content(finished) == before


def test_other_settings_may_change(run):
    others = {"learning_rate": 1e-5, "max_episode_steps": 7, "skip_first_steps": 1, "seed": 3, "epsilon_end": 0.5}
    assert resume(run, total_steps=100, batch_size=16, **others, double=True).steps == 100


def test_two_ids_of_one_game_are_the_same_task():
    before = transition_settings(Config(env_id="ALE/Pong-v5"))
    assert changes(before, Config(env_id="pong")) == {}
    assert changes(before, Config(env_id="breakout")) == {"env_id": ("ALE/Pong-v5", "breakout")}


def test_old_names_of_settings_are_read_and_replaced(run):
    config = load_run(run)
    written = read_json(run / "config.json")
    write_json(run / "config.json", {OLD_NAMES.get(name, name): value for name, value in written.items()})
    assert load_run(run) == config
    with pytest.warns(UserWarning, match="life_loss is now terminal_on_life_loss, full_action_set is now") as seen:
        resume(run)
    assert len(seen) == 1
    assert read_json(run / "config.json") == written


@pytest.mark.filterwarnings("always:.*the replay buffer starts empty")
def test_another_task_can_be_learned_with_an_empty_replay_buffer(run, capsys):
    best = run / "weights" / "best.safetensors"
    assert load_weights(best)[1]["mean_return"] == 10
    arguments = ["train", "--resume", str(run), "--env-id", "pydqn-test/Two-v0", "--total-steps", "200"]
    assert main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main([*arguments, "--no-checkpoint-replay"]) == 0
    said = (
        "pydqn: warning: env_id was pydqn-test/One-v0, is pydqn-test/Two-v0; the replay buffer starts empty, "
        "updates resume at step 92"
    )
    assert capsys.readouterr().err.splitlines().count(said) == 1
    # Returns of the other task are not compared with.
    assert load_weights(best)[1]["mean_return"] == pytest.approx(1)
    assert read_state(latest_checkpoint(run))["best"] == pytest.approx(1)
    rows = read_csv(run / "episodes.csv")
    assert [*rows["return"]] == pytest.approx([10] * 6 + [1] * 14)


def test_the_best_weights_are_never_those_of_another_task(run):
    """Even if the run ends before it has a mean return in the new task."""
    best = run / "weights" / "best.safetensors"
    resume(run, env_id="pydqn-test/Two-v0", total_steps=64, checkpoint_replay=False)
    assert not best.exists()
    resume(run, total_steps=200)
    assert load_weights(best)[1]["best"] == pytest.approx(1)
    assert load_weights(best)[1]["env_id"] == "pydqn-test/Two-v0"


def test_nor_are_they_after_a_return_to_the_first_task(run):
    best, old = run / "weights" / "best.safetensors", latest_checkpoint(run)
    resume(run, env_id="pydqn-test/Two-v0", total_steps=200, checkpoint_replay=False)
    assert load_weights(best)[1]["best"] == pytest.approx(1)
    resume(old, env_id="pydqn-test/One-v0", total_steps=64)
    assert not best.exists()


def test_a_refused_change_leaves_the_best_weights(run):
    with pytest.raises(ValueError, match=r"^env_id: "):
        resume(run, env_id="pydqn-test/Two-v0", total_steps=200)
    assert load_weights(run / "weights" / "best.safetensors")[1]["best"] == 10


def test_an_empty_replay_buffer_is_a_warning_in_python(run):
    with pytest.warns(UserWarning, match=r"^the replay buffer starts empty, updates resume at step 92$"):
        resume(run, total_steps=70, checkpoint_replay=False)


def test_a_stop_rule_does_not_count_episodes_of_another_task(tmp_path):
    train(preset("cartpole", **SMALL, stop_return=9), tmp_path)
    options = {"env_id": "pydqn-test/Two-v0", "total_steps": 200, "checkpoint_replay": False}
    assert resume(tmp_path, **options, stop_return=9).steps == 200


def test_settings_bound_to_an_environment_are_reset_for_another(finished):
    """As with presets: those that are not given again are reset, and named."""
    finished.with_name("other").mkdir()
    config = dataclasses.replace(load_run(finished), stop_return=9.0, success_steps=7)
    write_json(finished.with_name("other") / "config.json", config.to_dict())
    named = (
        r"^run: pong is another environment than the run's pydqn-test/One-v0, .*: stop_return 9 -> inf, success_steps"
    )
    with pytest.warns(UserWarning, match=named):
        changed = load_run(finished.with_name("other"), env_id="pong")
    assert (changed.stop_return, changed.success_steps) == (math.inf, 0)
    assert load_run(finished.with_name("other"), env_id="pong", stop_return=3.0, success_steps=7).stop_return == 3


def test_the_old_replay_buffer_is_not_used_for_another_task_later(run):
    """The old checkpoint is still there, and now the config has the other task."""
    old = latest_checkpoint(run)
    options = {"env_id": "pydqn-test/Two-v0", "total_steps": 200}
    resume(run, **options, checkpoint_replay=False)
    with pytest.raises(ValueError, match=r"^env_id: .*'pydqn-test/One-v0', got 'pydqn-test/Two-v0'"):
        resume(old, **options, checkpoint_replay=True)


def test_a_replay_buffer_of_an_unknown_task_is_refused(tmp_path, monkeypatch):
    """Older checkpoints do not say which task their transitions are from, and the config may have changed since."""
    state = Run._state
    monkeypatch.setattr(
        Run, "_state", lambda self: {name: value for name, value in state(self).items() if name != "transitions"}
    )
    train(preset("cartpole", **SMALL), tmp_path)
    monkeypatch.undo()
    old = latest_checkpoint(tmp_path)
    for options in ({}, {"env_id": "pydqn-test/Two-v0"}):
        with pytest.raises(ValueError, match=rf"^checkpoint: .*; {re.escape(WITHOUT)}$"):
            resume(tmp_path, total_steps=100, **options)
    assert resume(tmp_path, env_id="pydqn-test/Two-v0", total_steps=100, checkpoint_replay=False).steps == 100
    with pytest.raises(ValueError, match=rf"^checkpoint: .*; {re.escape(WITHOUT)}$"):
        resume(old, total_steps=100, checkpoint_replay=True)  # now the config has the other task


def test_a_table_is_kept_for_another_task_of_the_same_size(tmp_path):
    """It holds values, not transitions. The best return of the other task is not compared with."""
    config = preset("frozenlake", total_steps=2_000, evaluation_every_steps=500, evaluation_episodes=2)
    train(config, tmp_path)
    lake = "gymnasium.envs.toy_text.frozen_lake:FrozenLakeEnv"
    gymnasium.register("pydqn-test/Lake-v0", lake)
    gymnasium.register("pydqn-test/Larger-v0", lake, kwargs={"map_name": "8x8"})
    try:
        with pytest.raises(ValueError, match="leave env_id as it was, or start"):
            resume(tmp_path, env_id="pydqn-test/Larger-v0", total_steps=3_000)
        with pytest.warns(UserWarning, match=r"^env_id was FrozenLake-v1, is pydqn-test/Lake-v0; the table keeps"):
            result = resume(tmp_path, env_id="pydqn-test/Lake-v0", total_steps=3_000, max_episode_steps=100)
        assert result.steps == 3_000
    finally:
        del gymnasium.registry["pydqn-test/Lake-v0"], gymnasium.registry["pydqn-test/Larger-v0"]


def test_an_error_about_a_missing_device_names_the_cpu():
    with pytest.raises(ValueError, match=r"'cuda:77' is not there; .*; --device cpu .in Python device='cpu'. does"):
        resolve_device("cuda:77")


def test_a_damaged_replay_buffer_is_an_error_with_advice(run):
    chunk = next((latest_checkpoint(run) / "replay").glob("*.zst"))
    chunk.write_bytes(b"")
    with pytest.raises(ValueError, match="resume .* instead, which is whole"):
        resume(run, total_steps=100)
    for manifest in run.rglob("step-000000000000/manifest.json"):
        manifest.unlink()
    with pytest.raises(ValueError, match=re.escape(f"(if only its replay buffer is damaged, {WITHOUT})")):
        resume(run, total_steps=100)
    assert resume(run, total_steps=100, checkpoint_replay=False).steps == 100


@pytest.mark.parametrize("name", ["two words", "it's", "$HOME", "-x", "a;b"])
def test_printed_commands_can_be_run(tmp_path, monkeypatch, capsys, name):
    """For any name of the folder."""
    monkeypatch.chdir(tmp_path)
    options = ["--env-id", SMALL["env_id"], "--hidden-units", "8", "--device", "cpu", "--torch-threads", "1"]
    step = Run.step
    monkeypatch.setattr(Run, "step", lambda self: (step(self), self.steps == 30 and self.stop()))
    assert main(["train", "cartpole", *options, "--total-steps", "60", f"--logdir={name}"]) == 75
    printed = capsys.readouterr().out.splitlines()[-1]
    again, draw = re.fullmatch(r"run: .*   \((pydqn train .*), (pydqn plot .*)\)", printed).groups()
    assert main([*shlex.split(again)[1:], "--total-steps", "60"]) == 0
    assert main(shlex.split(draw)[1:]) == 0
    assert (tmp_path / "curve.png").is_file()
    assert shlex.split(again)[-1] in (name, f"./{name}")

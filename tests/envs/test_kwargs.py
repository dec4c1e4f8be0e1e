"""`env_kwargs`: the arguments with which an environment is made."""

from __future__ import annotations

import json

import gymnasium
import numpy as np
import pytest

from pydqn import Config, evaluate, preset, resume, train
from pydqn._util.weights import load_weights
from pydqn.cli.main import main
from pydqn.envs.tasks import with_overrides
from pydqn.evaluation.evaluate import score
from pydqn.runs.layout import load_run

QUICK = {
    "total_steps": 60,
    "device": "cpu",
    "torch_threads": 1,
    "hidden_units": (8,),
    "mean_episodes": 2,
    "num_envs": 2,
}


class Sized(gymnasium.Env):
    """Observations of a size, and the reward that was given."""

    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, size=3, reward=1.0, render_mode=None):
        self.observation_space = gymnasium.spaces.Box(-1, 1, (size,), np.float32)
        self.reward, self.render_mode, self.steps = reward, render_mode, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self.steps += 1
        return self.observation_space.sample(), self.reward, self.steps == 5, False, {}


pytestmark = pytest.mark.filterwarnings("ignore:preset. (Sized-v0|pong) is another environment")


@pytest.fixture(autouse=True)
def _registered():
    gymnasium.register("Sized-v0", entry_point=Sized)
    yield
    del gymnasium.registry["Sized-v0"]


def quick(**settings):
    return preset("cartpole", **{"env_id": "Sized-v0", **QUICK, **settings})


def test_an_environment_gets_its_arguments_wherever_it_is_made(tmp_path):
    result = train(quick(env_kwargs={"size": 8, "reward": 2.0}, evaluation_every_steps=30), tmp_path)
    assert set(result.returns) == {10.0}
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["environment"] == 'Sized-v0 with {"reward": 2.0, "size": 8} (Gymnasium)'
    assert environment["inputs"].startswith("8 float32")
    assert evaluate(tmp_path, 2) == [10.0, 10.0]
    assert resume(tmp_path, total_steps=90).returns[-1] == 10.0
    played = score(tmp_path, 2, env_kwargs={"size": 8, "reward": 3.0})
    assert played.returns == [15.0, 15.0]
    assert played.settings["env_kwargs"] == '{"reward": 3.0, "size": 8}'


def test_the_command_line_takes_json(tmp_path, capsys):
    options = ["--total-steps", "60", "--device", "cpu", "--torch-threads", "1", "--logdir", str(tmp_path / "run")]
    options += ["--env-id", "Sized-v0", "--env-kwargs"]
    assert main(["train", "cartpole", *options, '{"size": 4}']) == 0
    assert 'Sized-v0 with {"size": 4}' in capsys.readouterr().err
    assert load_run(tmp_path / "run").env_kwargs == '{"size": 4}'
    assert main(["train", "cartpole", *options, "size=4"]) == 2
    expected = """env_kwargs: expected a JSON object, such as {"size": 8}, got 'size=4'"""
    assert capsys.readouterr().err == f"pydqn: error: {expected}\n"


def test_equal_arguments_are_equal_settings():
    config = Config(env_kwargs={"b": [1, None], "a": {"deep": True}})
    assert config == Config(env_kwargs=' {"a":{"deep":true}, "b":[1,null]}') == Config.from_dict(config.to_dict())
    assert hash(config) == hash(Config(env_kwargs=config.env_kwargs))
    assert Config().env_kwargs == "{}"


@pytest.mark.parametrize(
    "bad", ["", "[1]", "{", '{"size": NaN}', "[" * 10**5, None, 3, {1: 2}, {"size": object()}, {"size": float("inf")}]
)
def test_other_things_than_objects_of_json_are_refused(bad):
    with pytest.raises(ValueError, match=r"^env_kwargs: expected a JSON object, such as .*, got "):
        Config(env_kwargs=bad)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"env_kwargs": {"colour": 1}},
            RuntimeError,
            "Sized-v0, env index 0 .* could not be made: TypeError: .*'colour'",
        ),
        ({"env_kwargs": {"render_mode": "human"}}, ValueError, "^env_kwargs: expected no render_mode, which is chosen"),
        ({"env_kwargs": {"max_episode_steps": 9}}, ValueError, "^env_kwargs: expected no max_episode_steps, a setting"),
        (
            {"env_id": "pong", "network": "small", "env_kwargs": {"mode": 1}},
            ValueError,
            "^env_kwargs: expected none for",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(tmp_path, settings, error, message):
    with pytest.raises(error, match=message):
        train(quick(**settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_other_arguments_are_another_environment(tmp_path):
    """Transitions are not mixed, returns not compared, and the best weights are those of the new one."""
    train(quick(env_kwargs={"reward": 9.0}), tmp_path)
    with pytest.raises(ValueError, match=r"^env_kwargs: the checkpoint's replay buffer holds transitions of"):
        resume(tmp_path, env_kwargs={"reward": 1.0}, total_steps=120)
    assert load_weights(tmp_path / "weights" / "best.safetensors")[1]["best"] == 45.0
    resume(tmp_path, env_kwargs={"reward": 1.0}, total_steps=200, checkpoint_replay=False)
    metadata = load_weights(tmp_path / "weights" / "best.safetensors")[1]
    assert (metadata["best"], metadata["env_kwargs"]) == (5.0, '{"reward": 1.0}')


def test_another_environment_is_made_without_them():
    other, note = with_overrides(quick(env_kwargs={"size": 8}), "the run's", {"env_id": "Acrobot-v1"})
    assert other.env_kwargs == "{}"
    assert 'env_kwargs {"size": 8} -> {}' in note

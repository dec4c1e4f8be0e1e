"""Another environment resets settings; only Atari rewards are clipped; results say why their runs ended."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from pydqn import Config, evaluate, preset, resume, train
from pydqn.cli.main import main
from pydqn.envs.tasks import described, resolved
from pydqn.evaluation.play import play_episode
from pydqn.presets import PRESETS
from pydqn.runs.layout import load_run
from pydqn.runs.stopping import Progress, end_reason

QUICK = {
    "device": "cpu",
    "torch_threads": 1,
    "precision": "float32",
    "network": "mlp",
    "hidden_units": (8,),
    "stack": 1,
    "checkpoint_every_steps": 0,
}
STOPS = ("stop_return", "stop_evaluation_return", "stop_successes")
BOUND = [field for field in dataclasses.fields(Config) if field.metadata["bound_to"]]
OTHER = {
    bool: lambda value: not value,
    int: lambda value: value + 4,
    float: lambda value: 0.25,
    str: lambda value: '{"size": 8}',
}


class Coins(gymnasium.Env):
    """Action 1 gets the reward 10 and action 0 the reward 1, for five steps."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._left = 5
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self._left -= 1
        return np.zeros(2, np.float32), 10.0 if action else 1.0, self._left == 0, False, {}


@pytest.fixture
def coins():
    gymnasium.register("Coins-v0", entry_point=Coins)
    yield "Coins-v0"
    del gymnasium.registry["Coins-v0"]


def preset_without_warning(name, **overrides):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return preset(name, **overrides)


# --- another environment ---


@pytest.mark.parametrize("env_id", ["Acrobot-v1", "seaquest"])
@pytest.mark.parametrize("name", PRESETS)
def test_another_environment_resets_what_is_bound_to_the_first(name, env_id):
    own = PRESETS[name].config
    bound_to = ("environment",) if env_id == "seaquest" else ("environment", "Atari")
    changed = [
        field.name
        for field in BOUND
        if field.metadata["bound_to"] in bound_to
        and getattr(own, field.name) != field.default
        and (field.name != "clip_rewards" or own.clip_rewards != (env_id == "seaquest"))
    ]
    if changed:
        with pytest.warns(UserWarning, match=f"^preset: {env_id} is another environment than {name}'s") as caught:
            config = preset(name, env_id=env_id)
        text = str(caught[0].message)
        assert [change.split()[0] for change in text.partition("were reset: ")[2].split(", ")] == changed
    else:
        config = preset_without_warning(name, env_id=env_id)
    neutral = {field.name: field.default for field in BOUND if field.metadata["bound_to"] in bound_to}
    assert resolved(config) == resolved(dataclasses.replace(own, **neutral, env_id=env_id))


@pytest.mark.parametrize(
    ("own", "env_id", "reset"),
    [
        ({"env_id": "CartPole-v1"}, "Acrobot-v1", False),
        ({"env_id": "CartPole-v1"}, "pong", True),
        ({"env_id": "CartPole-v1", "clip_rewards": True}, "Acrobot-v1", True),
        ({"env_id": "pong"}, "seaquest", False),
        ({"env_id": "pong"}, "CartPole-v1", True),
        ({"env_id": "pong", "clip_rewards": False}, "CartPole-v1", False),
        ({"env_id": "pong", "clip_rewards": False}, "seaquest", True),
    ],
)
def test_clipping_is_not_reset_if_it_is_the_default_of_the_other_environment(tmp_path, own, env_id, reset):
    """The config of a run holds the meaning of "auto"."""
    (tmp_path / "config.json").write_text(json.dumps(resolved(Config(**own)).to_dict()))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = load_run(tmp_path, env_id=env_id)
    assert any("clip_rewards" in str(warning.message) for warning in caught) is reset
    assert resolved(config).clip_rewards is (env_id in ("pong", "seaquest"))


def test_overrides_are_not_reset(coins):
    given = {}
    for field in BOUND:
        kind, choices = field.metadata["kind"], field.metadata["choices"]
        value = choices[-1] if choices else OTHER[kind](0 if field.default == "auto" else field.default)
        given[field.name] = value
    given["frame_skip_max"] = given["frame_skip"] + 1
    given["value_max"] = given["value_min"] + 1
    config = preset_without_warning("cartpole", env_id=coins, **given)
    assert {name: getattr(config, name) for name in given} == given
    assert not math.isinf(config.stop_return)


@pytest.mark.parametrize("env_id", ["pong", "Pong-v4", "PongNoFrameskip-v4", "ALE/Pong-v5"])
def test_another_id_of_the_same_game_changes_nothing(env_id):
    config = preset_without_warning("pong", env_id=env_id)
    assert dataclasses.replace(config, env_id="ALE/Pong-v5") == PRESETS["pong"].config


def test_nature_fits_any_game():
    assert preset_without_warning("nature", env_id="seaquest") == dataclasses.replace(
        PRESETS["nature"].config, env_id="seaquest"
    )


def test_goals_are_bound_to_their_environment():
    assert all(Config.__dataclass_fields__[name].metadata["bound_to"] == "environment" for name in STOPS)
    assert preset("cartpole", env_id="Acrobot-v1").success_steps == 0
    assert preset("pong", env_id="CartPole-v1").stop_return == math.inf


def test_the_command_line_prints_one_line_of_what_was_reset(tmp_path, capsys):
    tiny = ["--total-steps", "40", "--device", "cpu", "--torch-threads", "1"]
    assert main(["train", "cartpole", "--env-id", "Acrobot-v1", *tiny, "--logdir", str(tmp_path / "a")]) == 0
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if line.startswith("preset: ")]
    assert line.endswith(
        "max_episode_steps 200 -> 0, stop_successes 5 -> 0, success_steps 190 -> 0, skip_first_steps 10 -> 0"
    )
    assert err.startswith("environment Acrobot-v1 (Gymnasium), ")
    assert "ended by total_steps: 40 steps were taken\n" in out
    assert main(["train", "--resume", str(tmp_path / "a"), "--total-steps", "50"]) == 0
    assert "preset: " not in capsys.readouterr().err


def test_weights_keep_the_statistics_of_pixels_with_which_they_were_trained(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(preset("pong").to_dict()))
    with pytest.warns(UserWarning, match="^run: breakout is another environment.*: stop_return 18 -> inf$"):
        config = load_run(tmp_path, env_id="breakout")
    assert (config.pixel_mean, config.pixel_std) == (0.34, 0.15)
    assert load_run(tmp_path, env_id="breakout", pixel_mean=0.1, stop_return=9).pixel_mean == 0.1


# --- clipping ---


@pytest.mark.parametrize(
    ("name", "env_id", "clips"),
    [
        ("pong", "ALE/Pong-v5", True),
        ("pong", "CartPole-v1", False),
        ("pong-book", "ALE/Pong-v5", False),
        ("pong-book", "seaquest", True),
        ("breakout", "ALE/Breakout-v5", False),
        ("nature", "CartPole-v1", False),
        ("cartpole", "CartPole-v1", False),
        ("cartpole", "pong", True),
    ],
)
def test_rewards_are_clipped_in_atari_games_alone(name, env_id, clips):
    assert resolved(preset(name, env_id=env_id)).clip_rewards is clips
    for chosen in (True, False):
        config = resolved(preset(name, env_id=env_id, clip_rewards=chosen))
        assert config.clip_rewards is chosen
        description = described(dataclasses.replace(config, stop_successes=0, success_steps=0), "")
        assert ("clipped" in description["rewards"]) is chosen


def test_the_config_of_a_run_says_whether_rewards_are_clipped(coins, tmp_path):
    train(Config(env_id=coins, total_steps=40, **QUICK), tmp_path)
    path = tmp_path / "config.json"
    plain = json.loads(path.read_text())
    assert plain["clip_rewards"] is False
    assert json.loads((tmp_path / "environment.json").read_text())["rewards"] == "as they are"
    path.write_text(json.dumps({**plain, "clip_rewards": True}))
    assert load_run(tmp_path).clip_rewards is True


@pytest.mark.parametrize(("option", "written"), [([], True), (["--no-clip-rewards"], False)])
def test_clipping_on_the_command_line(tmp_path, option, written, capsys):
    tiny = ["--total-steps", "16", "--device", "cpu", "--torch-threads", "1", "--logdir", str(tmp_path / "run")]
    assert main(["train", "pong", *tiny, *option]) == 0
    assert load_run(tmp_path / "run").clip_rewards is written
    assert ("clipped to their sign" in capsys.readouterr().err.splitlines()[0]) is written


@pytest.mark.parametrize(
    ("options", "rewards"),
    [
        ({"success_steps": 190}, "1 at the end of an episode of at least 190 steps, else 0"),
        ({"clip_rewards": True}, "clipped to their sign"),
        ({"clip_rewards": True, "agent": "tabular"}, "as they are"),
        ({"success_steps": 190, "agent": "tabular"}, "as they are"),
    ],
)
def test_descriptions_of_rewards(options, rewards):
    assert described(Config(env_id="FrozenLake-v1", num_envs=1, **options), "")["rewards"] == rewards


# --- the end ---


@pytest.mark.parametrize(
    ("now", "reason"),
    [
        ({}, None),
        ({"steps": 100}, "total_steps: 100 steps were taken"),
        ({"episodes": 7}, "total_episodes: 7 episodes were played"),
        ({"successes": 2}, "stop_successes: 2 successes in a row"),
        ({"mean_return": 5.0}, "stop_return: the mean return 5.00 reached 4.5"),
        ({"mean_return": 5.0, "updates": 0}, "stop_return: the mean return 5.00 reached 4.5, before the first update"),
        ({"mean_return": 5.0, "steps": 100}, "stop_return: the mean return 5.00 reached 4.5"),
        ({"evaluation_return": 9.0}, "stop_evaluation_return: an evaluation's mean return 9.00 reached 8"),
        ({"evaluation_return": math.nan, "mean_return": -math.inf}, None),
    ],
)
def test_reasons_to_end(now, reason):
    config = Config(
        **{"total_steps": 100, "total_episodes": 7, "stop_successes": 2, "success_steps": 9, "stop_return": 4.5},
        stop_evaluation_return=8.0,
    )
    before = Progress(99, 6, 1, 1, 4.0, 7.0)
    assert end_reason(config, before._replace(**now)) == reason


def test_a_result_says_why_its_run_ended(coins, tmp_path):
    config = Config(env_id=coins, total_steps=2_000, mean_episodes=2, num_envs=1, stop_return=6.0, **QUICK)
    result = train(config, tmp_path)
    assert result.reason.startswith("stop_return: the mean return ")
    assert result.reason.endswith(" reached 6, before the first update")
    assert result._fields[-1] == "reason"
    assert resume(tmp_path, stop_return=math.inf, total_steps=60).reason == "total_steps: 60 steps were taken"


# --- an environment that is registered in this process only ---


def test_a_registered_environment_from_python(coins, tmp_path):
    train(preset("cartpole", env_id=coins, total_steps=50, **QUICK), tmp_path)
    assert resume(tmp_path, total_steps=100).steps == 100
    returns = evaluate(tmp_path, 2)
    assert len(returns) == 2
    assert set(returns) <= {5.0, 14.0, 23.0, 32.0, 41.0, 50.0}


def test_the_error_of_an_id_that_is_not_registered_says_what_to_do(coins, tmp_path, capsys):
    train(preset("cartpole", env_id=coins, total_steps=50, **QUICK), tmp_path)
    spec = gymnasium.registry.pop(coins)
    try:
        for command in (["evaluate"], ["play"], ["train", "--resume"]):
            assert main([*command, str(tmp_path)]) == 2
            err = capsys.readouterr().err
            assert err.startswith("pydqn: error: env_id: Gymnasium knows no 'Coins-v0'")
            assert "on the command line with --import tests.envs.test_tasks" in err
            assert err.count("\n") == 1
    finally:
        gymnasium.registry[coins] = spec
    with pytest.raises(RuntimeError, match="render"):
        list(play_episode(tmp_path))

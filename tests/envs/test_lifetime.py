"""How many environments are made, and what happens when one fails to close."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys

import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete

from pydqn import resume, train
from pydqn.cli.main import main
from pydqn.envs.checked import CloseWarning
from pydqn.envs.discrete import StateEnv
from pydqn.envs.make import make_envs
from pydqn.evaluation.evaluate import evaluate, score
from pydqn.evaluation.play import play_episode
from pydqn.plotting.values import values_of
from pydqn.runs.logs import read_csv
from pydqn.training.start import open_run
from tests.helpers.odd_envs import ID, Counted, config_of, lines_of
from tests.training.test_loop import digest
from tests.training.test_resume import EXACT, kill

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore:updates take", "always::pydqn.envs.checked.CloseWarning"
)
TABLE = {"agent": "tabular", "num_envs": 1, "evaluation_every_steps": 20, "evaluation_episodes": 2}


# --- how many are made ---


def test_environments_are_made_once(counted, tmp_path):
    """1,000 steps with nine checkpoints and nine evaluations."""
    settings = {"total_steps": 1_000, "checkpoint_every_steps": 100, "evaluation_every_steps": 100}
    train(config_of(num_envs=3, evaluation_episodes=20, batch_size=4, **settings), tmp_path)
    assert Counted.made == 3 + 3
    assert Counted.alive == 0
    assert np.isfinite(read_csv(tmp_path / "progress.csv")["evaluation_return"][-1])


@pytest.mark.parametrize(("num_envs", "episodes", "made"), [(1, 5, 1), (3, 5, 3), (3, 2, 2), (40, 100, 16)])
def test_an_evaluation_makes_no_more_than_the_run_has(counted, tmp_path, num_envs, episodes, made):
    train(config_of(num_envs=num_envs, total_steps=40, replay_capacity_frames=400), tmp_path)
    Counted.made = Counted.most = 0
    assert len(evaluate(tmp_path, episodes)) == episodes
    assert (Counted.made, Counted.most, Counted.alive) == (made, made, 0)


def test_an_evaluation_of_atari_may_make_more(tiny):
    """Any number of emulators can exist, and more of them are faster."""
    from pydqn.evaluation.evaluate import evaluation_envs

    envs = evaluation_envs(dataclasses.replace(tiny, num_envs=1), 5, 0)
    assert envs.num_envs == 5
    envs.close()


@pytest.mark.parametrize("kind", ["dqn", "tabular"])
def test_a_run_in_used_environments_is_the_run_in_new_ones(counted, tmp_path, kind):
    """A run that is killed and resumed makes its environments anew each time; results are equal bit for bit."""
    settings = {"checkpoint_every_steps": 70, "evaluation_every_steps": 90, "evaluation_episodes": 4}
    if kind == "tabular":
        counted.space, counted.good = Discrete(3), 0
        settings |= {"agent": "tabular", "num_envs": 1}
    config = config_of(**{"num_envs": 3, "log_every_steps": 30, **settings, "total_steps": 420})
    train(config, tmp_path / "whole")
    for steps in (80, 150, 230, 300):
        run = open_run(config, tmp_path / "cut", resume=steps > 80)
        for report in run.reports():
            if report.steps >= steps:
                break
        kill(run)
    resume(tmp_path / "cut")
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")
    ours, theirs = (read_csv(tmp_path / name / "progress.csv") for name in ("cut", "whole"))
    for name in EXACT:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_one_simulator_is_enough(counted, tmp_path):
    """It is enough to train, then evaluate and play. Evaluation while training is refused before the first step."""
    counted.limit = 1
    config = config_of(num_envs=1, checkpoint_every_steps=20)
    train(config, tmp_path / "run")
    assert len(evaluate(tmp_path / "run", 3)) == 3
    *_, episode = play_episode(tmp_path / "run")
    assert episode.steps > 0
    with pytest.raises(RuntimeError) as raised:
        train(dataclasses.replace(config, evaluation_every_steps=20), tmp_path / "both")
    require_hint(str(raised.value))
    assert not (tmp_path / "both" / "progress.csv").exists()
    assert Counted.alive == 0


def require_hint(message):
    assert "env index 0 of 1 (seed " in message
    assert "could not be made: OSError: there are 1 already" in message
    assert "train with --evaluation-every-steps 0, in Python evaluation_every_steps=0, and evaluate" in message
    assert "\n" not in message


def test_one_simulator_is_enough_for_a_table(counted, tmp_path):
    counted.space, counted.good, counted.limit = Discrete(3), 0, 1
    config = config_of(**{**TABLE, "evaluation_every_steps": 0}, checkpoint_every_steps=20)
    assert train(config, tmp_path / "run").steps == 60
    assert Counted.made == 1
    with pytest.raises(RuntimeError) as raised:
        train(config_of(**TABLE), tmp_path / "both")
    require_hint(str(raised.value))
    assert Counted.alive == 0


def first_reset_fails(kind):
    kind.reset = lambda self, **_: 1 / 0


def no_actions(kind):
    kind.action_space = Box(0, 1, (2,), np.float32)


def no_states(kind):
    kind.space = Box(0, 1, (2,), np.float32)


def many_states(kind):
    kind.space = Discrete(2**30)


def publish(change):
    def prepare(kind):
        table = {state: {action: [(1.0, 0, 0.0, False)] for action in range(2)} for state in range(3)}
        kind.P, kind.initial_state_distrib = table, [1.0, 0.0, 0.0]
        change(kind)

    return prepare


def too_few_first_states(kind):
    kind.initial_state_distrib = [1.0]


BROKEN = {
    "first reset": (first_reset_fails, RuntimeError),
    "actions": (no_actions, ValueError),
    "states": (no_states, ValueError),
    "many states": (many_states, ValueError),
    "a state is missing": (publish(lambda kind: kind.P.pop(2)), RuntimeError),
    "an action is missing": (publish(lambda kind: kind.P[1].pop(1)), RuntimeError),
    "no outcome": (publish(lambda kind: kind.P[1].update({1: []})), RuntimeError),
    "no such next state": (publish(lambda kind: kind.P[1].update({1: [(1.0, 3, 0.0, False)]})), RuntimeError),
    "a negative next state": (publish(lambda kind: kind.P[1].update({1: [(1.0, -1, 0.0, False)]})), RuntimeError),
    "a sum of 0.5": (publish(lambda kind: kind.P[1].update({1: [(0.5, 1, 0.0, False)]})), RuntimeError),
    "no number": (publish(lambda kind: kind.P[1].update({1: [(1.0, 1, np.nan, False)]})), RuntimeError),
    "three of four": (publish(lambda kind: kind.P[1].update({1: [(1.0, 1, 0.0)]})), RuntimeError),
    "another start": (publish(too_few_first_states), RuntimeError),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_table_that_cannot_start_leaves_no_environment_open(counted, tmp_path, name):
    counted.space, counted.good = Discrete(3), 0
    prepare, kind = BROKEN[name]
    prepare(counted)
    with pytest.raises(kind, match=f"^env_id: {ID}"):
        train(config_of(**TABLE), tmp_path / "run")
    assert Counted.made > 0
    assert Counted.alive == 0


def test_a_table_makes_its_environments_once(counted, tmp_path):
    counted.space, counted.good = Discrete(3), 0
    train(config_of(**TABLE, checkpoint_every_steps=10, total_steps=200), tmp_path)
    assert (Counted.made, Counted.alive) == (2, 0)


# --- environments that fail to close ---

CLOSING = r"env_id: pydqn-test/Odd-v0, env index \d \(seed \d+\), step \d+: close\(\) failed: ConnectionError: the"


@pytest.fixture
def trained(counted, tmp_path):
    train(config_of(), tmp_path / "run")
    counted.close_fails = True
    return tmp_path / "run"


def test_training_outlives_a_close_that_fails(counted, tmp_path):
    counted.close_fails = True
    with pytest.warns(CloseWarning, match=CLOSING) as warned:
        result = train(config_of(evaluation_every_steps=20), tmp_path)
    assert result.steps >= 60
    assert sum(warning.category is CloseWarning for warning in warned) == 3 + 3  # for training and evaluation
    assert Counted.alive == 0


def test_a_table_outlives_a_close_that_fails(counted, tmp_path):
    counted.space, counted.good, counted.close_fails = Discrete(3), 0, True
    with pytest.warns(CloseWarning, match=CLOSING):
        assert train(config_of(**TABLE), tmp_path).steps == 60


def test_scores_outlive_a_close_that_fails(trained):
    with pytest.warns(CloseWarning, match=CLOSING):
        assert len(score(trained, 4).returns) == 4


def test_playing_outlives_a_close_that_fails(trained):
    with pytest.warns(CloseWarning, match=CLOSING):
        *_, episode = play_episode(trained)
    assert episode.steps > 0


def test_values_outlive_a_close_that_fails(counted, tmp_path):
    counted.space, counted.good = Box(-1, 1, (2,), np.float32), np.zeros(2, np.float32)
    counted.step = lambda self, action: (self.good, 1.0, False, False, {})
    train(config_of(), tmp_path)
    counted.close_fails = True
    with pytest.warns(CloseWarning, match=CLOSING):
        assert len(values_of(tmp_path)) == 1


def test_an_error_is_not_hidden_by_a_close_that_fails(counted, tmp_path):
    counted.step = lambda self, action: 1 / 0
    counted.close_fails = True
    with pytest.warns(CloseWarning), pytest.raises(RuntimeError, match="ZeroDivisionError"):
        train(config_of(), tmp_path)


@pytest.mark.parametrize("command", ["train", "evaluate", "play", "resume"])
def test_the_command_line_shows_the_result_first(counted, trained, command, capsys):
    """The exit code is that of the result, too."""
    options = ["--env-id", ID, "--network", "mlp", "--stack", "1", "--device", "cpu", "--total-steps", "30"]
    folder = str(trained)
    code = main(
        {
            "train": ["train", "pong", *options, "--logdir", folder + "-2", "--num-envs", "1"],
            "evaluate": ["evaluate", folder, "--episodes", "2"],
            "play": ["play", folder],
            "resume": ["train", "--resume", folder, "--total-steps", "70"],
        }[command]
    )
    out, err = lines_of(capsys)
    assert code == 0
    start = {"train": "done: 30 steps", "evaluate": "2 episodes: mean return", "play": "total reward"}
    assert out[0].startswith(start.get(command, "done: "))
    assert err
    assert all(line.startswith(f"pydqn: warning: env_id: {ID}, env index ") for line in err)


def test_warnings_of_closing_come_after_the_result(trained, capsys):
    """Both are in one stream here, as in a terminal."""
    with contextlib.redirect_stderr(sys.stdout):
        main(["evaluate", str(trained), "--episodes", "2"])
    text = capsys.readouterr().out
    assert 0 <= text.index("episodes: mean return") < text.index("pydqn: warning: env_id")


def test_scores_that_cannot_be_kept_are_shown(counted, tmp_path, capsys):
    train(config_of(), tmp_path)
    (tmp_path / "scores.jsonl").mkdir()
    assert main(["evaluate", str(tmp_path), "--episodes", "2"]) == 0
    out, err = lines_of(capsys)
    assert out[0].startswith("2 episodes: mean return")
    assert len(err) == 1
    assert err[0].startswith("pydqn: warning: these scores could not be kept: ")
    assert "scores.jsonl" in err[0]


def test_scores_are_kept(counted, tmp_path, capsys):
    train(config_of(), tmp_path)
    assert main(["evaluate", str(tmp_path), "--episodes", "2"]) == 0
    assert len(json.loads((tmp_path / "scores.jsonl").read_text())["returns"]) == 2


def test_a_state_env_can_be_used_again(counted):
    counted.space, counted.good = Discrete(3), 0

    def trace(env):
        env.reset()
        return [env.step(0)[1] for _ in range(20)]

    used = StateEnv(config_of(agent="tabular", num_envs=1), 5)
    first = trace(used)
    used.reseed(6)
    second = trace(used)
    assert second == trace(StateEnv(config_of(agent="tabular", num_envs=1), 6)) != first


def test_atari_with_another_seed_starts_as_new(tiny):
    config = dataclasses.replace(tiny, noop_max_frames=30, sticky_actions=0.25)

    def trace(envs, seed=None):
        out = np.zeros((2, *envs.frame_shape), envs.dtype)
        envs.reset(out, seed)
        seen, generator = [out.tobytes()], np.random.default_rng(0)
        for _ in range(50):
            envs.send(generator.integers(6, size=2))
            envs.recv(out)
            seen.append(out.tobytes())
        return seen

    used = make_envs(config, 2, 3)
    first = trace(used, 3)
    assert trace(used, 4) == trace(make_envs(config, 2, 4)) != first
    assert trace(used, 3) == first

"""Tabular Q-learning: the update, the compiled task against the stepped one, and whole runs."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest

from pydqn import evaluate, preset
from pydqn._util.weights import load_weights
from pydqn.envs.discrete import Model, StateEnv
from pydqn.evaluation.evaluate import score
from pydqn.runs.checkpoint import checkpoints
from pydqn.runs.logs import read_csv
from pydqn.training.start import open_run, resume, train
from pydqn.training.tabular import ModelledTask, SteppedTask, TabularRun, Trials, update
from tests.helpers.runs import kill

NEVER = Trials(0, 0, 0, 0.0)


def generators(seed):
    return [np.random.default_rng(seed), np.random.default_rng(seed + 1)]


def test_the_update():
    table = np.arange(6.0).reshape(3, 2)
    update(table, 0, 1, 2.0, 0.9, 2, 0.2)
    assert table[0, 1] == pytest.approx(0.8 * 1 + 0.2 * (2 + 0.9 * 5))
    update(table, 1, 0, 2.0, 0.0, 2, 0.5)  # terminated: the value of the next state is not used
    assert table[1, 0] == pytest.approx(0.5 * 2 + 0.5 * 2)
    assert table[2].tolist() == [4, 5]


def test_a_model_has_the_environments_probabilities():
    env = StateEnv(preset("frozenlake"), 0)
    model = env.model()
    published = gymnasium.make("FrozenLake-v1").unwrapped.P
    assert (env.num_states, env.num_actions, env.most_steps) == (16, 4, 100)
    assert model.start.tolist() == [1.0] * 16
    for state in range(16):
        for action in range(4):
            rows = range(model.offset[state * 4 + action], model.offset[state * 4 + action + 1])
            chances = np.diff([0, *model.chance[rows]])
            ours = [(model.next_state[i], model.reward[i], model.terminated[i]) for i in rows]
            assert ours == [tuple(outcome[1:]) for outcome in published[state][action]]
            np.testing.assert_allclose(chances, [outcome[0] for outcome in published[state][action]])


@pytest.mark.parametrize("env_id", ["Taxi-v4", "CliffWalking-v1", "FrozenLake-v1"])
def test_the_modelled_task_is_the_environment(env_id):
    """With greedy actions, both kinds of task have the same tables, episodes and test means."""
    options = {"is_slippery": False} if env_id.startswith("Frozen") else {}
    config = preset("frozenlake", env_id=env_id, epsilon_start=0.0, epsilon_end=0.0, max_episode_steps=40)
    envs = StateEnv(config, 0), StateEnv(config, 1)
    for env in envs:
        env._env.close()
        env._env = gymnasium.make(env_id, max_episode_steps=40, **options)
    model = envs[0].model()
    fixed = int(np.argmax(model.start > 0))  # Taxi draws its first state: here it is always the same
    start = np.zeros(envs[0].num_states)
    start[fixed:] = 1.0
    modelled = ModelledTask(model._replace(start=start), 40, config, generators(0))
    for env in envs:
        reset = env.reset
        env.reset = lambda reset=reset, env=env: (reset(), setattr(env._env.unwrapped, "s", fixed))[0] * 0 + fixed
    stepped = SteppedTask(envs, config, generators(0))
    tables = [np.zeros((envs[0].num_states, envs[0].num_actions)) for _ in range(2)]
    tests = Trials(0, 50, 1, np.inf)
    for _ in range(4):
        outcomes = [
            task.learn(table, np.zeros(300), tests) for task, table in zip((modelled, stepped), tables, strict=True)
        ]
        assert outcomes[0] == outcomes[1]
        np.testing.assert_allclose(*tables, atol=1e-12)
    assert tables[0].any() or env_id.startswith("Frozen")
    stepped.close()


def test_chance_is_that_of_the_model():
    """Random actions on slippery ice: both kinds of task visit cells and end episodes equally often."""
    config = preset("frozenlake")
    envs = StateEnv(config, 0), StateEnv(config, 1)
    tasks = [ModelledTask(envs[0].model(), 100, config, generators(2)), SteppedTask(envs, config, generators(3))]
    lengths, successes, values = [], [], []
    for task in tasks:
        table = np.zeros((16, 4))
        outcome = task.learn(table, np.ones(60_000), NEVER)
        assert outcome.steps == 60_000
        assert np.isnan(outcome.test_mean)
        returns, steps, after = zip(*outcome.episodes, strict=True)
        assert np.cumsum(steps).tolist() == list(after)
        lengths.append(np.mean(steps))
        successes.append(np.mean(returns))
        values.append(table[14].max())
    # About 7,800 episodes: three standard errors are 0.25 steps and 0.6 % of the episodes.
    assert abs(lengths[0] - lengths[1]) < 0.35
    assert abs(successes[0] - successes[1]) < 0.008
    assert abs(values[0] - values[1]) < 0.25


@pytest.mark.parametrize("kind", ["modelled", "stepped"])
def test_nothing_is_bootstrapped_beyond_the_end(kind):
    """Every episode ends at once, in the state in which it began, whose value is not 0."""

    class OneStep:
        def reset(self):
            return 0

        def step(self, action):
            return 0, 1.0, True, False

    config = preset("frozenlake", learning_rate=0.5)
    if kind == "modelled":
        one, end = np.ones(1), np.array([True])
        model = Model(one, np.array([0, 1]), one, np.zeros(1, np.int64), one, end)
        task = ModelledTask(model, 10, config, generators(0))
    else:
        task = SteppedTask((OneStep(), OneStep()), config, generators(0))
    table = np.zeros((1, 1))
    outcome = task.learn(table, np.ones(100), NEVER)
    assert table[0, 0] == pytest.approx(1.0)
    assert outcome.episodes == [(1.0, 1, step) for step in range(1, 101)]


def test_learning_stops_after_a_test_that_beats_the_best():
    config = preset("frozenlake")
    task = ModelledTask(StateEnv(config, 0).model(), 100, config, generators(0))
    table = np.zeros((16, 4))
    outcome = task.learn(table, np.ones(50_000), Trials(3, 7, 20, -1.0))
    assert outcome.steps == 4  # the first test is due at the run's seventh step
    assert outcome.test_mean > -1
    outcome = task.learn(table, np.ones(50_000), Trials(0, 1, 20, 0.5))
    assert outcome.steps < 50_000
    assert outcome.test_mean > 0.5


def test_frozenlake_is_solved(tmp_path):
    result = train(preset("frozenlake", seed=1), tmp_path)
    assert result.steps < 40_000
    assert result.updates == result.frames == result.steps
    progress = read_csv(tmp_path / "progress.csv")
    assert progress["evaluation_return"][-1] > 0.80
    best = [value for value in progress["evaluation_return"] if value > 0]
    assert len(set(best)) > 3  # each new best mean has its row
    assert result.returns == read_csv(tmp_path / "episodes.csv")["return"]
    assert np.mean(evaluate(tmp_path, 200)) > 0.5
    weights, _ = load_weights(tmp_path / "weights" / "best.safetensors")
    assert weights["values"].shape == (16, 4)


@pytest.mark.parametrize("env_id", ["Blackjack-v1", "Taxi-v4", "CliffWalking-v1"])
@pytest.mark.filterwarnings("ignore:evaluation_max_episode_steps")  # CliffWalking has no limit of steps
def test_other_tasks(env_id, tmp_path):
    config = preset(
        "frozenlake", env_id=env_id, total_steps=600, evaluation_every_steps=100, gamma=1.0, log_every_steps=200
    )
    result = train(config, tmp_path)
    assert result.steps == 600
    assert np.isfinite(read_csv(tmp_path / "progress.csv")["evaluation_return"][-1])
    assert len(evaluate(tmp_path, 2, max_episode_steps=50)) == 2


def test_blackjack_is_learned_step_by_step(tmp_path):
    """About -0.05 an episode for the best play, -0.4 for random play."""
    config = preset(
        "frozenlake",
        env_id="Blackjack-v1",
        total_steps=30_000,
        evaluation_every_steps=0,
        stop_evaluation_return=float("inf"),
        gamma=1.0,
        learning_rate=0.02,
        log_every_steps=30_000,
    )
    with open_run(config, tmp_path) as run:
        list(run.reports())
        assert isinstance(run._task, SteppedTask)
    assert np.mean(run.returns) < -0.3
    assert np.mean(evaluate(tmp_path, 400)) > -0.2
    table = run.table.reshape(32, 11, 2, 2)
    assert (table[20, 1:, 0].argmax(axis=1) == 0).all()  # stick on 20
    assert (table[8, 2:, 0].argmax(axis=1) == 1).mean() > 0.7  # hit on 8


def test_the_same_seed_is_the_same_run(tmp_path):
    texts = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train(preset("frozenlake", seed=seed, total_steps=2_000), tmp_path / name)
        texts.append((tmp_path / name / "episodes.csv").read_bytes())
    assert texts[0] == texts[1] != texts[2]


def test_scores_of_other_tasks_than_atari(tmp_path):
    train(preset("frozenlake", seed=1, total_steps=500), tmp_path)
    result = score(tmp_path, 5)
    assert result.settings == {"evaluation_epsilon": 0.0, "max_episode_steps": 0, "num_envs": 1}
    assert result.human_normalized_percent is None
    with pytest.raises(ValueError, match="^protocol: nature is for Atari games, the run is of FrozenLake-v1"):
        score(tmp_path, 5, protocol="nature")


def test_a_run_is_resumed(tmp_path):
    before = train(preset("frozenlake", seed=1, total_steps=1_000, learning_rate=0.01), tmp_path)
    after = resume(tmp_path, total_steps=3_000)
    assert after.steps == 3_000
    assert after.returns[: len(before.returns)] == before.returns
    assert len(after.returns) > len(before.returns)
    steps = read_csv(tmp_path / "progress.csv")["steps"]
    assert sorted(set(steps)) == steps
    with pytest.raises(ValueError, match="checkpoint: its table has shape"):
        resume(tmp_path, env_id="FrozenLake8x8-v1", total_steps=4_000)


@pytest.mark.parametrize("env_id", ["FrozenLake-v1", "Blackjack-v1"])  # one with a model, one that is stepped
def test_a_resumed_run_is_the_same_run(env_id, tmp_path):
    """Bit for bit, when resumed several times after kills."""
    settings = {
        "env_id": env_id,
        "total_steps": 5_000,
        "stop_evaluation_return": np.inf,
        "evaluation_every_steps": 10,
        "epsilon_end": 0.3,
        "epsilon_decay_steps": 2_000,
        "checkpoint_every_steps": 900,
        "log_every_steps": 350,
    }
    config = preset("frozenlake", **settings)
    train(config, tmp_path / "whole")
    for number, steps in enumerate((1_700, 3_100, 4_600)):
        run = open_run(config, tmp_path / "killed", resume=number > 0)
        assert number == 0 or 0 < run.steps < steps
        for report in run.reports():
            if report.steps >= steps:
                break
        kill(run)
    resume(tmp_path / "killed")
    files = [tmp_path / name for name in ("killed", "whole")]
    for name in ("steps", "evaluation_return", "mean_return", "mean_q"):
        ours, theirs = (read_csv(path / "progress.csv")[name] for path in files)
        np.testing.assert_array_equal(ours, theirs, err_msg=name)
    ours, theirs = ((path / "episodes.csv").read_bytes() for path in files)
    assert ours == theirs
    ours, theirs = (load_weights(path / "weights" / "last.safetensors")[0]["values"] for path in files)
    assert (ours == theirs).all()


def test_the_best_table_is_replaced_only_by_a_better_one(tmp_path, monkeypatch):
    """Better in its tests, also where a run is resumed from an older checkpoint."""
    best = tmp_path / "weights" / "best.safetensors"
    settings = {"evaluation_every_steps": 100, "stop_evaluation_return": np.inf, "checkpoint_every_steps": 1_000}
    train(preset("frozenlake", seed=1, total_steps=8_000, **settings), tmp_path)
    tests = read_csv(tmp_path / "progress.csv")["evaluation_return"]
    value = load_weights(best)[1]["best"]
    assert value == pytest.approx(np.nanmax(tests))
    before, older = best.read_bytes(), checkpoints(tmp_path)[0]
    learn = ModelledTask.learn
    monkeypatch.setattr(
        ModelledTask, "learn", lambda *args: (out := learn(*args))._replace(test_mean=min(out.test_mean, value - 0.01))
    )
    resume(older, total_steps=9_000)
    assert best.read_bytes() == before
    monkeypatch.setattr(ModelledTask, "learn", lambda *args: learn(*args)._replace(test_mean=value + 1))
    resume(tmp_path, total_steps=9_100)
    assert load_weights(best)[1]["best"] == value + 1


def test_what_a_table_cannot_learn(tmp_path):
    with pytest.raises(ValueError, match="^num_envs: "):
        TabularRun(preset("frozenlake", num_envs=2), tmp_path)
    with pytest.raises(ValueError, match="^env_id: CartPole-v1 has Box"):
        TabularRun(preset("frozenlake", env_id="CartPole-v1"), tmp_path)
    with pytest.raises(ValueError, match="^env_id: pong has pixels"):
        TabularRun(preset("frozenlake", env_id="pong"), tmp_path)
    assert list(tmp_path.iterdir()) == []

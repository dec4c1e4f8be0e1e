"""Whole small runs: updates are made, numbers are right, and the same seed gives the same run."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pydqn import Learner, preset, resume, train
from pydqn._util.weights import load_weights
from pydqn.envs.base import Episode
from pydqn.evaluation.evaluate import evaluate, evaluate_policy
from pydqn.evaluation.play import PolicyStep, start_episodes
from pydqn.learning.policy import resolve_precision
from pydqn.runs.layout import load_run
from pydqn.runs.logs import GROUPS, Report, read_csv
from pydqn.training import loop as training
from pydqn.training.loop import Run
from tests.helpers.runs import CARTPOLE, digest


def test_a_run_from_end_to_end(tiny, tmp_path):
    with Run(tiny, tmp_path) as run:
        start = {name: tensor.clone() for name, tensor in run.learner.online.state_dict().items()}
        reports = list(run.reports())
    result = run.result()

    # Steps, frames and updates are counted exactly.
    assert tiny.total_steps <= result.steps < tiny.total_steps + tiny.num_envs
    assert result.frames == 4 * result.steps
    # The learner runs during a step, so the updates are those that the steps before require.
    required = [(result.steps - back - tiny.learning_starts_steps) // tiny.train_period_steps for back in (1, 2)]
    assert result.updates in required
    assert run.learner.updates == result.updates > 70
    assert reports[-1].updates == result.updates

    # All parameters have changed, and are in the file.
    weights, metadata = load_weights(tmp_path / "weights" / "last.safetensors")
    assert metadata["updates"] == result.updates
    for name, before in start.items():
        assert (weights[name] != before).any(), name

    # episodes.csv has all episodes of both environments; an episode has 100 steps.
    with open(tmp_path / "episodes.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["return"]) for row in rows] == result.returns
    assert len(rows) == len(result.returns) in (2, 3, 4)
    assert {row["length_steps"] for row in rows} == {"100"}
    assert all(total == int(total) and -21 <= total <= 0 for total in result.returns)

    progress = read_csv(tmp_path / "progress.csv")
    assert progress["steps"] == [report.steps for report in reports]
    assert progress["mean_return"][-1] == np.mean(result.returns[-2:])
    assert np.isfinite(progress["loss"][1:]).all()
    board = EventAccumulator(str(tmp_path)).Reload()
    scalars = {f"{group}/{name}" for group, names in GROUPS.items() for name in names}
    episodes = {"each episode/return", "each episode/length_steps", "each episode/epsilon"}
    assert set(board.Tags()["scalars"]) == (scalars - {"episodes/evaluation_return"}) | episodes
    assert set(board.Tags()["histograms"]) == {"learning/loss_per_sample", "learning/q_values"}
    assert [event.step for event in board.Scalars("speed/updates")] == progress["steps"]
    assert [event.value for event in board.Scalars("each episode/return")] == result.returns
    histogram = board.Histograms("learning/loss_per_sample")[-1].histogram_value
    assert histogram.num == tiny.batch_size
    assert histogram.sum / histogram.num == pytest.approx(reports[-1].loss, rel=1e-4)
    machine = json.loads((tmp_path / "environment.json").read_text())
    assert machine["torch"] == torch.__version__
    assert machine["precision"] == str(resolve_precision("auto", torch.device("cpu"))).removeprefix("torch.")
    assert (machine["device"], machine["torch_threads"]) == ("cpu", 1)
    assert load_run(tmp_path) == dataclasses.replace(tiny, clip_rewards=True)  # "auto" in Atari games


@pytest.mark.parametrize(("pixels", "at_once"), [(True, 1), (True, 3), (False, 1)])
def test_a_prioritized_run(tiny, tmp_path, monkeypatch, pixels, at_once):
    """The TD errors of each update become the priorities of its transitions, before the next batch is sampled."""
    monkeypatch.setattr(training, "updates_at_once", lambda config, device: at_once)
    config = (
        tiny
        if pixels
        else preset(
            "cartpole", **{**CARTPOLE, "total_steps": 200, "learning_starts_steps": 50, "train_period_steps": 1}
        )
    )
    config = dataclasses.replace(config, prioritized=True, priority_alpha=1.0, batch_size=8)
    if at_once > 1:
        config = dataclasses.replace(config, num_envs=6, train_period_steps=2.0)
    with Run(config, tmp_path) as run:
        expected = {}
        update, sample, drawn = run.replay.update_priorities, run.replay.sample, []

        def drawing(*arguments):
            batch = sample(*arguments)
            assert len(batch.index) == 8  # each update samples for itself
            drawn.append(batch.index.copy())
            return batch

        def watched(index, priority):
            # Of all transitions sampled since the last time.
            np.testing.assert_array_equal(index, np.concatenate(drawn))
            drawn.clear()
            np.testing.assert_allclose(priority, run.learner.td_errors() + 1e-6)
            assert (run.learner.td_errors() > 0).any()
            expected.update(zip(index.tolist(), priority.tolist(), strict=True))
            update(index, priority)

        run.replay.update_priorities, run.replay.sample = watched, drawing
        list(run.reports())
        assert not drawn
        assert run.learner.updates > 20
        assert run.replay.beta == pytest.approx(1.0, abs=0.05)
        run.replay.beta = 1.0
        batch = sample(64)
    held = [row for row, index in enumerate(batch.index.tolist()) if index in expected]
    priority = np.array([expected[index] for index in batch.index[held].tolist()])
    assert len(held) > 5
    assert len(set(priority)) > 2
    weight = batch.weight[held] * priority  # w is in proportion to 1 / p
    np.testing.assert_allclose(weight, weight[0], rtol=1e-4)


@pytest.mark.parametrize("prioritized", [False, True])
def test_where_frames_are_kept_changes_nothing(tiny, tmp_path, prioritized):
    config = dataclasses.replace(tiny, prioritized=prioritized, checkpoint_replay=True)
    for storage in ("host", "device"):
        train(dataclasses.replace(config, storage=storage), tmp_path / storage)
        machine = json.loads((tmp_path / storage / "environment.json").read_text())
        assert machine["storage"].startswith(storage)
    assert digest(tmp_path / "host") == digest(tmp_path / "device")
    # Either can resume the other's checkpoint.
    (tmp_path / "both").mkdir()
    for storage, other in (("host", "device"), ("device", "host")):
        shutil.copytree(tmp_path / storage, tmp_path / "both" / storage)
        resume(tmp_path / "both" / storage, storage=other, total_steps=600)
    assert digest(tmp_path / "both" / "host") == digest(tmp_path / "both" / "device")


def test_updates_at_once_are_the_same_run(tiny, tmp_path, monkeypatch):
    """With uniform sampling, making all updates of a step together, as on a GPU, changes nothing."""
    config = dataclasses.replace(tiny, num_envs=6, train_period_steps=2.0, total_steps=300)
    train(config, tmp_path / "one")
    assert training.updates_at_once(config, torch.device("cuda")) == 3
    monkeypatch.setattr(training, "updates_at_once", lambda config, device: 3)
    taken = []
    update = Learner.update
    monkeypatch.setattr(Learner, "update", lambda self, batch: (taken.append(len(batch.action)), update(self, batch)))
    train(config, tmp_path / "three")
    assert taken.count(3 * 8) > 20
    assert digest(tmp_path / "one") == digest(tmp_path / "three")


def test_every_number_has_its_chart():
    charted = sorted(name for names in GROUPS.values() for name in names)
    assert charted == sorted(set(Report.__annotations__) - {"steps"})


def test_the_replay_ratio_does_not_drift(tiny, tmp_path):
    config = dataclasses.replace(tiny, train_period_steps=0.7, total_steps=150, learning_starts_steps=37)
    with Run(config, tmp_path) as run:
        start_episodes(run.envs, run.replay)
        for _ in range(60):
            before = run.steps
            run.step()
            assert run.learner.updates == max(0, int((before - 37) / 0.7))


def test_resets_are_not_counted_as_steps(tmp_path):
    """After an episode, an environment takes one call to start the next: this is no step and no transition."""
    config = preset("pong", **CARTPOLE, num_envs=3, total_steps=200, learning_starts_steps=1000)
    with Run(config, tmp_path) as run:
        list(run.reports())
        finished = len(run.returns)
        assert finished >= 6
        # Every step is a transition, except those whose n-step window is incomplete: at most one per environment.
        assert run.steps - 3 <= len(run.replay) <= run.steps
    with open(tmp_path / "episodes.csv") as file:
        rows = list(csv.DictReader(file))
    assert all(float(row["return"]) == int(row["length_steps"]) for row in rows)


def test_the_same_seed_is_the_same_run(tiny, tmp_path):
    digests = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(dataclasses.replace(tiny, seed=seed), tmp_path / name)
        digests.append(digest(tmp_path / name))
    assert digests[0] == digests[1]
    assert digests[0] != digests[2]


def test_cartpole_is_learned(tmp_path):
    """A task that takes seconds to learn: from about 20 steps upright to 150."""
    config = preset(
        "pong",
        **{**CARTPOLE, "n_step": 3, "stop_return": 150.0},
        num_envs=4,
        total_steps=40_000,
        replay_capacity_frames=20_000,
        learning_starts_steps=1000,
        learning_rate=1e-3,
        optimizer_epsilon=1e-8,
        train_period_steps=2.0,
        double=True,
        dueling=False,
        target_update_period=200,
        epsilon_decay_steps=10_000,
        seed=1,
    )
    result = train(config, tmp_path)
    assert np.mean(result.returns[:20]) < 60
    assert np.mean(result.returns[-20:]) >= 150
    assert np.mean(evaluate(tmp_path, 10)) >= 100


def test_best_weights_are_those_of_the_best_mean(tiny, tmp_path):
    best, expected = -np.inf, {}
    with Run(dataclasses.replace(tiny, log_every_steps=1, total_steps=1200), tmp_path) as run:
        for _ in run.reports():
            if run.mean_return() > best:
                best = run.mean_return()
                expected = {name: tensor.clone() for name, tensor in run.learner.online.state_dict().items()}
    weights, metadata = load_weights(tmp_path / "weights" / "best.safetensors")
    assert metadata["mean_return"] == best
    assert all((weights[name] == expected[name]).all() for name in expected)


def test_an_interrupted_run_leaves_usable_weights_and_closed_files(tiny, tmp_path):
    with pytest.raises(KeyboardInterrupt), Run(tiny, tmp_path) as run:
        for count, _ in enumerate(run.reports()):
            if count == 2:
                raise KeyboardInterrupt
    assert evaluate(tmp_path, 2)
    steps = read_csv(tmp_path / "progress.csv")["steps"]
    assert len(steps) == 3
    assert steps[-1] == run.steps == run.result().steps


def test_an_interruption_between_reports_loses_no_row(tiny, tmp_path):
    with pytest.raises(RuntimeError, match="unexpected"), Run(tiny, tmp_path) as run:
        next(run.reports())
        run.step()
        raise RuntimeError("unexpected")
    steps = read_csv(tmp_path / "progress.csv")["steps"]
    assert steps[-1] == run.steps > steps[-2]
    assert run.result().seconds > 0


def test_every_environment_plays_its_share_of_an_evaluation(tiny, monkeypatch):
    """Environment 0's episodes last one step, environment 1's five: half of the returns are still environment 1's."""

    def policy_steps(*_, **__):
        for step in itertools.count(1):
            ended = [Episode(0, 1.0, 1)] + [Episode(1, 5.0, 5)] * (step % 5 == 0)
            yield PolicyStep(np.zeros(2, np.int64), np.zeros((2, 6), np.float32), None, np.zeros(2), ended)

    monkeypatch.setattr("pydqn.evaluation.evaluate.policy_steps", policy_steps)
    monkeypatch.setattr("pydqn.evaluation.evaluate._MOST_ENVS", 2)
    assert evaluate_policy(tiny, None, 4, 0) == [1.0, 1.0, 5.0, 5.0]
    assert evaluate_policy(tiny, None, 5, 0) == [1.0, 1.0, 1.0, 5.0, 5.0]


def test_evaluation_is_apart_from_training(tiny, tmp_path):
    """Evaluation during training changes nothing but its own column."""
    with_evaluation = dataclasses.replace(tiny, evaluation_every_steps=150, evaluation_episodes=2)
    train(tiny, tmp_path / "without")
    train(with_evaluation, tmp_path / "with")
    assert digest(tmp_path / "without") == digest(tmp_path / "with")
    assert np.isfinite(read_csv(tmp_path / "with" / "progress.csv")["evaluation_return"][-1])


def test_a_folder_with_a_run_is_not_overwritten(tiny, tmp_path):
    train(dataclasses.replace(tiny, total_steps=20), tmp_path)
    with pytest.raises(ValueError, match="logdir"):
        train(tiny, tmp_path)


def test_the_learning_rate_decays(tiny, tmp_path):
    config = dataclasses.replace(
        tiny, learning_rate=1e-3, learning_rate_end=1e-4, learning_rate_decay_steps=300, total_steps=320
    )
    with Run(config, tmp_path) as run:
        list(run.reports())
        assert run.learner.learning_rate == pytest.approx(1e-4)


def test_a_chosen_form_of_the_update_is_kept(tiny, tmp_path, monkeypatch):
    """A learner on a GPU chooses at its first update; the run says so, writes it down, and a resumed run uses it."""
    notes, update = [], Learner.update

    def choosing(learner, batch):
        learner.choice = "plain (plain 300 us; fused RuntimeError: no)"
        update(learner, batch)

    with Run(tiny, tmp_path) as run:
        run.note = notes.append
        assert run._state()["update"] is None
        monkeypatch.setattr(Learner, "update", choosing)
        list(run.reports())
    assert notes == ["update plain (plain 300 us; fused RuntimeError: no)"]

    def recorded():
        return json.loads((tmp_path / "environment.json").read_text()).get("update")

    assert recorded() == notes[0].removeprefix("update ")
    longer = dataclasses.replace(tiny, total_steps=2 * tiny.total_steps)
    with Run(longer, tmp_path, resume=True) as run:
        assert run.learner.choice == recorded() == notes[0].removeprefix("update ")
    monkeypatch.setattr(training, "_card", lambda device: "another card")
    with Run(longer, tmp_path, resume=True) as run:
        assert run.learner.choice == ""


def test_a_run_with_the_fused_form(tiny, tmp_path):
    with Run(dataclasses.replace(tiny, update="fused", precision="float32"), tmp_path) as run:
        list(run.reports())
    assert run.learner.form == "fused"
    assert json.loads((tmp_path / "environment.json").read_text())["update"] == "fused"
    assert run.result().updates > 70

"""Resuming runs: from a checkpoint, after a kill, with and without the replay buffer."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pydqn import resume, train
from pydqn._util.weights import load_weights, save_weights
from pydqn.envs.make import make_envs
from pydqn.evaluation.build import trained_policy
from pydqn.evaluation.evaluate import evaluate
from pydqn.runs.checkpoint import latest_checkpoint, load_checkpoint, read_state
from pydqn.runs.layout import EPISODES, load_run
from pydqn.runs.logs import read_csv
from pydqn.training.loop import Run
from tests.helpers.runs import CARTPOLE, EXACT, digest, kill


def rows(path, name):
    return read_csv(path / f"{name}.csv")


@pytest.mark.parametrize("with_replay", [False, True])
def test_a_resumed_run_continues_where_it_was(tiny, tmp_path, with_replay):
    config = dataclasses.replace(tiny, checkpoint_replay=with_replay, total_steps=300)
    with Run(config, tmp_path) as run:
        list(run.reports())
        stored = len(run.replay)
        weights = {name: value.clone() for name, value in run.learner.state_dict().items()}
    before = run.result()
    with Run(load_run(tmp_path, total_steps=500), tmp_path, resume=True) as run:
        assert run.steps == before.steps
        assert run.frames == before.frames
        assert run.learner.updates == before.updates
        assert run.result().returns == before.returns
        for name, value in run.learner.state_dict().items():
            assert torch.equal(value, weights[name]), name
        assert len(run.replay) == (stored if with_replay else 0)
        list(run.reports())
    after = run.result()
    assert 500 <= after.steps <= 501
    assert after.seconds > before.seconds
    assert after.returns[: len(before.returns)] == before.returns
    # Without the replay buffer, updates resume when it holds enough transitions again.
    missed = 0 if with_replay else 50
    assert after.updates == pytest.approx(before.updates + (after.steps - before.steps - missed) / 4, abs=1.5)
    progress, episodes = rows(tmp_path, "progress"), rows(tmp_path, "episodes")
    assert progress["steps"] == sorted(set(progress["steps"]))
    assert np.all(np.diff(progress["seconds"]) > 0)
    assert episodes["return"] == after.returns
    assert episodes["episode"] == list(range(1, len(after.returns) + 1))
    assert load_run(tmp_path).total_steps == 500
    board = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in board.Scalars("speed/updates")] == progress["steps"]


def test_rows_after_the_checkpoint_are_written_again(tiny, tmp_path):
    """After a kill, the logs are ahead of the latest checkpoint, and the last line may be cut short."""
    config = dataclasses.replace(tiny, checkpoint_every_steps=100, log_every_steps=20, max_episode_steps=40)
    run = Run(config, tmp_path)
    for report in run.reports():
        if report.steps >= 290:
            break
    kill(run)
    steps = read_state(latest_checkpoint(tmp_path))["steps"]
    assert 200 <= steps < 210
    with open(tmp_path / "progress.csv", "a") as file:
        file.write("12.5,3")
    assert rows(tmp_path, "episodes")["steps"][-1] <= 290
    result = resume(tmp_path)
    progress, episodes = rows(tmp_path, "progress"), rows(tmp_path, "episodes")
    assert progress["steps"] == sorted(set(progress["steps"]))
    assert progress["steps"][-1] == result.steps
    assert episodes["return"] == result.returns
    assert episodes["steps"] == sorted(episodes["steps"])


@pytest.mark.parametrize(
    "variant",
    [{}, {"prioritized": True, "storage": "device"}, {"sticky_actions": 0.25}, {**CARTPOLE, "skip_first_steps": 3}],
)
def test_a_resumed_run_is_the_same_run(tiny, tmp_path, variant):
    """Bit for bit, when resumed several times after kills, where checkpoints hold the replay buffer."""
    config = dataclasses.replace(
        tiny,
        **{**variant, "total_steps": 700, "checkpoint_every_steps": 150, "log_every_steps": 40},
        checkpoint_replay=True,
        evaluation_every_steps=200,
        evaluation_episodes=1,
        max_episode_steps=60,
    )
    train(config, tmp_path / "whole")
    folder = tmp_path / "killed"
    for number, steps in enumerate((190, 480, 610)):
        run = Run(config, folder, resume=number > 0)
        assert number == 0 or 0 < run.steps < steps
        for report in run.reports():
            if report.steps >= steps:
                break
        kill(run)
    resume(folder)
    ours, theirs = rows(folder, "progress"), rows(tmp_path / "whole", "progress")
    for name in EXACT:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    assert digest(folder) == digest(tmp_path / "whole")
    states = [load_checkpoint(latest_checkpoint(path)) for path in (folder, tmp_path / "whole")]
    for name, value in states[0].tensors.items():
        assert torch.equal(value, states[1].tensors[name]), name


def test_episodes_that_a_checkpoint_counts_are_in_the_log(tiny, tmp_path):
    """Also when the run is killed immediately after the checkpoint."""
    settings = {**CARTPOLE, "total_steps": 300, "checkpoint_every_steps": 120, "log_every_steps": 1000}
    config = dataclasses.replace(tiny, **settings)
    train(config, tmp_path / "whole")
    run = Run(config, tmp_path / "killed")
    run._restart_episodes = lambda _: 1 / 0
    with pytest.raises(ZeroDivisionError):
        list(run.reports())
    kill(run)
    resume(tmp_path / "killed")
    assert digest(tmp_path / "killed") == digest(tmp_path / "whole")


@pytest.mark.parametrize("found", ["float32", "bfloat16"])
def test_the_precision_that_was_found_is_kept(tiny, tmp_path, monkeypatch, found):
    """Also on a processor for which "auto" chooses another precision: that would be another run."""
    for faster in (found == "bfloat16", found != "bfloat16"):
        monkeypatch.setattr("pydqn.learning.policy._bfloat16_is_faster", lambda faster=faster: faster)
        with Run(
            dataclasses.replace(tiny, total_steps=60), tmp_path, resume=(tmp_path / "config.json").exists()
        ) as run:
            assert run.arithmetic()["precision"] == found
            list(run.reports())
    with Run(dataclasses.replace(tiny, precision="float32"), tmp_path, resume=True) as run:
        assert run.arithmetic()["precision"] == "float32"


def test_a_resumed_run_plays_other_episodes(tiny, tmp_path):
    config = dataclasses.replace(tiny, checkpoint_replay=True, total_steps=60)
    train(config, tmp_path)
    seeds = []
    for fresh in (False, True):
        target = tmp_path if not fresh else tmp_path / "fresh"
        with Run(config, target, resume=not fresh) as run:
            seeds.append(run.envs._seeds.tolist())
    assert set(seeds[0]).isdisjoint(seeds[1])


def test_two_checkpoints_are_kept(tiny, tmp_path):
    config = dataclasses.replace(tiny, checkpoint_every_steps=100, checkpoint_every_episodes=1)
    seen = []
    with Run(config, tmp_path) as run:
        save = run._checkpoint
        run._checkpoint = lambda: (save(), seen.append(sorted(p.name for p in (tmp_path / "checkpoints").iterdir())))
        list(run.reports())
    assert all(len(names) == 2 for names in seen)  # the previous one is kept; the first is from the start
    steps = [int(names[-1].removeprefix("step-")) for names in seen]
    assert steps[-1] == run.steps
    # Every hundred steps, and at the end of each episode (of 100 steps, in two environments).
    assert len(steps) >= 5


def test_weights_are_chosen(tiny, tmp_path):
    """The best ones, else the newest, or those that are named."""
    train(dataclasses.replace(tiny, total_steps=60), tmp_path)  # too short for a best
    envs = make_envs(tiny, 1, 0)

    def chosen(weights=None):
        policy, metadata = trained_policy(tmp_path, tiny, envs, weights)
        return metadata["steps"], next(policy.network.parameters()).detach().clone()

    last, _ = load_weights(tmp_path / "weights" / "last.safetensors")
    assert chosen()[0] == chosen("last")[0] == chosen("checkpoint")[0] == 60
    with pytest.raises(ValueError, match="has no best weights yet"):
        chosen("best")
    save_weights(tmp_path / "weights" / "last.safetensors", last, {"steps": 30})
    assert (chosen()[0], chosen("last")[0]) == (60, 30)
    save_weights(tmp_path / "weights" / "best.safetensors", {k: 0 * v for k, v in last.items()}, {"steps": 20})
    assert chosen()[0] == chosen("best")[0] == 20
    assert (chosen()[1] == 0).all()
    assert not (chosen("checkpoint")[1] == 0).all()
    with pytest.raises(ValueError, match="^weights: expected one of best, last, checkpoint, got 'first'"):
        chosen("first")


def test_what_cannot_be_resumed(tiny, tmp_path):
    with pytest.raises(ValueError, match="is not the folder of a run"):
        resume(tmp_path)
    train(dataclasses.replace(tiny, total_steps=60), tmp_path / "run")
    with pytest.raises(ValueError, match="checkpoint: does not fit the config"):
        resume(tmp_path / "run", hidden_units=(16,), total_steps=100)
    with pytest.raises(ValueError, match="or resume it"):
        train(tiny, tmp_path / "run")
    file = latest_checkpoint(tmp_path / "run") / "state.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(
        ValueError, match="state.safetensors: expected .* bytes, got .*; resume .*step-0+ instead, which is whole"
    ):
        resume(tmp_path / "run", total_steps=100)
    for manifest in tmp_path.rglob("manifest.json"):
        manifest.unlink()
    with pytest.raises(ValueError, match="has no checkpoint to resume from"):
        resume(tmp_path / "run", total_steps=100)


def test_a_replay_buffer_that_does_not_fit(tiny, tmp_path):
    train(dataclasses.replace(tiny, total_steps=60, checkpoint_replay=True), tmp_path)
    with pytest.raises(ValueError, match="the replay buffer has capacity 1000, expected 2000"):
        resume(tmp_path, replay_capacity_frames=2_000, total_steps=100)


def test_a_killed_process_is_resumed(tmp_path):
    """SIGKILL, as the out-of-memory killer sends it; then the command line resumes the run."""
    folder = tmp_path / "run"
    options = [
        *("--device", "cpu", "--torch-threads", "1", "--learning-starts-steps", "50", "--batch-size", "4"),
        *("--replay-capacity-frames", "1000", "--max-episode-steps", "40", "--video-every-episodes", "0"),
        *("--log-every-episodes", "2", "--log-every-steps", "50"),
    ]
    command = [sys.executable, "-m", "pydqn", "train"]
    process = subprocess.Popen(
        [*command, "breakout", *options, "--logdir", str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 90
    while not ((path := latest_checkpoint(folder)) and int(path.name.removeprefix("step-")) >= 120):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    before = read_state(latest_checkpoint(folder))
    returns = read_csv(folder / EPISODES)["return"][: before["episodes"]]
    assert before["updates"] > 0
    total = before["steps"] + 150
    again = [*command, "--resume", str(folder), "--total-steps", str(total)]
    done = subprocess.run(again, capture_output=True, text=True, check=False, env=os.environ, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"done: {total:,} steps" in done.stdout
    after = read_state(latest_checkpoint(folder))
    assert after["updates"] == before["updates"] + 150
    assert read_csv(folder / EPISODES)["return"][: before["episodes"]] == returns
    assert len(evaluate(folder, 1)) == 1

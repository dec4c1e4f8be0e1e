"""Full disks and damaged files, and how a run is resumed after them."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil

import pytest

from pydqn import preset, resume, train
from pydqn._util.files import Damaged
from pydqn._util.weights import load_weights, save_weights
from pydqn.cli.main import main
from pydqn.runs.checkpoint import checkpoints, latest_checkpoint, read_state
from pydqn.runs.logs import read_csv
from pydqn.training.loop import Run
from tests.helpers.runs import SMALL, kill


@pytest.fixture
def small():
    return preset("pong", **SMALL, log_every_steps=20, prioritized=False)


# --- the disk ---


@pytest.mark.filterwarnings("always:not everything could be saved")
def test_a_full_disk_is_an_error_with_advice(tmp_path, monkeypatch, capsys):
    options = ["--total-steps", "300", "--checkpoint-every-steps", "100", "--device", "cpu", "--torch-threads", "1"]
    fsync, full = os.fsync, []

    def refuse(file):
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(file)

    monkeypatch.setattr(os, "fsync", refuse)
    step = Run.step
    monkeypatch.setattr(Run, "step", lambda self: (step(self), full.extend([1] * (self.steps == 150)))[0])
    assert main(["train", "cartpole", *options, "--logdir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "pydqn: error: [Errno 28] No space left on device: " in error
    assert "pydqn: warning: not everything could be saved: " in error
    assert f"run: {latest_checkpoint(tmp_path)} is whole (pydqn train --resume {tmp_path})" in error
    assert not list(tmp_path.rglob("*.part"))
    full.clear()
    monkeypatch.setattr(Run, "step", step)
    assert main(["train", "--resume", str(tmp_path)]) == 0
    assert read_csv(tmp_path / "progress.csv")["steps"][-1] == 300


# --- damage ---


@pytest.mark.parametrize("file", ["state.safetensors", "manifest.json", "replay/index.json", "replay/*.zst"])
@pytest.mark.parametrize("how", ["flip", "cut", "gone"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_offered(small, tmp_path, file, how):
    train(dataclasses.replace(small, total_steps=120), tmp_path)
    older, newest = checkpoints(tmp_path)
    # The last file: earlier chunks may be shared by both checkpoints.
    victim = sorted(newest.glob(file))[-1]
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 16
    victim.unlink()
    if how != "gone":
        victim.write_bytes(data if how == "flip" else data[:-9])
    if (file, how) == ("manifest.json", "gone"):  # then it is no checkpoint
        assert latest_checkpoint(tmp_path) == older
        return
    with pytest.raises(Damaged) as raised:
        resume(tmp_path, total_steps=200)
    message = str(raised.value)
    assert message.startswith(str(victim))
    assert message.endswith(f"; resume {older} instead, which is whole")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    assert main(["train", "--resume", str(tmp_path)]) == 2
    assert sorted(path.name for path in tmp_path.rglob("*")) == before  # nothing has changed
    result = resume(older, total_steps=200)
    assert result.logdir == tmp_path
    assert result.steps >= 200
    steps = read_csv(tmp_path / "progress.csv")["steps"]
    assert steps == sorted(set(steps))


def test_a_checkpoint_with_a_damaged_replay_buffer_is_resumed_without_it(small, tmp_path):
    train(dataclasses.replace(small, total_steps=120), tmp_path)
    for path in tmp_path.rglob("*.zst"):
        path.unlink()
    with pytest.raises(ValueError, match=r"cannot be read .*; no older checkpoint is whole \(if only its replay"):
        resume(tmp_path, total_steps=200)
    assert resume(tmp_path, total_steps=200, checkpoint_replay=False).steps >= 200


def test_damaged_weights_are_found(small, tmp_path):
    train(dataclasses.replace(small, total_steps=120), tmp_path)
    path = tmp_path / "weights" / "last.safetensors"
    whole = path.read_bytes()
    for position in range(0, len(whole), 11):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"last.safetensors: "):
            load_weights(path)


def test_an_older_checkpoint_can_be_resumed(small, tmp_path):
    """Later checkpoints and rows of logs are removed then."""
    train(small, tmp_path)
    older, _ = checkpoints(tmp_path)
    steps = read_state(older)["steps"]
    with Run(dataclasses.replace(small, total_steps=400), tmp_path, resume=older) as run:
        assert run.steps == steps
        assert checkpoints(tmp_path) == [older]
        assert read_csv(tmp_path / "progress.csv")["steps"][-1] <= steps


@pytest.mark.parametrize(
    ("old", "new", "kept"), [("return", "retrun", 0), ("episode,", "eposide,", 0), ("\n3,", "\n3x,", 2), ("", "", 2)]
)
def test_a_damaged_table_of_episodes_costs_only_its_rows(small, tmp_path, old, new, kept):
    """The checkpoints stay usable."""
    with Run(small, tmp_path) as run:
        for _ in run.reports():
            pass
    whole, path = list(run.returns), tmp_path / "episodes.csv"
    assert len(whole) > 4
    lines = path.read_text().split("\n")
    fields = lines[3].split(",")
    fields[3] = "2.5.5"  # the third episode's return
    damaged = path.read_text().replace(old, new, 1) if old else "\n".join([*lines[:3], ",".join(fields), *lines[4:]])
    path.write_text(damaged)
    before = checkpoints(tmp_path)
    with pytest.warns(UserWarning, match=f"episodes.csv lacks {len(whole) - kept} of the {len(whole)} episodes so far"):
        run = Run(dataclasses.replace(small, total_steps=400), tmp_path, resume=True)
    with run:
        assert run.episodes == len(whole)
        assert list(run.returns) == whole[:kept]
        assert checkpoints(tmp_path) == before


def test_other_files_beside_checkpoints_are_left_alone(small, tmp_path):
    train(dataclasses.replace(small, total_steps=60), tmp_path)
    newest = latest_checkpoint(tmp_path)
    shutil.copytree(newest, newest.with_name(newest.name + "-good"))
    (newest.parent / "step-notes.txt").write_text("mine")
    (newest.parent / "step-000000000999").write_text("no folder")
    resume(newest, total_steps=300)
    names = {path.name for path in newest.parent.iterdir()}
    assert {newest.name + "-good", "step-notes.txt", "step-000000000999"} <= names
    assert latest_checkpoint(tmp_path).name == f"step-{300:012d}"


def test_better_weights_from_after_an_older_checkpoint_are_kept(small, tmp_path):
    train(dataclasses.replace(small, mean_episodes=1, checkpoint_every_steps=0), tmp_path)
    best = tmp_path / "weights" / "best.safetensors"
    weights, metadata = load_weights(best)
    save_weights(best, weights, {**metadata, "best": 1e6})
    result = resume(checkpoints(tmp_path)[0])  # from the start, where any episode would be the best so far
    assert result.returns
    assert load_weights(best)[1]["best"] == 1e6


def test_a_run_that_was_killed_at_once_is_resumed(small, tmp_path):
    """The first checkpoint is from before the first step, and gives the same run."""
    train(small, tmp_path / "whole")
    run = Run(small, tmp_path / "killed")
    next(run.reports())
    kill(run)
    assert latest_checkpoint(tmp_path / "killed").name == f"step-{0:012d}"
    resume(tmp_path / "killed")
    for name in ("episodes.csv", "weights/last.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

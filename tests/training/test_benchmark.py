from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pydqn import preset
from pydqn.cli.main import main
from pydqn.training.benchmark import measure

STAGES = ["environments, with preprocessing", "append", "sample 4", "act", "update of 4", "whole loop", "whole loop"]
SMALL = {"batch_size": 4, "num_envs": 2, "replay_capacity_frames": 2_000, "torch_threads": 1, "device": "cpu"}


@pytest.mark.parametrize("name", ["pong", "cartpole", "breakout"])
def test_every_stage_is_measured(name):
    rows = list(measure(preset(name, **{**SMALL, "num_envs": 1 if name == "cartpole" else 2}), 0.05))
    assert [row.stage for row in rows] == STAGES
    assert all(row.microseconds > 0 and row.per_second > 0 for row in rows)
    loop, frames = rows[-2:]
    skip = 4 if name == "pong" else 1
    assert frames.per_second > 0.5 * skip * loop.per_second
    slowest = {row.stage: row.microseconds for row in rows}
    assert slowest["append"] < slowest["update of 4"] / 5


def test_the_whole_loop_learns_at_the_presets_ratio():
    """The loop includes the updates, so it cannot be faster than they are."""
    rows = {row.stage: row for row in measure(preset("pong", train_period_steps=1.0, **SMALL), 0.2)}
    assert rows["whole loop"].microseconds > 2 * 0.5 * rows["update of 4"].microseconds


def test_a_table_has_no_stages():
    with pytest.raises(ValueError, match="^agent: expected dqn, got 'tabular'"):
        list(measure(preset("frozenlake")))


def test_the_command(tmp_path, capsys):
    options = ["--batch-size", "4", "--num-envs", "2", "--torch-threads", "1", "--seconds", "0.02"]
    assert main(["bench", "pong", *options, "-o", str(tmp_path / "a.json")]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert len(lines) == 1 + len(STAGES)
    assert all(len(line) < 100 for line in lines)
    assert "updates" in out
    written = json.loads((tmp_path / "a.json").read_text())
    assert [row["stage"] for row in written["stages"]] == STAGES
    assert written["config"]["batch_size"] == 4
    assert "torch" in written["about"]


def script(*arguments):
    command = [sys.executable, str(Path(__file__).parents[2] / "bench" / "gpu.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_gpu_script_runs_without_one(tmp_path):
    out = script("--device", "cpu", "--quick", "ceiling", "act", "-o", str(tmp_path / "rows.json"))
    assert "act, 32 environments, eager" in out
    written = json.loads((tmp_path / "rows.json").read_text())
    assert [row["unit"] for row in written["rows"]] == ["GB/s", "us", "us", "us"]
    assert all(row["value"] > 0 for row in written["rows"])
    assert written["about"]["device"] == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_the_gpu_script_says_that_it_skips():
    assert script().startswith("skipped: PyTorch sees no CUDA device")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seconds", "0"], "seconds: expected a positive number"),
        (["-o", "/no/such/folder/a.json"], "output: there is no folder"),
        (["frozenlake"], "agent: expected dqn"),
        (["nothing"], "preset"),
    ],
)
def test_wrong_input_is_one_clear_line(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err

"""Runs of millions of short episodes: checkpoints stay small, and every return is kept in episodes.csv."""

from __future__ import annotations

import csv
import dataclasses
import json
import time
from array import array

import numpy as np
import pytest

from pydqn import resume, train
from pydqn.runs.checkpoint import latest_checkpoint, read_state, save_checkpoint
from pydqn.runs.logs import read_csv, read_returns
from pydqn.training.loop import Run
from tests.helpers.odd_envs import config_of
from tests.helpers.runs import kill

pytestmark = pytest.mark.filterwarnings("ignore:updates take")
MANY = 6_000_000


@pytest.fixture
def short():
    """Episodes of at most ten steps."""
    return config_of(env_id="CartPole-v1", max_episode_steps=10, total_steps=200, checkpoint_every_steps=50)


def test_a_checkpoint_after_six_million_episodes(short, tmp_path):
    with Run(short, tmp_path) as run:
        run.returns.extend(np.random.default_rng(0).random(MANY))
        run.episodes += MANY
        list(run.reports())
        started = time.perf_counter()
        run.steps += 1
        run._checkpoint()
        seconds = time.perf_counter() - started
        path = latest_checkpoint(tmp_path)
        assert len(json.dumps(read_state(path))) < 20_000
        assert sum(file.stat().st_size for file in path.iterdir() if file.is_file()) < 100_000
        assert read_state(path)["episodes"] == run.episodes > MANY
        assert seconds < 5  # (writing 6 million returns as JSON takes longer, and could not be read back)
        assert run.returns.itemsize * len(run.returns) < 9 * MANY


def test_every_return_is_kept_to_the_last_bit(tmp_path, counted):
    """Rewards of 17 digits are read back exactly when a run is resumed, also after a kill."""
    config = config_of(total_steps=400, checkpoint_every_steps=100)
    whole = train(config, tmp_path / "whole")
    run = Run(config, tmp_path / "cut")
    for report in run.reports():
        if report.steps >= 250:
            break
    kill(run)
    after = resume(tmp_path / "cut")
    assert after.returns == whole.returns
    assert isinstance(after.returns, list)
    assert len(after.returns) > 20
    assert read_csv(tmp_path / "cut" / "episodes.csv")["return"] == whole.returns
    assert any(len(str(value)) > 12 for value in whole.returns)


def test_whole_numbers_are_written_without_a_fraction(short, tmp_path):
    train(short, tmp_path)
    with open(tmp_path / "episodes.csv") as file:
        returns = [row["return"] for row in csv.DictReader(file)]
    assert returns
    assert all(value.isdigit() for value in returns)


def test_older_checkpoints_are_resumed(short, tmp_path):
    """They held all returns and a list of metrics, and no tensor with the number of updates."""
    first = train(short, tmp_path)
    path = latest_checkpoint(tmp_path)
    with Run(dataclasses.replace(short, total_steps=300), tmp_path, resume=True) as run:
        state, tensors = run._resumed, run._tensors()
        del state["episodes"], tensors["updates"]
        numbers = state.pop("statistics")
        state["metrics"] = [numbers[name] for name in ("loss", "mean_q", "grad_norm", "max_q")]
        state["returns"] = [value + 0.125 for value in first.returns]
        run.replay.save(tmp_path / "replay")
        replay = run.replay
    save_checkpoint(tmp_path, int(path.name[5:]), tensors, state, replay.save)
    for later in sorted((tmp_path / "checkpoints").iterdir()):
        assert later <= path or later.name > path.name
    result = resume(path, total_steps=300)
    assert result.returns[: len(first.returns)] == state["returns"]
    assert read_state(latest_checkpoint(tmp_path))["episodes"] == len(result.returns) > len(first.returns)
    assert "returns" not in read_state(latest_checkpoint(tmp_path))


@pytest.mark.parametrize("how", ["gone", "cut"])
def test_a_log_with_missing_rows_is_a_warning(short, tmp_path, how):
    first = train(short, tmp_path)
    log = tmp_path / "episodes.csv"
    if how == "gone":
        log.unlink()
        left = 0
    else:
        log.write_text("".join(log.read_text().splitlines(keepends=True)[:4]))
        left = 3
    count = len(first.returns)
    with pytest.warns(UserWarning, match=f"episodes.csv lacks {count - left} of the {count} episodes"):
        run = Run(dataclasses.replace(short, total_steps=300), tmp_path, resume=True)
    with run:
        assert run.episodes == count
        assert list(run.returns) == first.returns[:left]
        list(run.reports())
        assert run.episodes > count
    assert read_csv(tmp_path / "progress.csv")["episodes"][-1] == run.episodes


def test_long_logs_are_read_row_by_row(tmp_path):
    count = 100_000
    with open(tmp_path / "episodes.csv", "w") as file:
        file.write("episode,steps,env_index,return,length_steps\n")
        for number in range(1, count + 1):
            file.write(f"{number},{number},0,{number / 8!r},1\n")
        file.write(f"{count + 1},{count},0,1")  # cut short
    assert read_returns(tmp_path, count) == array("d", (number / 8 for number in range(1, count + 1)))
    assert len(read_returns(tmp_path, 7)) == 7
    assert len(read_returns(tmp_path, 10**15)) == count

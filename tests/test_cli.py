"""The command line as a person types it."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time

import imageio.v3 as imageio
import numpy as np
import pytest

from pydqn import Config
from pydqn.cli import main
from pydqn.presets import PRESETS

TINY = [
    *("--num-envs", "2", "--total-steps", "250", "--max-episode-frames", "400", "--replay-capacity-frames", "1000"),
    *("--learning-starts-steps", "50", "--batch-size", "8", "--hidden-units", "32", "--log-every-steps", "50"),
    *("--mean-episodes", "2", "--device", "cpu", "--torch-threads", "1"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("runs") / "pong-7"
    assert main(["train", "pong", *TINY, "--seed", "7", "--logdir", str(folder)]) == 0
    return folder


def test_train_leaves_a_run(run):
    for name in ("config.json", "progress.csv", "episodes.csv", "weights/best.safetensors", "weights/last.safetensors"):
        assert (run / name).stat().st_size > 0
    assert '"seed": 7' in (run / "config.json").read_text()


def test_the_progress_bar_says_what_matters(tmp_path, capfd):
    assert main(["train", "pong", *TINY, "--logdir", str(tmp_path / "run")]) == 0
    out, err = capfd.readouterr()
    line = err.replace("\r", "\n").strip().split("\n")[-1]
    for word in ("steps", "frames/s", "updates/s", "eps", "return", "loss", "<"):
        assert word in line
    assert re.search(r"done: \d+ steps, \d+ updates, \d+ games in .* min; mean return of the last 2: -?\d", out)


def test_evaluate(run, capsys):
    assert main(["evaluate", str(run), "--episodes", "3"]) == 0
    assert re.match(r"3 games: mean return -?\d+\.\d\d, standard deviation", capsys.readouterr().out)


@pytest.mark.parametrize("suffix", [".gif", ".mp4"])
def test_play_records_without_a_display(run, tmp_path, capsys, monkeypatch, suffix):
    monkeypatch.delenv("DISPLAY", raising=False)
    video = tmp_path / f"game{suffix}"
    assert main(["play", str(run), "--record", str(video)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"total reward -\d+ in 100 steps; actions 0:\d+ 1:\d+", out)
    pictures = np.stack(list(imageio.imiter(video, plugin="pillow" if suffix == ".gif" else "FFMPEG")))
    assert pictures.shape[0] >= 90  # GIF drops repeated pictures
    assert pictures.shape[1:] == (420, 320, 3)
    assert pictures[50].std() > 10
    assert [file.name for file in tmp_path.iterdir()] == [video.name]


def test_play_shows_the_game_in_the_terminal(run, capsys):
    assert main(["play", str(run), "--show", "--fps", "1000", "--most-steps", "5"]) == 0
    out = capsys.readouterr().out
    assert out.count("\x1b[H") == 5
    assert "\u2580" in out
    assert "unfinished in 5 steps" in out


def test_a_run_without_rows_cannot_be_drawn(run, tmp_path, capsys):
    (tmp_path / "progress.csv").write_text((run / "progress.csv").read_text().splitlines()[0] + "\n")
    assert main(["plot", str(tmp_path), "-o", str(tmp_path / "a.png")]) == 2
    assert "has no rows to draw yet" in capsys.readouterr().err


def test_plot(run, tmp_path, capsys):
    picture = tmp_path / "curve.png"
    assert main(["plot", str(run), str(run), "-o", str(picture)]) == 0
    assert imageio.imread(picture).shape[:2] == (540, 1350)


def test_presets(capsys):
    assert main(["presets"]) == 0
    listed = capsys.readouterr().out
    for name, preset in PRESETS.items():
        assert name in listed
        assert preset.summary in listed
    assert main(["presets", "pong"]) == 0
    printed = capsys.readouterr().out
    for field in dataclasses.fields(Config):
        assert re.search(rf"^{field.name} ", printed, re.MULTILINE)


def test_every_setting_is_an_option_with_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(Config):
        assert "--" + field.name.replace("_", "-") in text
        assert " ".join(field.metadata["help"].split()[:2]) in " ".join(text.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("presets pnog", "preset: 'pnog' is not known; did you mean pong?"),
        ("train pnog", "preset: 'pnog' is not known; did you mean pong?"),
        ("train", "the following arguments are required: PRESET"),
        ("train pong --num-envs -3", "num_envs: expected at least 1, got -3"),
        ("train pong --num-envs 0", "num_envs: expected at least 1, got 0"),
        ("train pong --replay-capacity-frames -1", "replay_capacity_frames: expected"),
        ("train pong --batch-size many", "argument --batch-size: invalid integer value: 'many'"),
        ("train pong --batch-size 1.5", "argument --batch-size: invalid integer value: '1.5'"),
        ("train pong --max-episode-frames 1e12", "max_episode_frames: expected at most"),
        ("train pong --env-id nosuchmodule:Env-v0", "env_id: Gymnasium cannot make"),
        ("train pong --gamma nan", "gamma: expected"),
        ("train pong --loss hinge", "loss: expected one of huber, mse, got 'hinge'"),
        ("train pong --nonsense 3", "unrecognized arguments: --nonsense 3"),
        ("train pong --env-id brekout", "env_id: there is no Atari game 'brekout'; did you mean breakout"),
        ("train pong --env-id CartPol-v1", "env_id: Gymnasium cannot make 'CartPol-v1'"),
        ("train pong --env-id CartPole-v1", "network: 'small' needs frames of two axes, got (4,); mlp takes any"),
        ("train pong --env-id Pendulum-v1 --network mlp", "env_id: Pendulum-v1 has Box"),
        ("train pong --device cuda:77", "device: 'cuda:77' is not there"),
        ("train pong --device tpu", "device: expected auto, cpu, cuda or cuda:N, got 'tpu'"),
        ("train pong --logdir RUN", "holds a run already"),
        ("play nowhere", "run: 'nowhere' is not the folder of a run"),
        ("play RUN --record film.avi", "record: expected a name that ends in .mp4 or .gif, got 'film.avi'"),
        ("play RUN --record none/film.gif", "record: there is no folder 'none'"),
        ("play RUN --fps 0", "fps: expected at least 1, got 0"),
        ("evaluate nowhere", "run: 'nowhere' is not the folder of a run"),
        ("evaluate RUN --episodes 0", "episodes: expected at least 1, got 0"),
        ("evaluate RUN --epsilon 2", "evaluation_epsilon: expected a number from 0 to 1"),
        ("evaluate RUN --seed -1", "seed: expected at least 0, got -1"),
        ("play RUN --most-steps 0", "most_steps: expected at least 1, got 0"),
        ("plot nowhere -o a.png", "run: 'nowhere' is not the folder of a run"),
        ("plot RUN -o a.txt", "output: expected a name that ends in .png"),
        ("fly", "invalid choice: 'fly'"),
        ("", "the following arguments are required: COMMAND"),
    ],
)
def test_wrong_input_is_one_clear_line(run, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(arguments.replace("RUN", str(run)).split())
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert re.match(r"pydqn( train)?: error: ", err)
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_run_is_one_clear_line(run, tmp_path, capsys):
    folder = tmp_path / "run"
    (folder / "weights").mkdir(parents=True)
    config = (run / "config.json").read_text()
    for text in ("", "{", "[]", config.replace('"seed": 7', '"seed": "x"'), config.replace("seed", "sed")):
        (folder / "config.json").write_text(text)
        assert main(["evaluate", str(folder)]) == 2
    (folder / "config.json").write_text(config)
    assert main(["evaluate", str(folder)]) == 2
    assert "has no weights yet" in capsys.readouterr().err
    (folder / "weights" / "best.safetensors").write_bytes(b"not weights")
    assert main(["evaluate", str(folder)]) == 2
    (folder / "weights" / "best.safetensors").write_bytes((run / "weights" / "best.safetensors").read_bytes())
    (folder / "config.json").write_text(config.replace('"dueling": true', '"dueling": false'))
    assert main(["evaluate", str(folder)]) == 2
    assert "does not fit its config" in capsys.readouterr().err


def test_ctrl_c_leaves_usable_weights_and_exit_code_130(tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "pydqn.cli", "train", "pong", *TINY, "--total-steps", "1000000"]
    process = subprocess.Popen(
        [*command, "--logdir", str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )
    progress = folder / "progress.csv"
    deadline = time.monotonic() + 90
    while not (progress.exists() and progress.read_text().count("\n") >= 3):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted:" in out
    assert "Traceback" not in err
    assert progress.read_text().endswith("\n")
    assert main(["evaluate", str(folder), "--episodes", "1"]) == 0

"""The command line."""

from __future__ import annotations

import base64
import dataclasses
import json
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
from pydqn.cli.main import main
from pydqn.evaluation import evaluate as evaluation
from pydqn.presets import PRESETS
from pydqn.runs.checkpoint import latest_checkpoint, read_state
from pydqn.runs.layout import load_run
from pydqn.runs.logs import read_csv
from pydqn.training.loop import Run

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


def test_the_progress_bar(tmp_path, capfd):
    assert main(["train", "pong", *TINY, "--logdir", str(tmp_path / "run")]) == 0
    out, err = capfd.readouterr()
    line = err.replace("\r", "\n").strip().split("\n")[-1]
    for word in ("steps", "frames/s", "updates/s", "eps", "return", "loss", "<"):
        assert word in line
    assert re.search(r"done: \d+ steps, \d+ updates, \d+ episodes in .* min; mean return of the last 2: -?\d", out)
    assert re.search(r"^ended by total_steps: 25\d steps were taken$", out, re.MULTILINE)
    task, machine = err.splitlines()[:2]
    assert task.startswith("environment ALE/Pong-v5 (Atari), ")
    inputs = "inputs 84x84 uint8 / 255 then (x - 0.34) / 0.15"
    assert task.endswith(f"{inputs}, rewards clipped to their sign, episodes of at most 400 frames")
    assert machine.startswith("device cpu, precision ")


def test_evaluate(run, capsys):
    assert main(["evaluate", str(run), "--episodes", "3"]) == 0
    out = capsys.readouterr().out
    assert re.match(r"3 episodes: mean return -?\d+\.\d\d, standard deviation .*; -?\d+\.\d% of human\n", out)
    assert "protocol own: evaluation_epsilon 0.001, noop_max_frames 30" in out


def test_scores_are_kept_with_their_protocol(run, capsys):
    scores = run / "scores.jsonl"
    scores.unlink(missing_ok=True)
    assert main(["evaluate", str(run), "--protocol", "nature", "--episodes", "2", "--seed", "5"]) == 0
    assert "protocol nature: evaluation_epsilon 0.05, noop_max_frames 30, sticky_actions 0.0" in capsys.readouterr().out
    assert main(["evaluate", str(run), "--protocol", "machado2018", "--episodes", "1"]) == 0
    assert "sticky_actions 0.25, max_episode_frames 108000, num_envs 1\n" in capsys.readouterr().out
    first, second = (json.loads(line) for line in scores.read_text().splitlines())
    assert (first["protocol"], second["protocol"]) == ("nature", "machado2018")
    assert first["env_id"] == "ALE/Pong-v5"
    assert first["seed"] == 5
    assert first["trained_steps"] > 0
    assert (first["settings"]["num_envs"], second["settings"]["num_envs"]) == (2, 1)  # at most one for each episode
    assert len(first["returns"]) == 2
    assert first["mean_return"] == np.mean(first["returns"])
    assert first["human_normalized_percent"] == pytest.approx((first["mean_return"] + 20.7) / 30 * 100)
    scores.unlink()


def test_protocols_set_what_is_played(run, monkeypatch):
    """Their settings reach the emulators, also in evaluations while training."""
    made = []

    def make_envs(config, *arguments, **options):
        made.append(config)
        return real(config, *arguments, **options)

    real = evaluation.make_envs
    monkeypatch.setattr(evaluation, "make_envs", make_envs)
    evaluation.score(run, 1, protocol="machado2018", max_episode_steps=20)
    assert (made[-1].sticky_actions, made[-1].noop_max_frames, made[-1].max_episode_frames) == (0.25, 0, 108_000)
    config = dataclasses.replace(evaluation.load_run(run), evaluation_protocol="nature", max_episode_steps=20)
    policy, _ = evaluation.trained_policy(run, config, real(config, 1, 0))
    evaluation.evaluate_policy(config, policy, 2, 0)
    assert (made[-1].evaluation_epsilon, made[-1].max_episode_frames) == (0.05, 18_000)


def test_a_page_that_plays_an_episode(run, tmp_path, capsys):
    page = tmp_path / "episode.html"
    assert main(["play", str(run), "--record", str(page), "--most-steps", "20", "--q-values"]) == 0
    text = page.read_text()
    assert text.startswith("<!DOCTYPE html>")
    video = json.loads(
        re.search(r'<script type="application/json" id="video">(.*?)</script>', text, re.DOTALL).group(1)
    )
    assert len(video["images"]) == len(video["captions"]) == 20
    assert video["actions"][:3] == ["NOOP", "FIRE", "RIGHT"]
    assert len(video["captions"][0][3]) == 6
    image = imageio.imread(base64.b64decode(video["images"][3]), extension=".png")
    assert image.shape[:2] == (210, 160)  # the page itself draws the action values
    assert "http" not in re.sub(r"http://www.w3.org\S*", "", text)  # the page fetches nothing


def test_play_shows_action_values_beside_the_image(run, tmp_path):
    video = tmp_path / "episode.gif"
    assert main(["play", str(run), "--record", str(video), "--q-values", "--most-steps", "5"]) == 0
    height, width, _ = imageio.imread(video, index=0).shape
    assert height == 420
    assert width > 420


def test_play_keeps_to_a_frame_rate(run):
    started = time.monotonic()
    assert main(["play", str(run), "--show", "--fps", "20", "--most-steps", "30"]) == 0
    assert time.monotonic() - started >= 29 / 20


def test_lines_for_episodes(tmp_path, capsys):
    folder = tmp_path / "run"
    command = ["train", "cartpole", "--total-episodes", "4", "--log-every-episodes", "2", "--device", "cpu"]
    assert main([*command, "--logdir", str(folder)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("episode ")]
    assert [line.split()[1] for line in lines] == ["2", "4"]
    for word in ("step", "return", "length", "mean return", "epsilon", "loss", "frames/s"):
        assert word in lines[-1]


def test_a_table_prints_its_best_tests(tmp_path, capsys):
    assert main(["train", "frozenlake", "--seed", "1", "--logdir", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    means = [float(mean) for mean in re.findall(r"step [\d,]+: best test mean so far (\d\.\d+)", out)]
    assert means == sorted(means)
    assert means[-1] > 0.8
    assert re.search(r"done: [\d,]+ steps", out)


def test_an_unfinished_run_is_offered(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["train", "pong", *TINY]
    assert main([*command, "--total-steps", "100"]) == 0
    folder = tmp_path / "runs" / "pong-0"
    assert main([*command, "--total-steps", "100"]) == 0  # a finished run is not offered
    assert "can go on" not in capsys.readouterr().err
    assert (tmp_path / "runs" / "pong-0.2").is_dir()
    with Run(load_run(folder, total_steps=400), folder, resume=True) as run:
        for _ in run.reports():
            run.stop()
    # Without a terminal, nobody can be asked.
    assert main([*command, "--total-steps", "60"]) == 0
    assert re.search(r"pong-0 can go on from step 1\d\d: pydqn train --resume", capsys.readouterr().err)
    assert (tmp_path / "runs" / "pong-0.3").is_dir()
    for stream in (sys.stdin, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    for answer, changed in (("n", False), ("", True)):
        monkeypatch.setattr("builtins.input", lambda question, answer=answer: answer)
        before = read_csv(folder / "progress.csv")["steps"][-1]
        assert main([*command, "--total-steps", "200"]) == 0
        assert (read_csv(folder / "progress.csv")["steps"][-1] > before) == changed
    assert load_run(folder).total_steps == 200


def test_resume_takes_new_settings(tmp_path, capsys):
    folder = str(tmp_path / "run")
    assert main(["train", "pong", *TINY, "--logdir", folder]) == 0
    assert main(["train", "--resume", folder, "--total-steps", "300", "--learning-rate", "1e-5"]) == 0
    assert re.search(r"done: 30[01] steps", capsys.readouterr().out)
    assert load_run(folder).learning_rate == 1e-5


@pytest.mark.parametrize("suffix", [".gif", ".mp4"])
def test_play_records_without_a_display(run, tmp_path, capsys, monkeypatch, suffix):
    monkeypatch.delenv("DISPLAY", raising=False)
    video = tmp_path / f"episode{suffix}"
    assert main(["play", str(run), "--record", str(video)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"total reward -\d+ in 100 steps; actions NOOP:\d+ FIRE:\d+ RIGHT:\d+", out)
    options = {"plugin": "pillow", "mode": "RGB"} if suffix == ".gif" else {"plugin": "FFMPEG"}
    images = np.stack(list(imageio.imiter(video, **options)))
    assert images.shape[0] == 100
    assert images.shape[1:] == (420, 320, 3)
    assert images[50].std() > 10
    assert [file.name for file in tmp_path.iterdir()] == [video.name]


def test_play_shows_the_episode_in_the_terminal(run, capsys):
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
    image = tmp_path / "curve.png"
    assert main(["plot", str(run), str(run), "-o", str(image)]) == 0
    assert imageio.imread(image).shape[:2] == (1080, 2025)
    assert main(["plot", str(run), "-o", str(image), "--panels", "return-frames", "length-episodes"]) == 0
    assert imageio.imread(image).shape[:2] == (540, 1350)


def test_what_two_presets_differ_in(capsys):
    assert main(["presets", "--diff", "dopamine-iqn", "m-iqn"]) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["dopamine-iqn", "m-iqn"],
        ["n_step", "3", "1"],
        ["munchausen", "False", "True"],
    ]
    assert main(["presets", "--diff", "nature", "nature"]) == 0
    assert capsys.readouterr().out.split() == ["nature", "nature"]
    assert main(["presets", "--diff", "nature", "natur"]) == 2
    assert "'natur' is not known; did you mean nature or" in capsys.readouterr().err


def test_presets(capsys):
    assert main(["presets"]) == 0
    listed = capsys.readouterr().out
    for name, preset in PRESETS.items():
        assert name in listed
        assert preset.summary in listed
        assert preset.source in listed
    assert main(["presets", "pong"]) == 0
    printed = capsys.readouterr().out
    assert PRESETS["pong"].source in printed
    for field in dataclasses.fields(Config):
        assert re.search(rf"^{field.name} ", printed, re.MULTILINE)


def test_a_reader_that_stops_reading():
    command = f"{sys.executable} -u -m pydqn presets nature | head -2"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 2


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_never_reads(unbuffered):
    """Buffered output meets the closed pipe only at the end of the command."""
    reader, writer = os.pipe()
    os.close(reader)
    command, env = [sys.executable, "-m", "pydqn", "presets"], {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env=env, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_every_setting_is_an_option_with_help(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(Config):
        assert "--" + field.name.replace("_", "-") in text
        words = re.escape(field.metadata["help"]).replace("\\ ", r"\s+").replace("\\-", r"-\s*")
        assert re.search(words, text), field.name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("presets pnog", "preset: 'pnog' is not known; did you mean pong?"),
        ("train pnog", "preset: 'pnog' is not known; did you mean pong?"),
        ("train", "train: expected a PRESET, or --resume RUN"),
        ("train pong --resume RUN", "train: expected a PRESET, or --resume RUN"),
        ("train --resume nowhere", "run: 'nowhere' is not the folder of a run"),
        ("train --resume RUN --logdir other", "logdir: a resumed run stays in its folder"),
        ("train --resume RUN --hidden-units 16 --total-steps 9999", "checkpoint: does not fit the config"),
        ("evaluate RUN --protocol nature --epsilon 0.5", "evaluation_epsilon: the protocol nature fixes it, got 0.5"),
        ("evaluate RUN --protocol atari", "argument --protocol: invalid choice: 'atari'"),
        ("plot RUN --values -o a.png", "run: the values of ALE/Pong-v5 are not on two axes"),
        ("plot RUN RUN --values -o a.png", "values: expected one RUN, got 2"),
        ("plot RUN --panels nonsense -o a.png", "panels: "),
        ("train pong --num-envs -3", "num_envs: expected at least 1, got -3"),
        ("train pong --num-envs 0", "num_envs: expected at least 1, got 0"),
        ("train pong --replay-capacity-frames -1", "replay_capacity_frames: expected"),
        ("train pong --batch-size many", "argument --batch-size: invalid integer value: 'many'"),
        ("train pong --batch-size 1.5", "argument --batch-size: invalid integer value: '1.5'"),
        ("train pong --max-episode-frames 1e12", "max_episode_frames: expected at most"),
        ("train pong --env-id nosuchmodule:Env-v0", "import: nosuchmodule cannot be imported"),
        ("train pong --gamma nan", "gamma: expected"),
        ("train pong --loss hinge", "loss: expected one of huber, mse, got 'hinge'"),
        ("train pong --nonsense 3", "unrecognized arguments: --nonsense 3"),
        ("train pong --env-id brekout", "env_id: there is no Atari game 'brekout'; did you mean breakout"),
        (
            "train pong --env-id CartPol-v1",
            "env_id: Gymnasium knows no 'CartPol-v1'; did you mean CartPole-v0 or",
        ),
        ("train pong --env-id CartPole-v1", "network: 'small' needs images, got frames of shape (4,); mlp takes any"),
        ("train pong --env-id Pendulum-v1 --network mlp", "env_id: Pendulum-v1 has Box"),
        ("train pong --device cuda:77", "device: 'cuda:77' is not there"),
        ("train pong --device tpu", "device: expected auto, cpu, cuda or cuda:N, got 'tpu'"),
        ("train pong --logdir RUN", "holds a run already"),
        ("play nowhere", "run: 'nowhere' is not the folder of a run"),
        ("play RUN --record video.avi", "record: expected a name that ends in .mp4, .gif or .html, got 'video.avi'"),
        ("play RUN --record none/video.gif", "record: there is no folder 'none'"),
        ("play RUN --fps 0", "fps: expected at least 1, got 0"),
        ("evaluate nowhere", "run: 'nowhere' is not the folder of a run"),
        ("evaluate RUN --episodes 0", "episodes: expected an integer of at least 1, got 0"),
        ("evaluate RUN --epsilon 2", "evaluation_epsilon: expected a number from 0 to 1"),
        ("evaluate RUN --seed -1", "seed: expected an integer of at least 0, got -1"),
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
    assert re.match(r"pydqn( \w+)?: error: ", err)
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
    assert "do not fit its config" in capsys.readouterr().err


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_leave_everything_saved_and_exit_code_75(tmp_path, sent):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "pydqn", "train", "pong", *TINY, "--total-steps", "1000000"]
    process = subprocess.Popen(
        [*command, "--logdir", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # though we may ignore it
    )
    progress = folder / "progress.csv"
    deadline = time.monotonic() + 90
    while not (progress.exists() and progress.read_text().count("\n") >= 3):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "interrupted:" in out
    assert "Traceback" not in err
    assert progress.read_text().endswith("\n")
    assert read_state(latest_checkpoint(folder))["steps"] == read_csv(progress)["steps"][-1]
    assert main(["evaluate", str(folder), "--episodes", "1"]) == 0

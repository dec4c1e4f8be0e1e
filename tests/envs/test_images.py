"""Images of environments, videos and their frame rate; the errors of environments that have no images."""

from __future__ import annotations

import imageio.v3 as imageio
import numpy as np
import pytest

from pydqn import train
from pydqn.cli.main import main
from pydqn.evaluation.evaluate import evaluate
from pydqn.evaluation.play import play_episode
from pydqn.training.loop import Run
from tests.helpers.odd_envs import ID, Odd, config_of, lines_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore:updates take")

IMAGES = {
    "none": (None, "render() returned None, expected an image, (H, W, 3) uint8"),
    "list": ([np.zeros((4, 4, 3), np.uint8)], "render() returned a list of 1, expected an image"),
    "text": ("ascii art", "render() returned ascii art (str), expected an image"),
    "floats": (np.zeros((4, 4, 3)), "render() returned an array of shape (4, 4, 3), dtype float64, expected an image"),
    "gray": (np.zeros((4, 4), np.uint8), "render() returned an array of shape (4, 4), dtype uint8, expected an image"),
    "alpha": (np.zeros((4, 4, 4), np.uint8), "returned an array of shape (4, 4, 4), dtype uint8, expected an image"),
    "empty": (np.zeros((0, 4, 3), np.uint8), "returned an array of shape (0, 4, 3), dtype uint8, expected an image"),
}
HINT = "training (video_every_episodes=0), evaluation and pydqn play --no-show need no images"


def without_render_mode(self):
    Odd.__init__(self)
    self.closed = False


def fail(self):
    raise OSError("no display")


@pytest.mark.parametrize("name", [*IMAGES, "an error", "no render_mode", "no rgb_array"])
def test_an_environment_without_images_trains_and_the_error_says_why(counted, tmp_path, name, capsys):
    if name in IMAGES:
        counted.image, expected = IMAGES[name]
    elif name == "an error":
        counted.render, expected = fail, "render() failed: OSError: no display"
    elif name == "no render_mode":
        counted.__init__, expected = without_render_mode, "could not be made: TypeError: "
    else:
        counted.metadata, counted.image = {"render_modes": ["human"]}, None
        expected = "render() returned None"
    train(config_of(), tmp_path / "run")
    assert len(evaluate(tmp_path / "run", 2)) == 2
    for command in (
        ["play", str(tmp_path / "run"), "--record", str(tmp_path / "a.gif")],
        ["play", str(tmp_path / "run"), "--show"],
        ["train", "--resume", str(tmp_path / "run"), "--video-every-episodes", "1", "--total-steps", "100"],
    ):
        capsys.readouterr()
        assert main(command) == 2
        error = [line for line in lines_of(capsys)[1] if "error" in line]
        assert len(error) == 1
        assert error[0].startswith(f"pydqn: error: env_id: {ID}, env index 0 ")
        assert expected in error[0]
        assert HINT in error[0]
    assert not (tmp_path / "a.gif").exists()
    assert main(["play", str(tmp_path / "run"), "--no-show"]) == 0
    assert "total reward" in capsys.readouterr().out
    assert main(["play", str(tmp_path / "run")]) == 0  # not a terminal: only the total is printed
    *steps, episode = play_episode(tmp_path / "run", images=False)
    assert len(steps) == episode.steps
    assert steps[0].image is None


def test_only_the_environment_in_videos_is_rendered(counted, tmp_path):
    train(config_of(num_envs=8, video_every_episodes=1, video_format="gif", total_steps=300), tmp_path)
    assert set(Odd.rendered) == {0}
    assert list((tmp_path / "videos").glob("frame-*.gif"))


@pytest.mark.parametrize(("fps", "expected"), [(12, 12), (4.4, 4), (None, 30), ("50", 30), (0, 30), (np.int64(20), 20)])
def test_videos_have_the_frame_rate_of_the_environment(counted, tmp_path, fps, expected):
    counted.metadata = {"render_modes": ["rgb_array"], "render_fps": fps}
    train(config_of(video_every_episodes=1, video_format="html", total_steps=100), tmp_path / "run")
    pages = list((tmp_path / "run" / "videos").glob("frame-*.html"))
    assert pages
    assert all(f'"fps":{expected},' in page.read_text() for page in pages)
    page = tmp_path / "a.html"
    assert main(["play", str(tmp_path / "run"), "--record", str(page)]) == 0
    assert f'"fps":{expected},' in page.read_text()
    assert main(["play", str(tmp_path / "run"), "--record", str(page), "--fps", "7"]) == 0
    assert '"fps":7,' in page.read_text()


def test_a_video_of_cartpole_has_its_frame_rate(tmp_path):
    train(config_of(env_id="CartPole-v1", total_steps=60), tmp_path / "run")
    assert main(["play", str(tmp_path / "run"), "--record", str(tmp_path / "a.mp4"), "--most-steps", "5"]) == 0
    assert imageio.immeta(tmp_path / "a.mp4", plugin="FFMPEG")["fps"] == 50


def test_a_run_outlives_a_video_that_fails(counted, tmp_path):
    """First the size of the images changes, then there is no folder for videos."""
    sizes = iter(range(1, 10_000))
    counted.render = lambda self: np.zeros((next(sizes), 5, 3), np.uint8)
    config = config_of(video_every_episodes=1, video_format="gif")
    with pytest.warns(RuntimeWarning, match="videos: an episode was not recorded: image: expected shape"):
        assert train(config, tmp_path / "a").steps >= 60
    assert not list((tmp_path / "a" / "videos").iterdir())
    with Run(config, tmp_path / "b") as run:
        (tmp_path / "b" / "videos").write_text("in the way")
        with pytest.warns(RuntimeWarning, match="videos: an episode was not recorded: .*videos"):
            list(run.reports())
    assert run.steps >= 60


def test_the_error_of_a_recording_comes_after_the_total(counted, tmp_path, monkeypatch, capsys):
    train(config_of(), tmp_path / "run")
    program = tmp_path / "ffmpeg"
    program.write_text("#!/bin/sh\ncat > /dev/null\necho 'no trailer' >&2\nexit 2\n")
    program.chmod(0o755)
    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", lambda: str(program))
    assert main(["play", str(tmp_path / "run"), "--record", str(tmp_path / "a.mp4")]) == 2
    out, err = lines_of(capsys)
    assert out[0].startswith("total reward ")
    assert not any("recorded" in line for line in out)
    assert len(err) == 1
    assert "ffmpeg ended with exit code 2 (no trailer)" in err[0]
    assert "a.mp4" in err[0]
    assert not list(tmp_path.glob("*a.mp4*"))

"""Videos, GIFs and pages: every image is written, in its colours."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys

import imageio.v3 as imageio
import numpy as np
import pytest
from PIL import Image

from pydqn.plotting.action_values import beside
from pydqn.plotting.images import Caption
from pydqn.plotting.recording import Recorder
from pydqn.training.episode_videos import EpisodeVideos


def images(count, shape=(21, 16), colours=12, seed=0):
    """Return images in which a few pixels change at a time, as in an episode; some equal the one before."""
    generator = np.random.default_rng(seed)
    palette = generator.integers(0, 256, (colours, 3), dtype=np.uint8)
    numbers = generator.integers(colours, size=shape)
    result = []
    for number in range(count):
        if number % 5:
            row, column = generator.integers(shape[0]), generator.integers(shape[1])
            numbers[row, column : column + 3] = generator.integers(colours)
        result.append(palette[numbers])
    return result


def record(path, frames, captions=None, **options):
    with Recorder(path, **options) as recorder:
        for number, frame in enumerate(frames):
            recorder.add(frame, captions[number] if captions else None)


def video_of(page):
    text = page.read_text()
    (inside,) = re.findall(r'<script type="application/json" id="video">(.*?)</script>', text, re.DOTALL)
    video = json.loads(inside)
    images = [Image.open(io.BytesIO(base64.b64decode(encoded))) for encoded in video["images"]]
    return video, [np.asarray(image.convert("RGB")) for image in images]


@pytest.mark.parametrize("colours", [1, 2, 12, 200])
def test_a_gif_has_every_image_in_its_colours(tmp_path, colours):
    frames = images(40, colours=colours)
    record(tmp_path / "a.gif", frames, scale=3)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 40
        assert gif.size == (48, 63)
        for number, frame in enumerate(frames):
            gif.seek(number)
            shown = np.asarray(gif.convert("RGB"))
            np.testing.assert_array_equal(shown, frame.repeat(3, axis=0).repeat(3, axis=1))


def test_a_gif_of_many_colours(tmp_path):
    """With more than the shared table holds, each image is exact up to 256 colours, and approximate beyond."""
    generator = np.random.default_rng(0)
    few = [generator.integers(0, 256, (10, 10, 3), dtype=np.uint8) for _ in range(6)]
    many = generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)
    record(tmp_path / "few.gif", few, scale=1)
    with Image.open(tmp_path / "few.gif") as gif:
        for number, frame in enumerate(few):
            gif.seek(number)
            np.testing.assert_array_equal(np.asarray(gif.convert("RGB")), frame)
    record(tmp_path / "many.gif", [many, many[::-1]], scale=1)
    with Image.open(tmp_path / "many.gif") as gif:
        assert gif.n_frames == 2
        assert np.abs(np.asarray(gif.convert("RGB")).astype(int) - many).mean() < 25


@pytest.mark.parametrize(("fps", "average"), [(30, 100 / 3), (15, 200 / 3), (100, 20), (7, 1000 / 7)])
def test_the_durations_of_a_gif(tmp_path, fps, average):
    """In hundredths of a second, without an error that adds up; at least two, as players slow down faster ones."""
    record(tmp_path / "a.gif", images(30), fps=fps)
    with Image.open(tmp_path / "a.gif") as gif:
        durations = []
        for number in range(30):
            gif.seek(number)
            durations.append(gif.info["duration"])
    assert np.mean(durations) == pytest.approx(average, abs=0.4)
    assert max(durations) - min(durations) <= 10


@pytest.mark.parametrize("shape", [(21, 16), (210, 160), (33, 47)])
def test_a_video_has_every_image(tmp_path, shape):
    frames = images(25, shape)
    record(tmp_path / "a.mp4", frames, fps=30)
    shown = np.stack(list(imageio.imiter(tmp_path / "a.mp4", plugin="FFMPEG")))
    assert shown.shape == (25, 2 * shape[0], 2 * shape[1], 3)
    assert imageio.immeta(tmp_path / "a.mp4", plugin="FFMPEG")["fps"] == 30
    expected = np.stack(frames).repeat(2, axis=1).repeat(2, axis=2)
    assert np.abs(shown.astype(int) - expected).mean() < 20  # lossy, and poor in colour


def test_large_images_are_not_enlarged(tmp_path):
    record(tmp_path / "a.gif", images(2, (400, 600)))
    assert imageio.imread(tmp_path / "a.gif", index=0).shape[:2] == (400, 600)


@pytest.mark.parametrize("colours", [1, 2, 12, 200, 2000])
def test_a_page_has_every_image_in_its_colours(tmp_path, colours):
    frames = images(30, colours=colours)
    record(tmp_path / "a.html", frames, fps=25)
    video, shown = video_of(tmp_path / "a.html")
    assert video["fps"] == 25
    assert video["scale"] == 2
    assert video["captions"] == []
    np.testing.assert_array_equal(np.stack(shown), np.stack(frames))


def test_a_page_has_captions(tmp_path):
    captions = [Caption("LEFT", 1.0, 3.0, (0.25, float("nan"))), None, Caption("RIGHT", -1.0, 2.0, ())]
    record(tmp_path / "a.html", images(3), captions, title="pong-0", action_names=["LEFT", "RIGHT"])
    video, _ = video_of(tmp_path / "a.html")
    assert video["title"] == "pong-0"
    assert video["actions"] == ["LEFT", "RIGHT"]
    assert video["captions"] == [["LEFT", 1.0, 3.0, [0.25, None]], None, ["RIGHT", -1.0, 2.0, []]]


def test_text_cannot_leave_its_script_element(tmp_path):
    evil = '</script><script>alert("@VIDEO@")</script><!--'
    record(tmp_path / "a.html", images(2), [Caption(evil, 0, 0, ())] * 2, title=evil, action_names=[evil])
    video, _ = video_of(tmp_path / "a.html")
    assert video["title"] == video["actions"][0] == video["captions"][0][0] == evil
    text = (tmp_path / "a.html").read_text()
    assert "alert(" not in re.sub(r'<script type="application/json".*?</script>', "", text, flags=re.DOTALL)


@pytest.mark.parametrize("suffix", [".gif", ".mp4", ".html"])
def test_a_file_is_whole_or_absent(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_text("before")
    with pytest.raises(KeyError), Recorder(path) as recorder:
        recorder.add(images(1)[0])
        raise KeyError
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="record: expected at least one image"), Recorder(path):
        pass
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_wrong_input(tmp_path):
    for name, options, message in (
        ("a.avi", {}, "^record: expected a name that ends in .mp4, .gif or .html, got '.*a.avi'"),
        ("none/a.gif", {}, "^record: there is no folder"),
        ("a.gif", {"fps": 0}, "^fps: expected at least 1, got 0"),
        ("a.gif", {"scale": -1}, "^scale: expected at least 1, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            Recorder(tmp_path / name, **options)
    good = images(1)[0]
    for bad in (good[..., 0], good.astype(float), good[:0], good[:-1]):
        with pytest.raises(ValueError, match="^image: expected"), Recorder(tmp_path / "a.gif") as recorder:
            recorder.add(good)
            recorder.add(bad)
    with pytest.raises(ValueError, match="^values: expected one for each of 2 actions, got 1"):
        record(tmp_path / "a.html", [good], [Caption("A", 0, 0, (1.0,))], action_names=["A", "B"])
    assert list(tmp_path.iterdir()) == []


# --- action values beside the image ---


@pytest.mark.parametrize("shape", [(210, 160), (400, 600), (84, 84)])
@pytest.mark.parametrize("values", [(0.5,), (1.0, -2.0, 0.0), tuple(np.linspace(-0.1, 0.001, 18)), (float("nan"), 1.0)])
def test_values_beside_an_image(shape, values):
    image = images(1, shape)[0]
    names = [f"ACTION{number}" for number in range(len(values))]
    panels = []
    for chosen in range(len(values)):
        whole = beside(image, names, values, chosen)
        assert whole.dtype == np.uint8
        np.testing.assert_array_equal(whole[:, : shape[1]], image)
        panels.append(whole[:, shape[1] :])
        marked = (panels[-1] == (255, 194, 75)).all(axis=2) | (panels[-1] == (42, 47, 58)).all(axis=2)
        rows = np.flatnonzero(marked.any(axis=1))
        assert len(rows)
        # The row of the chosen action is marked.
        assert rows.mean() / shape[0] == pytest.approx(
            0.5 + (chosen + 0.5 - len(values) / 2) * row_share(shape, values), abs=0.06
        )
    assert all(panel.shape == panels[0].shape for panel in panels)


def row_share(shape, values):
    zoom = max(1, shape[0] // 200)
    return max(1, min(18, shape[0] // zoom // len(values))) * zoom / shape[0]


def test_longer_bars_are_larger_values():
    image = images(1, (210, 160))[0]
    panel = beside(image, ["A", "B", "C"], (1.0, 2.0, -1.0), 1)[:, 160:]
    blue, gold = (0x5F, 0x8F, 0xC9), (0xFF, 0xC2, 0x4B)
    lengths = []
    for colour in (blue, gold):
        rows = ["".join("#" if same else "." for same in row) for row in (panel == colour).all(axis=2)]
        lengths.append(max(len(bar) for row in rows for bar in row.split(".")))
    assert lengths[0] > 15
    assert lengths[1] == pytest.approx(2 * lengths[0], abs=2)


def test_quantiles_of_the_return_are_ticks_on_the_chosen_bar():
    image, tick = np.zeros((210, 160, 3), np.uint8), np.array([0xE0, 0x53, 0x3D])
    plain, marked = (
        beside(image, ["A", "B"], (1.0, 2.0), 1, quantiles)[:, 160:] for quantiles in ((), (-1.0, 1.0, 1.9, 2.0))
    )
    assert not (plain == tick).all(-1).any()
    rows, columns = np.nonzero((marked == tick).all(-1))
    assert len(np.unique(columns)) == 4
    assert np.diff(np.unique(columns)).tolist()[0] > 5 * np.diff(np.unique(columns)).tolist()[2]
    assert rows.min() > 105  # not on the bar of A


def test_a_page_has_quantiles(tmp_path):
    with Recorder(tmp_path / "a.html", action_names=["A"]) as recorder:
        recorder.add(np.zeros((10, 10, 3), np.uint8), Caption("A", 1.0, 1.0, (0.5,), (0.25, 0.75)))
        recorder.add(np.zeros((10, 10, 3), np.uint8), Caption("A", 1.0, 2.0, (0.5,)))
    video = json.loads(re.search(r'id="video">(.*?)</script>', (tmp_path / "a.html").read_text(), re.DOTALL)[1])
    assert video["captions"] == [["A", 1, 1, [0.5], [0.25, 0.75]], ["A", 1, 2, [0.5]]]


def test_values_that_do_not_fit():
    image = images(1)[0]
    with pytest.raises(ValueError, match="^values: expected one for each of 2 actions, got 1"):
        beside(image, ["A", "B"], [1.0], 0)
    with pytest.raises(ValueError, match="^chosen: expected the index of one of 1 actions, got 1"):
        beside(image, ["A"], [1.0], 1)


# --- videos during training ---


def test_videos_are_named_by_frames_and_return(tmp_path):
    videos = EpisodeVideos(tmp_path / "videos", "gif")
    frames = images(7)
    videos.finish(10, 1.0)  # nothing is being recorded
    videos.start(frames[0])
    assert videos.recording
    for frame in frames[1:]:
        videos.add(frame)
    videos.finish(12_345, -21.0)
    assert not videos.recording
    videos.start(frames[0])
    videos.start(frames[0])  # the unfinished video is dropped
    videos.finish(20_000, 2.5)
    videos.start(frames[0])
    videos.drop()
    names = sorted(path.name for path in (tmp_path / "videos").iterdir())
    assert names == ["frame-000000012345-return--21.gif", "frame-000000020000-return-2.5.gif"]
    with Image.open(tmp_path / "videos" / names[0]) as gif:
        assert gif.n_frames == 7


# --- videos that cannot be written ---


def ffmpeg(tmp_path, monkeypatch, program):
    """Replace ffmpeg by another program."""
    path = tmp_path / "ffmpeg"
    path.write_text("#!/bin/sh\n" + program)
    path.chmod(0o755)
    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", lambda: str(path))


BROKEN = {
    "at once": ("echo 'no such codec' >&2; exit 8", r"exit code 8 \(no such codec\)"),
    "after a while": ("head -c 100000 > /dev/null; echo first >&2; echo 'disk full' >&2; exit 1", r"1 \(disk full\)"),
    "at the end": ("cat > /dev/null; echo 'no trailer' >&2; exit 2", r"exit code 2 \(no trailer\)"),
    "silently": ("cat > /dev/null; exit 3", r"exit code 3 \(it gave no reason\)"),
    "empty": ("cat > /dev/null", "wrote nothing"),
    "killed": ("head -c 100000 > /dev/null; kill -9 $$", r"exit code -9 \(it gave no reason\)"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_video_whose_encoder_failed_is_no_file(tmp_path, monkeypatch, how):
    program, why = BROKEN[how]
    ffmpeg(tmp_path, monkeypatch, program)
    path = tmp_path / "videos" / "a.mp4"
    path.parent.mkdir()
    with pytest.raises(OSError, match=rf"ffmpeg .*{why}.*a\.mp4"):
        record(path, images(30, (100, 100)))
    assert list(path.parent.iterdir()) == []


def test_a_failed_encoder_is_a_warning_and_the_next_video_is_written(tmp_path, monkeypatch):
    videos = EpisodeVideos(tmp_path / "videos", "mp4")
    frames = images(30, (100, 100))
    with monkeypatch.context() as broken:
        ffmpeg(tmp_path, broken, BROKEN["at the end"][0])
        for frame in frames:
            videos.add(frame) if videos.recording else videos.start(frame)
        with pytest.warns(RuntimeWarning, match=r"videos: .*exit code 2 \(no trailer\).*videos"):
            videos.finish(100, 1.0)
    assert list((tmp_path / "videos").iterdir()) == []
    for frame in frames:
        videos.add(frame) if videos.recording else videos.start(frame)
    videos.finish(200, 2.0)
    (path,) = (tmp_path / "videos").iterdir()
    assert len(list(imageio.imiter(path, plugin="FFMPEG"))) == 30


def test_without_ffmpeg_there_is_a_warning_and_no_video(tmp_path, monkeypatch):
    def missing():
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", missing)
    videos = EpisodeVideos(tmp_path / "videos", "mp4")
    with pytest.warns(RuntimeWarning, match=r"videos: an episode was not recorded: .*No ffmpeg exe could be found"):
        videos.start(images(1)[0])
    assert not videos.recording
    videos.finish(100, 1.0)
    with pytest.raises(FileNotFoundError, match=r"No ffmpeg exe could be found"):
        record(tmp_path / "videos" / "a.mp4", images(3))
    assert list((tmp_path / "videos").iterdir()) == []


@pytest.mark.parametrize("suffix", [".gif", ".mp4", ".html"])
def test_a_video_on_a_full_disk_is_no_file(tmp_path, monkeypatch, suffix):
    """The last operation fails: flushing the file to the disk."""

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=rf"No space left on device.*a\{suffix}"):
        record(tmp_path / f"a{suffix}", images(3))
    assert list(tmp_path.iterdir()) == []


def test_an_abandoned_video_leaves_no_ffmpeg(tmp_path):
    with pytest.raises(KeyError), Recorder(tmp_path / "a.mp4") as recorder:
        recorder.add(images(1)[0])
        process = recorder._writer._process
        raise KeyError
    assert process.returncode is not None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".gif", ".mp4", ".html"])
def test_an_interrupt_does_not_reach_the_encoder(tmp_path, suffix):
    """Ctrl-C is sent to all processes of a terminal; a recorder that continues still writes a whole video."""
    program = (
        "import os, signal, sys, numpy as np\nfrom pydqn.plotting.recording import Recorder\n"
        "signal.signal(signal.SIGINT, lambda *_: None)\n"
        "with Recorder(sys.argv[1]) as video:\n"
        "    for number in range(20):\n"
        "        video.add(np.full((20, 20, 3), number, np.uint8))\n"
        "        if number == 10:\n            os.killpg(0, signal.SIGINT)\n"
    )
    path = tmp_path / f"a{suffix}"
    subprocess.run([sys.executable, "-c", program, path], check=True, start_new_session=True)
    if suffix == ".mp4":
        assert len(list(imageio.imiter(path, plugin="FFMPEG"))) == 20
    assert path.stat().st_size > 100

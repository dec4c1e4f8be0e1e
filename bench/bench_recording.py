"""Recording an episode of Breakout; and GIFs, by pydqn and by Pillow's own writer.

`python bench/bench_recording.py` compares the two in turns, each in its own process: times, sizes and peak memory.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import psutil
import pytest
from PIL import Image
from timing import Elsewhere

from pydqn import preset
from pydqn._util.machine import processor
from pydqn.envs.atari import AtariEnvs
from pydqn.plotting.images import enlarged
from pydqn.plotting.palette import Palette, pack
from pydqn.plotting.recording import Recorder

FPS, SCALE = 50, 2  # 20 ms per image


def episode(count):
    """Return images of random play."""
    config = preset("breakout", noop_max_frames=0, frame_skip_max=0, frame_skip=4, sticky_actions=0.0)
    envs = AtariEnvs("breakout", config, 1, 0, render=True)
    out = np.zeros((1, 84, 84), np.uint8)
    envs.reset(out)
    generator = np.random.default_rng(0)
    images = []
    for _ in range(count):
        envs.send(generator.integers(4, size=1))
        envs.recv(out)
        images.append(envs.image().copy())
    return images


def by_pydqn(path, images):
    with Recorder(path, FPS, SCALE) as recorder:
        for image in images:
            recorder.add(image)


def by_pillow(path, images):
    """Pillow's delta frames, with one palette that holds the exact colours of all images."""
    palette = Palette(256)
    numbers = [palette.numbers(pack(image)) for image in images]

    def enlarged_images():
        for number in numbers:
            large = enlarged(number, SCALE)
            image = Image.frombytes("P", large.shape[::-1], large.tobytes())
            image.putpalette(palette.table)
            yield image

    following = enlarged_images()
    first = next(following)
    options = {"duration": 1000 // FPS, "loop": 0, "disposal": 1, "optimize": False}
    first.save(path, save_all=True, append_images=following, **options)


def assert_shows(path, images):
    """Each image is shown at its time. (Of equal images, Pillow makes a single one with a longer duration.)"""
    index = 0
    with Image.open(path) as gif:
        for frame in range(gif.n_frames):
            gif.seek(frame)
            shown = np.asarray(gif.convert("RGB"))
            for _ in range(gif.info["duration"] * FPS // 1000):
                np.testing.assert_array_equal(shown, enlarged(images[index], SCALE))
                index += 1
    assert index == len(images)


def measured(write, count):
    """Return a function that writes a GIF, and returns its seconds, bytes and the additional peak memory in bytes."""
    images = episode(count)

    def run():
        before = psutil.Process().memory_info().rss
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "a.gif"
            started = time.perf_counter()
            write(path, images)
            seconds = time.perf_counter() - started
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            assert_shows(path, images)
            return seconds, path.stat().st_size, peak - before

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    writers = {write.__name__: Elsewhere(measured, write, arguments.images) for write in (by_pydqn, by_pillow)}
    results = {name: [] for name in writers}
    for _ in range(arguments.rounds):
        for name, writer in writers.items():
            results[name].append(writer())
    for writer in writers.values():
        writer.close()
    print(f"{arguments.images} images of Breakout, {processor()}")
    for name, rounds in results.items():
        milliseconds = median(seconds for seconds, _, _ in rounds) / arguments.images * 1e3
        _, nbytes, peak = rounds[0]  # memory is at its peak only once in a process
        print(f"{name:10} {milliseconds:6.2f} ms per image, {nbytes / 1e3:6.0f} KB, {peak / 1e6:6.0f} MB of memory")
    ratio = median(ours[0] / other[0] for ours, other in zip(*results.values(), strict=True))
    print(f"pydqn takes {ratio:.2f} times as long as Pillow")


@pytest.fixture(scope="module")
def images():
    return episode(100)


@pytest.mark.parametrize("suffix", [".gif", ".mp4", ".html"])
def bench_recorder(benchmark, images, tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    benchmark(by_pydqn, path, images)
    if suffix == ".gif":
        assert_shows(path, images)


def bench_pillow_gif(benchmark, images, tmp_path):
    benchmark(by_pillow, tmp_path / "a.gif", images)
    assert_shows(tmp_path / "a.gif", images)


if __name__ == "__main__":
    main()

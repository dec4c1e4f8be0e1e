"""A hundred pictures of Breakout to a film: ours, and imageio's writer of GIFs."""

from __future__ import annotations

import imageio
import numpy as np
import pytest
from PIL import Image

from pydqn import preset
from pydqn.envs.atari import AtariLanes
from pydqn.plotting.recording import Recorder


@pytest.fixture(scope="module")
def pictures():
    config = preset("breakout", noop_max_frames=0, frame_skip_max=0, frame_skip=4, sticky_actions=0.0)
    lanes = AtariLanes("breakout", config, 1, 0, render=True)
    out = np.zeros((1, 84, 84), np.uint8)
    lanes.reset(out)
    generator = np.random.default_rng(0)
    taken = []
    for _ in range(100):
        lanes.send(generator.integers(4, size=1))
        lanes.recv(out)
        taken.append(lanes.picture().copy())
    return taken


@pytest.mark.parametrize("suffix", [".gif", ".mp4", ".html"])
def bench_recorder(benchmark, pictures, tmp_path, suffix):
    path = tmp_path / f"a{suffix}"

    def record():
        with Recorder(path, scale=2) as recorder:
            for picture in pictures:
                recorder.add(picture)

    benchmark(record)
    if suffix == ".gif":
        with Image.open(path) as gif:
            assert gif.n_frames == 100
            gif.seek(99)
            assert (np.asarray(gif.convert("RGB"))[::2, ::2] == pictures[99]).all()


def bench_imageio_gif(benchmark, pictures, tmp_path):
    path = tmp_path / "a.gif"

    def record():
        with imageio.get_writer(path, mode="I", duration=1000 / 30, loop=0) as writer:
            for picture in pictures:
                writer.append_data(picture.repeat(2, axis=0).repeat(2, axis=1))

    benchmark(record)
    assert path.stat().st_size > 0

"""A hundred images of Breakout to a video: ours, and imageio's writer of GIFs."""

from __future__ import annotations

import imageio
import numpy as np
import pytest
from PIL import Image

from pydqn import preset
from pydqn.envs.atari import AtariEnvs
from pydqn.plotting.recording import Recorder


@pytest.fixture(scope="module")
def images():
    config = preset("breakout", noop_max_frames=0, frame_skip_max=0, frame_skip=4, sticky_actions=0.0)
    envs = AtariEnvs("breakout", config, 1, 0, render=True)
    out = np.zeros((1, 84, 84), np.uint8)
    envs.reset(out)
    generator = np.random.default_rng(0)
    taken = []
    for _ in range(100):
        envs.send(generator.integers(4, size=1))
        envs.recv(out)
        taken.append(envs.image().copy())
    return taken


@pytest.mark.parametrize("suffix", [".gif", ".mp4", ".html"])
def bench_recorder(benchmark, images, tmp_path, suffix):
    path = tmp_path / f"a{suffix}"

    def record():
        with Recorder(path, scale=2) as recorder:
            for image in images:
                recorder.add(image)

    benchmark(record)
    if suffix == ".gif":
        with Image.open(path) as gif:
            assert gif.n_frames == 100
            gif.seek(99)
            assert (np.asarray(gif.convert("RGB"))[::2, ::2] == images[99]).all()


def bench_imageio_gif(benchmark, images, tmp_path):
    path = tmp_path / "a.gif"

    def record():
        with imageio.get_writer(path, mode="I", duration=1000 / 30, loop=0) as writer:
            for image in images:
                writer.append_data(image.repeat(2, axis=0).repeat(2, axis=1))

    benchmark(record)
    assert path.stat().st_size > 0

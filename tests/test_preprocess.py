"""The preprocessing kernels equal OpenCV bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys

import ale_py
import cv2
import numpy as np
import pytest
from ale_py import roms
from hypothesis import given, settings
from hypothesis import strategies as st

from pydqn.preprocess import crop_area, crop_nearest, resize_area

# With screens of 210, 214, 220, 230 and 250 rows.
GAMES = [
    "pong",
    "breakout",
    "space_invaders",
    "seaquest",
    "qbert",
    "enduro",
    "beam_rider",
    "montezuma_revenge",
    "freeway",
    "carnival",
    "pooyan",
    "journey_escape",
    "pacman",
]


def cv2_resize_area(frame, previous):
    return cv2.resize(np.maximum(frame, previous), (84, 84), interpolation=cv2.INTER_AREA)


def cv2_crop_nearest(rgb):
    gray = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)[34:194]
    return cv2.resize(gray, (84, 84), interpolation=cv2.INTER_NEAREST)


def cv2_crop_area(rgb):
    image = rgb.astype(np.float32)
    gray = image[:, :, 0] * 0.299 + image[:, :, 1] * 0.587 + image[:, :, 2] * 0.114
    return cv2.resize(gray, (84, 110), interpolation=cv2.INTER_AREA)[18:102].astype(np.uint8)


def play(game, count):
    """Yield (gray, rgb) screens of a game played at random."""
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    ale = ale_py.ALEInterface()
    ale.setInt("random_seed", 3)
    ale.loadROM(roms.get_rom_path(game))
    actions = ale.getMinimalActionSet()
    generator = np.random.default_rng(3)
    for _ in range(count):
        for _ in range(7):
            ale.act(actions[generator.integers(len(actions))])
            if ale.game_over():
                ale.reset_game()
        yield ale.getScreenGrayscale(), ale.getScreenRGB()


@pytest.mark.parametrize("game", GAMES)
def test_real_frames(game):
    before = None
    for gray, rgb in play(game, 60):
        before = gray if before is None else before
        np.testing.assert_array_equal(resize_area(gray, before), cv2_resize_area(gray, before))
        np.testing.assert_array_equal(crop_nearest(rgb), cv2_crop_nearest(rgb))
        np.testing.assert_array_equal(crop_area(rgb), cv2_crop_area(rgb))
        before = gray


SIZES = [(210, 160), (214, 160), (220, 160), (230, 160), (250, 160), (84, 84), (168, 168), (252, 168), (97, 301)]


@pytest.mark.parametrize("size", SIZES)
def test_random_bytes(size):
    generator = np.random.default_rng(0)
    # With few distinct values, ties are frequent, in which the rounding of float32 decides.
    for levels in (256, 256, 6, 3, 2):
        frames = (generator.integers(0, levels, (4, *size)) * (255 // (levels - 1))).astype(np.uint8)
        before = np.roll(frames, 1, axis=0)
        expected = np.stack([cv2_resize_area(*pair) for pair in zip(frames, before, strict=True)])
        np.testing.assert_array_equal(resize_area(frames, before), expected)
        alone = np.stack([cv2_resize_area(frame, frame) for frame in frames])
        np.testing.assert_array_equal(resize_area(frames), alone)


@settings(max_examples=60, deadline=None)
@given(st.integers(84, 400), st.integers(84, 400), st.integers(0, 2**32 - 1))
def test_any_size(height, width, seed):
    frame = np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)
    np.testing.assert_array_equal(resize_area(frame), cv2_resize_area(frame, frame))


@pytest.mark.parametrize("height", [210, 250])
def test_random_colours(height):
    generator = np.random.default_rng(1)
    for _ in range(10):
        rgb = generator.integers(0, 256, (height, 160, 3), dtype=np.uint8)
        np.testing.assert_array_equal(crop_nearest(rgb), cv2_crop_nearest(rgb))
        np.testing.assert_array_equal(crop_area(rgb), cv2_crop_area(rgb))
        flat = np.broadcast_to(rgb[:1, :1], rgb.shape)
        np.testing.assert_array_equal(crop_area(flat), cv2_crop_area(flat))


def test_gray_of_a_lattice_of_colours():
    """52 reds by 84 greens by 84 blues."""
    for red in range(0, 256, 5):
        rgb = np.zeros((194, 84, 3), np.uint8)
        rgb[..., 0] = red
        rgb[34:, :, 1] = (np.arange(160) * 255 // 159)[:, None]
        rgb[..., 2] = np.arange(84) * 3
        np.testing.assert_array_equal(crop_nearest(rgb), cv2_crop_nearest(rgb))


def test_leading_axes_and_out():
    generator = np.random.default_rng(2)
    frames = generator.integers(0, 256, (2, 3, 210, 160), dtype=np.uint8)
    ring = np.zeros((2, 3, 5, 84, 84), np.uint8)
    slot = ring[:, :, 2]
    with pytest.raises(ValueError, match="out"):
        resize_area(frames, out=ring[:, ::2, 2])
    result = resize_area(frames[0], out=slot[0])
    assert np.shares_memory(result, ring)
    np.testing.assert_array_equal(ring[0, 1, 2], cv2_resize_area(frames[0, 1], frames[0, 1]))
    assert not ring[:, :, [0, 1, 3, 4]].any()
    assert resize_area(frames).shape == (2, 3, 84, 84)


RGB = np.zeros((210, 160, 3), np.uint8)
GRAY = np.zeros((210, 160), np.uint8)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("frame", lambda: resize_area(GRAY.astype(np.float32))),
        ("frame", lambda: resize_area(GRAY[:83])),
        ("frame", lambda: resize_area(GRAY[0])),
        ("frame", lambda: resize_area([1, 2])),
        ("previous", lambda: resize_area(GRAY, GRAY[:200])),
        ("previous", lambda: resize_area(GRAY, GRAY.astype(np.int16))),
        ("out", lambda: resize_area(GRAY, out=np.zeros((84, 85), np.uint8))),
        ("out", lambda: resize_area(GRAY, out=np.zeros((84, 84)))),
        ("rgb", lambda: crop_nearest(GRAY)),
        ("rgb", lambda: crop_nearest(RGB[:193])),
        ("rgb", lambda: crop_area(RGB[:109])),
        ("rgb", lambda: crop_area(RGB[..., :2])),
    ],
)
def test_misuse_names_the_argument(name, call):
    with pytest.raises(ValueError, match=f"^{name}: expected|^{name}: its"):
        call()


def test_the_second_process_does_not_compile(tmp_path):
    program = (
        "import numpy as np\n"
        "from pydqn import preprocess as p\n"
        "p.resize_area(np.zeros((210, 160), np.uint8))\n"
        "print(sum(p._resize_area.stats.cache_misses.values()), sum(p._resize_area.stats.cache_hits.values()))\n"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for _ in range(2)
    ]
    assert runs == [["1", "0"], ["0", "1"]]

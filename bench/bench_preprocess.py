"""The preprocessing kernels, and the same in OpenCV."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from pydqn.preprocess import crop_area, crop_nearest, resize_area

NUM_ENVS = 8
GENERATOR = np.random.default_rng(0)
GRAY = GENERATOR.integers(0, 256, (NUM_ENVS, 210, 160), dtype=np.uint8)
BEFORE = np.roll(GRAY, 1, axis=0)
RGB = GENERATOR.integers(0, 256, (NUM_ENVS, 210, 160, 3), dtype=np.uint8)


def cv2_resize_area():
    return [cv2.resize(np.maximum(*p), (84, 84), interpolation=cv2.INTER_AREA) for p in zip(GRAY, BEFORE, strict=True)]


def cv2_crop_nearest():
    gray = [cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)[34:194] for rgb in RGB]
    return [cv2.resize(image, (84, 84), interpolation=cv2.INTER_NEAREST) for image in gray]


def cv2_crop_area():
    def one(rgb):
        image = rgb.astype(np.float32)
        gray = image[:, :, 0] * 0.299 + image[:, :, 1] * 0.587 + image[:, :, 2] * 0.114
        return cv2.resize(gray, (84, 110), interpolation=cv2.INTER_AREA)[18:102].astype(np.uint8)

    return [one(rgb) for rgb in RGB]


CASES = {
    "resize_area": (lambda out: resize_area(GRAY, BEFORE, out), cv2_resize_area),
    "crop_nearest": (lambda out: crop_nearest(RGB, out), cv2_crop_nearest),
    "crop_area": (lambda out: crop_area(RGB, out), cv2_crop_area),
}


@pytest.mark.parametrize("name", CASES)
def bench_ours(benchmark, name):
    ours, theirs = CASES[name]
    out = np.empty((NUM_ENVS, 84, 84), np.uint8)
    benchmark(ours, out)
    np.testing.assert_array_equal(out, np.stack(theirs()))


@pytest.mark.parametrize("name", CASES)
def bench_opencv(benchmark, name):
    _, theirs = CASES[name]
    assert len(benchmark(theirs)) == NUM_ENVS

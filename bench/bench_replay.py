"""The replay buffer: appending and sampling, in a small ring and in one of a million frames."""

from __future__ import annotations

import numpy as np
import other_libraries
import pytest

from pydqn import FrameReplay

NUM_ENVS = 8


@pytest.fixture(scope="module", params=[10_000, 1_000_000], ids=["10k", "1M"])
def full(request):
    """A full ring, every page of it touched."""
    replay = FrameReplay(request.param, num_envs=NUM_ENVS, n_step=1)
    off = np.zeros(NUM_ENVS, bool)
    for time_step in range(request.param // NUM_ENVS + 1):
        slot = replay.next_slot()
        slot[...] = time_step % 251
        first = np.full(NUM_ENVS, time_step % 1000 == 0)
        replay.append(slot, np.full(NUM_ENVS, time_step % 6), np.ones(NUM_ENVS), off, off, first)
    return replay


def bench_sample_32(benchmark, full):
    out = full.empty_batch(32)
    batch = benchmark(full.sample, 32, out)
    again = full.gather(batch.index)
    np.testing.assert_array_equal(batch.obs, again.obs)
    np.testing.assert_array_equal(batch.next_obs, again.next_obs)


def bench_copying_as_many_bytes(benchmark, full):
    """A bound for `sample`: as many bytes, copied from one random place per sample."""
    rows = 32 * 5
    memory = np.ones((full.capacity // 5, 5 * 84 * 84), np.uint8)
    out = np.empty((32, 5 * 84 * 84), np.uint8)
    generator = np.random.default_rng(0)

    def copy():
        for row, start in enumerate(generator.integers(len(memory), size=32)):
            out[row] = memory[start]

    benchmark(copy)
    assert out.sum() == rows * 84 * 84


def bench_append_one_frame_per_environment(benchmark, full):
    frame = np.random.default_rng(0).integers(0, 255, (NUM_ENVS, 84, 84), dtype=np.uint8)
    off = np.zeros(NUM_ENVS, bool)
    action, reward = np.zeros(NUM_ENVS, int), np.zeros(NUM_ENVS)
    benchmark(full.append, frame, action, reward, off, off, off)
    np.testing.assert_array_equal(full.latest()[:, -1], frame)


def bench_append_one_frame(benchmark):
    replay = FrameReplay(10_000)
    frame = np.random.default_rng(0).integers(0, 255, (1, 84, 84), dtype=np.uint8)
    off = np.zeros(1, bool)
    action, reward = np.zeros(1, int), np.zeros(1)
    replay.append(frame, action, reward, off, off, ~off)
    benchmark(replay.append, frame, action, reward, off, off, off)
    np.testing.assert_array_equal(replay.latest()[:, -1], frame)


def bench_latest(benchmark, full):
    out = full.latest()
    benchmark(full.latest, out)
    assert out.shape == (NUM_ENVS, 4, 84, 84)


@pytest.mark.parametrize("prioritized", [False, True])
def bench_sample_32_and_update(benchmark, prioritized):
    """A ring of 100,000 frames; with priorities, their update too."""
    buffer = other_libraries.Pydqn(100_000, prioritized=prioritized)
    for i in range(100_001):
        buffer.add(i)
    benchmark(buffer.sample_and_update if prioritized else buffer.sample)
    if prioritized:
        index = buffer.replay.sample(32, buffer.batch).index
        buffer.replay.update_priorities(index, np.full(32, 1e6))
        # These few have most of the sum of all priorities now.
        assert np.isin(buffer.replay.sample(32).index, index).mean() > 0.5

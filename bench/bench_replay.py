"""The replay buffer: append and sample, in a small ring and in one of a million frames."""

from __future__ import annotations

import numpy as np
import other_libraries
import pytest

from pydqn import FrameReplay

LANES = 8


@pytest.fixture(scope="module", params=[10_000, 1_000_000], ids=["10k", "1M"])
def full(request):
    """A full ring, every page of it touched."""
    replay = FrameReplay(request.param, num_envs=LANES, n_step=1)
    off = np.zeros(LANES, bool)
    for time_step in range(request.param // LANES + 1):
        slot = replay.next_slot()
        slot[...] = time_step % 251
        replay.append(
            slot, np.full(LANES, time_step % 6), np.ones(LANES), off, off, np.full(LANES, time_step % 1000 == 0)
        )
    return replay


def bench_sample_32(benchmark, full):
    out = full.empty_batch(32)
    batch = benchmark(full.sample, 32, out)
    again = full.gather(batch.index)
    np.testing.assert_array_equal(batch.obs, again.obs)
    np.testing.assert_array_equal(batch.next_obs, again.next_obs)


def bench_copying_as_many_bytes(benchmark, full):
    """What `sample` cannot beat: the same number of bytes, copied from one random place per sample."""
    rows = 32 * 5
    memory = np.ones((full.capacity // 5, 5 * 84 * 84), np.uint8)
    out = np.empty((32, 5 * 84 * 84), np.uint8)
    generator = np.random.default_rng(0)

    def copy():
        for row, place in enumerate(generator.integers(len(memory), size=32)):
            out[row] = memory[place]

    benchmark(copy)
    assert out.sum() == rows * 84 * 84


def bench_append_one_frame_per_lane(benchmark, full):
    frame = np.random.default_rng(0).integers(0, 255, (LANES, 84, 84), dtype=np.uint8)
    off = np.zeros(LANES, bool)
    action, reward = np.zeros(LANES, int), np.zeros(LANES)
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
    assert out.shape == (LANES, 4, 84, 84)


@pytest.mark.parametrize("prioritized", [False, True])
def bench_sample_32_and_update(benchmark, prioritized):
    """A ring of 100,000 frames; with priorities, their update too."""
    memory = other_libraries.Pydqn(100_000, prioritized=prioritized)
    for i in range(100_001):
        memory.add(i)
    benchmark(memory.sample_and_update if prioritized else memory.sample)
    if prioritized:
        index = memory.replay.sample(32, memory.batch).index
        memory.replay.update_priorities(index, np.full(32, 1e6))
        # Most of all priorities lie on these few now.
        assert np.isin(memory.replay.sample(32).index, index).mean() > 0.5

"""The replay buffer against its reference implementation, exhaustively and at random."""

from __future__ import annotations

import itertools
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pydqn import FrameReplay
from tests.helpers.reference import fill
from tests.helpers.replay_streams import assert_equals_reference, play, streams


@settings(max_examples=150, deadline=None)
@given(streams())
def test_equals_the_reference_at_every_time_step(stream):
    for replay, reference in play(stream):
        assert_equals_reference(replay, reference)


@settings(max_examples=40, deadline=None)
@given(streams(), st.sampled_from([("float32", (3,)), ("int16", (2, 2)), ("float64", (1, 2, 3)), ("bool", (4,))]))
def test_equals_the_reference_for_other_frames(stream, kind):
    dtype, frame_shape = kind
    *_, (replay, reference) = play(stream, frame_shape, dtype)
    assert_equals_reference(replay, reference)


@settings(max_examples=40, deadline=None)
@given(streams())
def test_a_loaded_buffer_goes_on_as_the_saved_one(tmp_path_factory, stream):
    path = tmp_path_factory.mktemp("replay") / "saved"
    *_, (replay, reference) = play(stream)
    replay.save(path)
    loaded = FrameReplay.load(path)
    assert_equals_reference(loaded, reference)
    if len(replay):
        for ours, theirs in zip(replay.sample(8), FrameReplay.load(path).sample(8), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    num_envs = replay.num_envs
    frame, off = np.ones((num_envs, *replay.frame_shape), replay.dtype), np.zeros(num_envs, bool)
    for each in (replay, loaded):
        each.append(frame, np.full(num_envs, 1), np.full(num_envs, 0.5), off, off, off)
    np.testing.assert_array_equal(replay.valid_indices(), loaded.valid_indices())


@pytest.mark.parametrize("stack", [1, 2, 3, 4])
@pytest.mark.parametrize("n_step", [1, 2, 3, 4, 5])
def test_every_pattern_of_ends_in_every_small_ring(stack, n_step):
    """Each environment plays another pattern, so that one buffer goes through all of them at once."""
    for capacity in range(stack + n_step, 13):
        kinds = 3 if capacity <= 5 else 2  # an end is a termination or a truncation; in larger rings they take turns
        length = capacity + 2
        patterns = np.array(list(itertools.product(range(kinds), repeat=length)), np.uint8)
        if kinds == 2:
            patterns[patterns == 1] = 1 + np.arange(np.count_nonzero(patterns)) % 2
        num_envs = len(patterns)
        replay = FrameReplay(capacity * num_envs, (1,), stack=stack, n_step=n_step, gamma=0.5, num_envs=num_envs)
        first = np.ones((length + 1, num_envs), bool)
        first[1:] = patterns.T > 0
        for time_step in range(length):
            frame = np.full((num_envs, 1), time_step + 1, np.uint8)
            ends = patterns[:, time_step]
            replay.append(
                frame,
                np.full(num_envs, time_step),
                np.full(num_envs, 2.0**time_step),
                ends == 1,
                ends == 2,
                first[time_step],
            )
        check_environments(replay, patterns, first, capacity, length)


def check_environments(replay, patterns, first, capacity, length):
    """Compare with the rules, time step by time step. A frame's content is its time step + 1; 0 is padding."""
    stack, n_step, num_envs = replay.stack, replay.n_step, len(patterns)
    flags = np.where(first[:length].T, 0, patterns)  # the flags of a first frame are ignored
    start_of = np.maximum.accumulate(np.where(first[:length].T, np.arange(length), 0), axis=1)
    count = 0
    batch = replay.gather(replay.valid_indices()) if len(replay) else None
    rows = {int(index): row for row, index in enumerate(batch.index)} if batch else {}
    for time_step in range(max(0, length - capacity), length):
        k = np.zeros(num_envs, int)
        done = np.zeros(num_envs, bool)
        reward, discount = np.zeros(num_envs), np.ones(num_envs)
        for j in range(1, n_step + 1):
            if time_step + j >= length:
                break
            done |= first[time_step + j]
            going = ~done
            k[going] = j
            reward[going] += discount[going] * 2.0 ** (time_step + j)
            discount[going] *= 0.5
            done |= flags[:, time_step + j] > 0
        closed = done | (k == n_step)
        oldest_needed = np.maximum(time_step - stack + 1, start_of[:, time_step])
        valid = closed & (k > 0) & (oldest_needed >= length - capacity)
        count += np.count_nonzero(valid)
        for env_index in np.flatnonzero(valid)[:: max(1, num_envs // 64)]:  # content: a spread of the environments
            row = rows[time_step * num_envs + env_index]
            for when, got in ((time_step, batch.obs), (time_step + k[env_index], batch.next_obs)):
                window = np.arange(when - stack + 1, when + 1)
                expected = np.where(window >= start_of[env_index, time_step], window + 1, 0)
                np.testing.assert_array_equal(got[row, :, 0], expected)
            assert batch.action[row] == time_step + 1
        wanted = np.flatnonzero(valid)
        if len(wanted):
            at = [rows[time_step * num_envs + int(env_index)] for env_index in wanted]
            np.testing.assert_array_equal(batch.reward[at], reward[wanted].astype(np.float32))
            terminated = flags[wanted, time_step + k[wanted]] == 1
            np.testing.assert_array_equal(batch.discount[at], np.where(terminated, 0, discount[wanted]))
    assert len(replay) == count == len(rows)


# --- sampling ---


def test_sampling_is_uniform():
    replay = fill(FrameReplay(60, (1,), num_envs=3, stack=2, n_step=2), 47, ends={5, 6, 30, 41})
    draws = np.concatenate([replay.sample(1000).index for _ in range(300)])
    seen, counts = np.unique(draws, return_counts=True)
    assert set(seen) == set(replay.valid_indices())
    expected = len(draws) / len(replay)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = len(replay) - 1
    # Within four standard deviations: false alarms once in 30,000 seeds, and the seed is fixed.
    assert abs(chi_square - freedom) < 4 * np.sqrt(2 * freedom)


def test_rare_transitions_are_found_and_drawn_uniformly():
    """Nearly all episodes have one frame and hence no transition: the few that exist are counted out."""
    replay = FrameReplay(20_000, (1,), stack=1)
    one, no, yes = np.ones((1, 1), np.uint8), [False], [True]
    wanted = []
    for time_step in range(20_000):
        follows = time_step in (101, 9_001, 15_001)
        replay.append(one, [0], [0.0], no, no, no if follows else yes)
        if follows:
            wanted.append(time_step - 1)
    assert replay.valid_indices().tolist() == wanted
    _, counts = np.unique(replay.sample(6000).index, return_counts=True)
    assert len(counts) == 3
    assert abs(counts - 2000).max() < 200


def test_the_same_seed_draws_the_same_batches():
    one, two, other = (fill(FrameReplay(500, (2,), seed=seed), 300) for seed in (7, 7, 8))
    first, second = one.sample(64).index, two.sample(64).index
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, other.sample(64).index)
    assert not np.array_equal(first, one.sample(64).index)


def test_sample_fills_the_batch_it_is_given():
    for n_step in (1, 3):
        replay = fill(FrameReplay(500, (3, 2), stack=4, n_step=n_step), 300, ends={50, 51, 120})
        out = replay.empty_batch(32)
        batch = replay.sample(32, out)
        assert batch is out
        again = replay.gather(batch.index)
        for ours, theirs in zip(batch, again, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_one_step_observations_share_memory_and_long_ones_do_not():
    for n_step, shares in ((1, True), (3, False)):
        empty = FrameReplay(50, n_step=n_step).empty_batch(4)
        assert np.shares_memory(empty.obs, empty.next_obs) == shares
    replay = fill(FrameReplay(100, (1,), stack=1, n_step=3), 50, ends={10, 20})
    batch = replay.gather(replay.valid_indices())
    stepped = batch.next_obs[batch.discount == np.float32(0.99**3)]
    assert len(stepped) > 30


# --- bugs that other replay buffers have had ---


def single(stack=2, n_step=1, capacity=50, gamma=0.9):
    return FrameReplay(capacity, (1,), stack=stack, n_step=n_step, gamma=gamma)


def push(replay, value, reward=0.0, terminated=False, truncated=False, first=False):
    replay.append(np.full((1, 1), value, np.uint8), [value], [reward], [terminated], [truncated], [first])


def test_the_last_transition_of_an_episode_is_kept():
    replay = single()
    push(replay, 1, first=True)
    push(replay, 2, reward=5.0, terminated=True)
    push(replay, 9, first=True)
    batch = replay.gather(replay.valid_indices())
    assert len(batch.action) == 1
    assert (batch.action[0], batch.reward[0], batch.discount[0]) == (2, 5.0, 0.0)


def test_truncation_bootstraps_from_the_frame_after_it():
    replay = single()
    push(replay, 1, first=True)
    push(replay, 2, truncated=True)
    push(replay, 9, first=True)
    batch = replay.gather(replay.valid_indices())
    assert batch.discount[0] == np.float32(0.9)
    np.testing.assert_array_equal(batch.next_obs[0, :, 0], [1, 2])


def test_stacks_do_not_cross_a_truncated_episode():
    replay = single(stack=4)
    for value in (1, 2, 3):
        push(replay, value, first=value == 1, truncated=value == 3)
    push(replay, 4, first=True)
    push(replay, 5)
    np.testing.assert_array_equal(replay.latest()[0, :, 0], [0, 0, 4, 5])


def test_a_lost_life_ends_the_bootstrap_but_neither_stack_nor_episode():
    replay = single(stack=3)
    push(replay, 1, first=True)
    push(replay, 2, terminated=True)
    push(replay, 3)
    batch = replay.gather(replay.valid_indices())
    np.testing.assert_array_equal(batch.discount, np.float32([0.0, 0.9]))
    np.testing.assert_array_equal(batch.obs[1, :, 0], [0, 1, 2])
    np.testing.assert_array_equal(batch.next_obs[1, :, 0], [1, 2, 3])


def test_n_step_tail_and_powers_of_gamma():
    replay = single(n_step=3)
    push(replay, 1, first=True)
    for value in (2, 3, 4, 5):
        push(replay, value, reward=1.0, truncated=value == 5)
    push(replay, 9, first=True)
    batch = replay.gather(replay.valid_indices())
    np.testing.assert_allclose(batch.reward, [1 + 0.9 + 0.81, 1 + 0.9 + 0.81, 1 + 0.9, 1.0])
    np.testing.assert_allclose(batch.discount, [0.9**3, 0.9**3, 0.9**2, 0.9])


# --- memory ---


def test_a_million_atari_transitions_take_at_most_7100_bytes_each():
    assert FrameReplay(1_000_000, n_step=3, num_envs=8).nbytes <= 7_100 * 1_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_empty_ring_takes_no_memory():
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    before = resident()
    replay = FrameReplay(4_000_000, num_envs=8)
    fill(replay, 2)
    assert replay.nbytes > 28e9
    assert resident() - before < 64 << 20


def test_a_kernel_can_write_into_the_next_slot():
    replay = FrameReplay(12, (2,), num_envs=2, stack=2)
    other = FrameReplay(12, (2,), num_envs=2, stack=2)
    for time_step in range(20):
        frame = np.arange(4, dtype=np.uint8).reshape(2, 2) + 10 * time_step
        flags = np.zeros(2, bool)
        slot = replay.next_slot()
        slot[...] = frame
        for each, what in ((replay, slot), (other, frame)):
            each.append(what, [1, 1], [0.0, 0.0], flags, flags, np.full(2, time_step % 7 == 0))
        np.testing.assert_array_equal(replay.latest(), other.latest())
        np.testing.assert_array_equal(
            replay.gather(replay.valid_indices()).obs if len(replay) else 0,
            other.gather(other.valid_indices()).obs if len(other) else 0,
        )


def test_writing_the_next_slot_disturbs_nothing_that_can_be_sampled():
    replay = fill(FrameReplay(12, (2,), stack=2), 30)
    before = replay.gather(replay.valid_indices())
    replay.next_slot()[...] = 99
    after = replay.gather(replay.valid_indices())
    np.testing.assert_array_equal(before.obs, after.obs)
    np.testing.assert_array_equal(before.next_obs, after.next_obs)


def test_strided_frames_are_accepted():
    replay = FrameReplay(12, (4, 3))
    frame = np.arange(12, dtype=np.uint8).reshape(3, 4).T
    replay.append(frame[None], [0], [0.0], [False], [False], [True])
    np.testing.assert_array_equal(replay.latest()[0, -1], frame)


# --- threads ---


@pytest.mark.parametrize("prioritized", [False, True])
def test_sampling_while_another_thread_appends(prioritized):
    """Frames carry their time step, so that a torn or misplaced one is seen."""
    replay = FrameReplay(256, (64, 64), stack=4, n_step=1, dtype="int32", prioritized=prioritized)
    stop, wrong = threading.Event(), []

    def write():
        for time_step in range(4000):
            slot = replay.next_slot()
            slot[...] = time_step
            replay.append(slot, [time_step], [0.0], [False], [False], [time_step == 0])
        stop.set()

    def read():
        while not stop.is_set():
            if len(replay) < 200:
                continue
            batch = replay.sample(8)
            if (batch.obs != batch.obs[:, :, :1, :1]).any() or (batch.next_obs != batch.next_obs[:, :, :1, :1]).any():
                wrong.append("a torn frame")
            window = np.maximum(batch.index[:, None] + np.arange(-3, 1), 0)  # one environment: an index is a time step
            if (batch.obs[:, :, 0, 0] != window).any() or (batch.next_obs[:, -1, 0, 0] != batch.index + 1).any():
                wrong.append("a misplaced frame")
            if (batch.action != batch.index + 1).any():
                wrong.append("a misplaced action")
            if prioritized:  # of transitions that may be gone meanwhile
                replay.update_priorities(batch.index, 1.0 + batch.index % 7)

    threads = [threading.Thread(target=target) for target in (write, read, read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert stop.is_set()
    assert not wrong

"""Environments that do not step together, `history`, `max_transitions`: against the reference implementation."""

from __future__ import annotations

import copy
import pickle
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pydqn import DeviceReplay, FrameReplay
from tests.helpers.reference import Entry, EpisodeReplay
from tests.helpers.replay_streams import assert_equals_reference


@st.composite
def shapes(draw):
    num_envs, stack, n_step = (draw(st.integers(1, 4)) for _ in range(3))
    capacity = draw(st.integers(num_envs * (stack + n_step), 50))
    return {
        "capacity": capacity,
        "num_envs": num_envs,
        "stack": stack,
        "n_step": n_step,
        "gamma": draw(st.sampled_from([0.0, 0.5, 1.0])),
        "padding": draw(st.sampled_from(["zero", "first"])),
        "max_transitions": draw(st.none() | st.integers(num_envs, capacity)),
        "prioritized": draw(st.booleans()),
    }


def reference_of(shape):
    names, num_envs = ("stack", "n_step", "gamma", "padding"), shape["num_envs"]
    reference = EpisodeReplay(shape["capacity"] // num_envs, num_envs, *(shape[name] for name in names))
    if shape["max_transitions"] is not None:
        reference.limit = shape["max_transitions"] // num_envs
    return reference


def step(replay, reference, random):
    """Append to some of the environments, in any order, a frame of any kind."""
    env_indices = random.permutation(replay.num_envs)[: random.integers(0, replay.num_envs + 1)]
    entries = []
    for env_index in env_indices:
        kind = random.choice(["step", "step", "step", "first", "history", "terminated", "truncated"])
        first = kind == "first" or not reference.history[env_index]
        history = kind == "history" and not first
        flags = kind == "terminated", kind == "truncated", first
        frame = random.integers(1, 200, replay.frame_shape).astype(replay.dtype)
        entries.append((Entry(frame, int(random.integers(5)), float(random.normal()), *flags), history))
    if entries:
        columns = [np.array(column) for column in zip(*(entry for entry, _ in entries), strict=True)]
        replay.append_to(env_indices, *columns, history=[history for _, history in entries])
        for env_index, (entry, history) in zip(env_indices, entries, strict=True):
            reference.append_to(env_index, entry, history)


@settings(max_examples=150, deadline=None)
@given(shapes(), st.integers(0, 2**32), st.integers(1, 60))
def test_equals_the_reference_at_every_call(shape, seed, calls):
    random = np.random.default_rng(seed)
    replay, reference = FrameReplay(frame_shape=(2,), seed=seed, **shape), reference_of(shape)
    for _ in range(calls):
        step(replay, reference, random)
        if all(reference.history):
            assert_equals_reference(replay, reference)


@settings(max_examples=40, deadline=None)
@given(shapes(), st.integers(0, 2**32))
def test_saved_copied_or_pickled_it_goes_on_the_same(tmp_path_factory, shape, seed):
    random = np.random.default_rng(seed)
    replay, reference = FrameReplay(frame_shape=(2,), seed=seed, **shape), reference_of(shape)
    path = tmp_path_factory.mktemp("replay") / "saved"
    for _ in range(3):  # saved again and again, to the same folder
        for _ in range(15):
            step(replay, reference, random)
        if len(replay) and replay.prioritized:
            replay.update_priorities(replay.sample(4).index, random.random(4) + 0.1)
        replay.save(path)
    if not all(reference.history):
        return
    others = [FrameReplay.load(path), copy.deepcopy(replay), pickle.loads(pickle.dumps(replay))]
    state = random.bit_generator.state
    for number, each in enumerate([replay, *others]):
        random.bit_generator.state = state
        theirs = copy.deepcopy(reference)
        for _ in range(10):
            step(each, theirs, random)
        if not each.prioritized:
            assert_equals_reference(each, theirs)
        if len(each):
            batch = each.sample(8)
            if number == 0:
                expected = batch
            for ours, first in zip(batch, expected, strict=True):
                np.testing.assert_array_equal(ours, first)
    assert FrameReplay.load(path).settings == replay.settings


@pytest.mark.parametrize("reload", [False, True])
def test_environments_that_are_even_again_are_saved_as_they_are(tmp_path, monkeypatch, reload):
    """Rows of a file are counted from the environments' common end. Once that moved, no earlier chunk may be linked."""
    monkeypatch.setattr("pydqn.replay.saving._BYTES_PER_CHUNK", 4 * 2 * (1 + 9))  # four time steps
    replay = FrameReplay(100, (1,), num_envs=2, stack=1)
    off = np.zeros(1, bool)

    def append(env_index, count):
        for _ in range(count):
            time_steps = replay.env_time_steps[env_index]
            frame = np.full((1, 1), 100 * env_index + time_steps, np.uint8)
            replay.append_to([env_index], frame, [0], [0.0], off, off, np.array([time_steps == 0]))

    for env_index, count in ((0, 8), (1, 6), (1, 2), (0, 2), (1, 2), (0, 9), (1, 9)):
        append(env_index, count)
        replay.save(tmp_path / "saved")
        loaded = FrameReplay.load(tmp_path / "saved")
        indices = replay.valid_indices()
        np.testing.assert_array_equal(loaded.valid_indices(), indices)
        if len(indices):
            np.testing.assert_array_equal(loaded.gather(indices).next_obs, replay.gather(indices).next_obs)
        replay = loaded if reload else replay


def test_windows_say_how_transitions_end():
    replay = FrameReplay(20, (1,), stack=1, n_step=3, gamma=0.5)
    ends = ["first", "", "", "", "terminated", "first", "", "truncated", "first", "", "", "first", ""]
    for end in ends:
        flags = [[end == name] for name in ("terminated", "truncated", "first")]
        replay.append(np.zeros((1, 1), np.uint8), [0], [1.0], *flags)
    windows = replay.windows(replay.valid_indices())
    assert windows.steps.tolist() == [3, 3, 2, 1, 2, 1, 2, 1]
    assert windows.terminated.tolist() == [False, True, True, True, False, False, False, False]
    assert windows.truncated.tolist() == [False, False, False, False, True, True, True, True]
    with pytest.raises(ValueError, match="index: 4 is not a transition"):
        replay.windows([4])


def test_only_the_newest_transitions_are_kept():
    replay = FrameReplay(50, (1,), stack=1, max_transitions=10)
    for time_step in range(200):
        replay.append(np.full((1, 1), time_step, np.uint8), [0], [0.0], [False], [False], [time_step % 20 == 0])
        assert len(replay) <= 10
    assert replay.valid_indices().tolist() == [*range(189, 199)]
    assert replay.gather(replay.valid_indices()).obs.ravel().tolist() == [*range(189, 199)]


ONE = (np.zeros((1, 1), np.uint8), [0], [0.0], [False], [False])


@pytest.mark.parametrize(
    ("env_indices", "message"),
    [
        ([2], "env_indices: expected different integers from 0 to 1"),
        ([-1], "env_indices: expected different integers"),
        ([0.0], "env_indices: expected a list of integers"),
        (0, "env_indices: expected a list of integers"),
        ([0, 1], "frame: expected shape (2, 1), got shape (1, 1)"),
    ],
)
def test_bad_environments(env_indices, message):
    replay = FrameReplay(20, (1,), stack=1, num_envs=2)
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        replay.append_to(env_indices, *ONE, [True])
    assert replay.env_time_steps == [0, 0]


def test_bad_calls():
    replay = FrameReplay(20, (1,), stack=1, num_envs=2)
    two = np.zeros((2, 1), np.uint8)
    with pytest.raises(ValueError, match="env_indices: expected different integers"):
        replay.append_to([1, 1], two, [0, 0], [0, 0], [False] * 2, [False] * 2, [True] * 2)
    with pytest.raises(ValueError, match="first: expected True"):
        replay.append_to([0], *ONE, [False], [True])
    replay.append_to([0], *ONE, [True])
    with pytest.raises(ValueError, match="history: expected booleans"):
        replay.append_to([0], *ONE, [False], [1])
    with pytest.raises(ValueError, match="action: expected integers from 0 to 2147483647, got -1 in environment 0"):
        replay.append_to([0], ONE[0], [-1], *ONE[2:], [False])
    with pytest.raises(RuntimeError, match="next_slot: the environments have different numbers of frames"):
        replay.next_slot()
    with pytest.raises(RuntimeError, match="latest"):
        replay.latest()
    with pytest.raises(ValueError, match="max_transitions: expected an integer of at least 2, got 1"):
        FrameReplay(20, (1,), num_envs=2, max_transitions=1)
    with pytest.raises(RuntimeError, match="append_to: a DeviceReplay"):
        DeviceReplay(20, (1,), device="cpu").append_to([0], *ONE, [True])

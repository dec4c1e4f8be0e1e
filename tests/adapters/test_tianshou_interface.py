"""Filling a buffer from another, and a user's own keys: as with Tianshou's buffer, or refused by name."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

pytest.importorskip("tianshou", reason="Tianshou is not installed: pip install 'pydqn[adapters]'")

import h5py
from tianshou import data as theirs
from tianshou.data import Batch

from pydqn.adapters import _tianshou
from pydqn.adapters import tianshou as ours
from tests.helpers.tianshou_streams import ATARI, counting, same

SINGLE = [("ReplayBuffer", (5,)), ("PrioritizedReplayBuffer", (5, 0.6, 0.4))]


def row(number, **others):
    obs = np.array([100.0 + number])
    flags = {"terminated": number % 7 == 6, "truncated": False}
    return Batch(
        obs=obs, obs_next=obs + 1, act=number, rew=1.0 * number, info=Batch(), policy=Batch(), **flags, **others
    )


def filled(kind, name="ReplayBuffer", arguments=(10,), count=8):
    buffer = getattr(kind, name)(*arguments)
    for number in range(count):
        buffer.add(row(number))
    return buffer


def test_their_update_of_ours_is_refused_before_anything_is_written():
    """It would copy indices as observations."""
    mine, other = filled(ours), theirs.ReplayBuffer(20)
    with pytest.raises(ValueError, match=r"stack_num: expected to stay 1 once.*Tianshou's own update"):
        other.update(mine)
    assert len(other) == 0
    assert mine.stack_num == 1
    other.update(filled(theirs))
    same(other[:].obs.ravel(), np.arange(100.0, 108.0))


@pytest.mark.parametrize(("name", "arguments"), SINGLE)
@pytest.mark.parametrize("source", [ours, theirs])
def test_update_adds_transitions(source, name, arguments):
    buffers = [getattr(kind, name)(*arguments) for kind in (ours, theirs)]
    sources = [filled(source), filled(theirs)]
    for _ in range(2):
        positions = [buffer.update(other) for buffer, other in zip(buffers, sources, strict=True)]
        same(positions[0][-5:], positions[1][-5:])
        one, other = (buffer[buffer.sample_indices(0)] for buffer in buffers)
        for key in ("obs", "obs_next", "act", "rew", "terminated", "truncated", "done"):
            same(one[key], other[key])
    assert buffers[0].update(ours.ReplayBuffer(3)).tolist() == []
    for buffer in buffers:
        added = buffer.add(row(3))
        assert added[1].tolist() == [0.0]
    assert [buffer.buffers[0]._ep_return for buffer in buffers[:1]] == [3.0]


def test_update_takes_a_part_at_a_time(monkeypatch):
    """The other buffer may be as large as memory allows."""
    sizes = []

    class Watched(theirs.ReplayBuffer):
        def __getitem__(self, index):
            sizes.append(np.size(index))
            return super().__getitem__(index)

    monkeypatch.setattr(_tianshou, "_ROWS", 3)
    other, mine = Watched(10), ours.ReplayBuffer(10)
    for number in range(8):
        other.add(row(number))
    mine.update(other)
    assert sizes == [3, 3, 2]
    assert mine[:].obs.ravel().tolist() == [*range(100, 108)]


def test_update_that_is_refused_midway_leaves_the_statistics():
    mine, other = ours.ReplayBuffer(10), theirs.ReplayBuffer(10)
    for number, seen in enumerate([1, 2, 300]):
        batch = row(number)
        batch.obs = batch.obs_next = np.array([seen])
        other.add(batch)
    batch.obs = batch.obs_next = np.array([0], np.uint8)
    mine.add(batch)
    before = [(buffer._ep_return, buffer._ep_len, buffer._ep_start_idx) for buffer in mine.buffers]
    with pytest.raises(ValueError, match="^obs: expected uint8"):
        mine.update(other)
    assert len(mine) == 3
    assert [(buffer._ep_return, buffer._ep_len, buffer._ep_start_idx) for buffer in mine.buffers] == before


def test_update_from_itself_adds_what_was_there():
    mine = filled(ours, arguments=(5,), count=8)
    before = mine[:].obs.ravel().tolist()
    mine.update(mine)
    assert mine[:].obs.ravel().tolist()[: len(before)] == before


def test_update_of_several_environments_keeps_them_apart():
    mine = ours.ReplayBuffer(20)
    mine.update(counting(ours.VectorReplayBuffer, 2, 4, cut=[1]))
    assert mine[:].obs.ravel().tolist() == [0, 1, 52, 53, 100, 101, 152, 153]
    assert mine[:].obs_next.ravel().tolist() == [1, 2, 53, 54, 101, 102, 153, 154]
    assert mine.unfinished_index().tolist() == [3, 7]


@pytest.mark.parametrize(
    ("use", "error", "message"),
    [
        (
            lambda: ours.VectorReplayBuffer(9, 1).update(filled(ours)),
            NotImplementedError,
            "update: expected a",
        ),
        (
            lambda: ours.ReplayBuffer(9, stack_num=2).update(filled(ours)),
            ValueError,
            "update: expected neither",
        ),
        (lambda: ours.ReplayBuffer(9).update(ours.ReplayBuffer(9, **ATARI)), ValueError, "update: expected neither"),
        (
            lambda: ours.VectorReplayBuffer.from_data(1),
            NotImplementedError,
            "from_data: expected",
        ),
        (
            lambda: ours.PrioritizedReplayBuffer.from_data(1),
            NotImplementedError,
            "from_data: expected",
        ),
        (lambda: np.array([ours.ReplayBuffer(5)]), ValueError, "buffer: cannot be iterated over or put into an array"),
        (lambda: np.array([filled(ours)]), ValueError, "buffer: cannot be iterated over or put into an array"),
        (
            lambda: theirs.CachedReplayBuffer(ours.ReplayBuffer(5), 2, 9),
            ValueError,
            "buffer: cannot be.*Cached",
        ),
        (lambda: theirs.ReplayBufferManager([ours.ReplayBuffer(5)]), ValueError, "buffer: cannot be iterated over"),
        (lambda: list(filled(ours)), ValueError, "buffer: cannot be iterated over"),
        (lambda: setattr(filled(ours), "stack_num", 4), ValueError, "stack_num: expected to stay 1"),
    ],
)
def test_what_is_refused_by_name(use, error, message):
    with pytest.raises(error, match=message):
        use()


def data(count=2500):
    obs = np.arange(float(count))[:, None]
    terminated, truncated = np.arange(count) % 5 == 4, np.arange(count) % 7 == 6
    flags = {"terminated": terminated, "truncated": truncated, "done": terminated | truncated}
    return {"obs": obs, "act": np.arange(count) % 3, "rew": np.sin(np.arange(count)), **flags, "obs_next": obs + 0.5}


def test_from_data(tmp_path):
    with h5py.File(tmp_path / "data.hdf5", "w") as file:
        columns = {name: file.create_dataset(name, data=column) for name, column in data().items()}
        buffers = [kind.ReplayBuffer.from_data(**columns) for kind in (ours, theirs)]
    for key in data():
        same(buffers[0][:][key], np.asarray(buffers[1][:][key]))
    wrong = data(20)
    wrong["done"][3] = True
    with pytest.raises(ValueError, match="done: expected terminated or truncated, got True in row 3"):
        ours.ReplayBuffer.from_data(**wrong)
    with pytest.raises(ValueError, match="from_data: expected columns of one length, got .*'act': 19"):
        ours.ReplayBuffer.from_data(**{**data(20), "act": np.zeros(19)})


@pytest.mark.parametrize(("name", "arguments"), SINGLE)
def test_keys_of_the_user(name, arguments, tmp_path):
    buffers = [getattr(kind, name)(*arguments) for kind in (ours, theirs)]
    for number in range(9):
        others = {"returns": 7.0 + number, "deep": Batch(x=np.arange(2) + number)} if number % 4 else {}
        for buffer in buffers:
            buffer.add(row(number, **copy.deepcopy(others)))
        held = buffers[0].sample_indices(0)
        if number:
            same(buffers[0][held].returns, buffers[1][held].returns)
            same(buffers[0][held].deep.x, buffers[1][held].deep.x)
    assert 7.0 + 6 in buffers[0][:].returns
    for one in (pickle.loads(pickle.dumps(buffers[0])), copy.deepcopy(buffers[0])):
        same(one[:].returns, buffers[0][:].returns)
        one.add(row(9, returns=70.0))
        assert 70.0 in one[:].returns
    buffers[0].save_hdf5(str(tmp_path / "x"))
    same(getattr(ours, name).load_hdf5(str(tmp_path / "x"))[:].deep, buffers[0][:].deep)
    vectors = [kind.VectorReplayBuffer(5, 1) for kind in (ours, theirs)]
    for vector in vectors:
        vector.add(Batch.stack([row(1, returns=7.0)]))
        assert "returns" not in vector[:].get_keys()  # Tianshou's keep none, either


@pytest.mark.parametrize(
    ("first", "later", "expected"),
    [
        (np.int64(1), torch.tensor(2), 2),
        (np.float32(1), torch.tensor(2.5), np.float32(2.5)),
        (np.float32(1), np.float64(0.1), np.float32(0.1)),
        (np.float32([1, 2]), np.float64([0.1, 0.2]), np.float32([0.1, 0.2])),
    ],
)
def test_actions_are_taken_as_tianshou_takes_them(first, later, expected):
    for kind in (theirs, ours):
        buffer = kind.ReplayBuffer(10)
        for number, act in enumerate((first, later)):
            batch = row(number)
            batch.act = act
            buffer.add(batch)
        same(np.asarray(buffer[1].act), np.asarray(expected))
        assert buffer[:].act.dtype == first.dtype


def test_what_is_refused_is_in_no_stack():
    buffer = ours.ReplayBuffer(10, stack_num=2)
    for number, seen in enumerate([1.0, np.nan, 2.0]):
        batch = row(number)
        batch.obs, batch.obs_next = np.array([seen]), np.array([seen + 1])
        if np.isnan(seen):
            with pytest.raises(ValueError, match="next_obs: expected obs moved on by one frame"):
                buffer.add(batch)
        else:
            buffer.add(batch)
    assert buffer[:].obs.ravel().tolist() == [1, 1, 1, 2]
    assert buffer[:].obs_next.ravel().tolist() == [1, 2, 2, 3]


@pytest.mark.parametrize(
    ("options", "shape"), [({}, (3,)), ({"stack_num": 4}, (6, 5)), (ATARI, (4, 6, 5)), ({"stack_num": 3}, ())]
)
def test_values_that_a_cast_would_change_are_refused(options, shape):
    buffer = ours.ReplayBuffer(10, **options)
    whole = np.ones(shape, np.uint8)
    good = Batch(obs=whole, obs_next=whole, act=1, rew=0.0, terminated=False, truncated=False, info=Batch())
    buffer.add(copy.deepcopy(good))
    for key, value in (("obs", whole + 0.5), ("obs", whole.astype(int) + 300), ("obs_next", whole * np.nan)):
        bad = copy.deepcopy(good)
        bad[key] = value
        with pytest.raises(ValueError, match=rf"^{key}: expected uint8, as in the first transition, or values that it"):
            buffer.add(bad)
    bad = copy.deepcopy(good)
    bad["act"] = 1.5
    with pytest.raises(ValueError, match=r"^act: expected int64, as in the first transition, or values that it holds"):
        buffer.add(bad)
    assert len(buffer) == 1
    wider = copy.deepcopy(good)
    wider["obs"] = whole.astype(np.int64)
    buffer.add(wider)
    assert buffer[:].obs.dtype == np.uint8

"""Where our buffers differ from Tianshou's on purpose, shown on both; and what ours refuse."""

from __future__ import annotations

import copy
import pickle
import tracemalloc

import numpy as np
import pytest

pytest.importorskip("tianshou", reason="Tianshou is not installed: pip install 'pydqn[adapters]'")

from tianshou import data as theirs
from tianshou.data import Batch

from pydqn.adapters import tianshou as ours
from tests.helpers.tianshou_streams import ATARI, counting, returns, rows


def test_the_last_observation():
    mine, other = (counting(kind.VectorReplayBuffer, 1, 4, cut=[1], ignore_obs_next=True) for kind in (ours, theirs))
    assert mine[:].obs.ravel().tolist() == other[:].obs.ravel().tolist() == [0, 1, 52, 53]
    assert mine[:].obs_next.ravel().tolist() == [1, 2, 53, 54]
    assert other[:].obs_next.ravel().tolist() == [1, 1, 53, 53]  # truncated, newest


def test_stacks():
    options = {"stack_num": 3}
    mine, other = (counting(kind.VectorReplayBuffer, 1, 12, **options) for kind in (ours, theirs))
    assert mine[2].obs.ravel().tolist() == [0, 1, 2]  # the oldest that is left; the two before have been overwritten
    assert other[2].obs.ravel().tolist() == [2, 2, 2]
    mine, other = (counting(kind.VectorReplayBuffer, 1, 4, broken=[1], **options) for kind in (ours, theirs))
    assert mine[0].obs_next.ravel().tolist() == [0, 0, 1]
    assert other[0].obs_next.ravel().tolist() == [1, 1, 1]
    assert mine[3].obs.ravel().tolist() == [52, 52, 53]
    assert other[3].obs.ravel().tolist() == [1, 52, 53]  # of two episodes
    assert [*mine.unfinished_index()] == [1, 3]


@pytest.mark.parametrize("kind", [ours, theirs])
@pytest.mark.parametrize("way", ["end", "reset"])
def test_a_new_episode_starts_a_new_stack_even_with_the_same_observation(kind, way):
    buffer = kind.VectorReplayBuffer(9, 1, stack_num=3)
    buffer.add(rows([[0.0]], [[1.0]], terminated=way == "end"))
    if way == "reset":
        buffer.reset()
    (position,), *_ = buffer.add(rows([[1.0]], [[2.0]]))
    assert buffer[position].obs.ravel().tolist() == [1, 1, 1]
    assert kind is theirs or buffer.transitions.frame_replay.padding == "first"


def test_returns():
    """A trainer resets its collector: episodes end without a flag."""
    mine, other = (counting(kind.VectorReplayBuffer, 2, 4, broken=[1]) for kind in (ours, theirs))
    at = np.array([0, 1])
    np.testing.assert_allclose(returns(mine, at, 3), [1 + 0.9 + 0.81 * 2, 1 + 0.9 * 2])
    np.testing.assert_allclose(returns(other, at, 3), [1 + 0.9 + 0.81 + 0.729 * 53, 1 + 0.9 + 0.81 + 0.729 * 54])
    full = counting(ours.VectorReplayBuffer, 1, 10, broken=[0])
    assert full.unfinished_index().tolist() == [0, 9]
    full.add(rows([[60.0]], [[61.0]], terminated=True))  # overwrites the interrupted one
    assert full.unfinished_index().tolist() == []


def test_seeds():
    make = [
        lambda seed, kind=kind: counting(kind.VectorReplayBuffer, 2, 10, random_seed=seed) for kind in (ours, theirs)
    ]
    mine, other = ([each(seed).sample_indices(100).tolist() for seed in (1, 1, 2)] for each in make)
    assert mine[0] == mine[1] != mine[2]
    first, second = (np.array(other[0])[[index // 10 == env_index for index in other[0]]] % 10 for env_index in (0, 1))
    count = min(len(first), len(second))
    assert first[:count].tolist() == second[:count].tolist()  # both environments, the same steps
    first, second = (np.array(mine[0])[[index // 10 == env_index for index in mine[0]]] % 10 for env_index in (0, 1))
    assert first[:count].tolist() != second[:count].tolist()
    every = make[0](1).sample_indices(None)
    assert sorted(every) == [*range(20)] != every.tolist()
    assert make[1](1).sample_indices(None).tolist() == [*range(20)]


def test_slices():
    mine, other = (counting(kind.VectorReplayBuffer, 2, 3) for kind in (ours, theirs))
    assert mine[2:5].obs.ravel().tolist() == [2, 100, 101]
    assert other[2:5].obs.ravel().tolist() == [2, 0, 0]  # where nothing has been stored yet


def test_priorities():
    options = {"alpha": 0.5, "beta": 0.5, "weight_norm": False}
    mine, other = (counting(kind.PrioritizedVectorReplayBuffer, 2, 10, **options) for kind in (ours, theirs))
    at, priority = np.arange(20), np.arange(1.0, 21) / 2
    weights = []
    for buffer in (mine, other):
        buffer.update_weight(at, priority)
        weights.append([buffer[at[7:]].weight])
        buffer.set_beta(1.0)
        weights[-1].append(buffer[at[7:]].weight)
    relative = 2 * priority[7:]
    np.testing.assert_allclose(weights[0], [relative**-0.25, relative**-0.5], rtol=1e-6)
    np.testing.assert_allclose(weights[1], [(relative / relative[0]) ** -0.25] * 2, rtol=1e-6)
    single = theirs.PrioritizedReplayBuffer(20, **options)
    for _ in at:
        single.add(rows([[0.0]], [[0.0]])[0])
    single.update_weight(at, priority)
    assert single[at].weight.max() == pytest.approx(0.5**0.25)  # not 1: the smallest priority lacks its exponent
    drawn = []
    for buffer in (mine, other):
        buffer.reset()
        buffer.add(rows([[7.0], [107.0]], [[8.0], [108.0]]))
        drawn.append(set(buffer.sample(400)[0].obs.ravel().tolist()))
    assert drawn[0] == {7, 107} < drawn[1]  # what was forgotten is drawn
    assert mine.weight.reduce() == 2  # both priorities are the initial ones


def test_copies():
    for kind, expected in ((ours, [[], []]), (theirs, [[], [2, 12]])):
        buffer = counting(kind.VectorReplayBuffer, 2, 2)
        copies = [buffer, pickle.loads(pickle.dumps(buffer))]
        for one in copies:
            one.add(rows([[2.0], [102.0]], [[3.0], [103.0]], terminated=True))
        assert [one.unfinished_index().tolist() for one in copies] == expected


def test_looking_for_nan_copies_nothing():
    """A trainer calls `hasnull` after each collection."""
    peaks, frames = [], np.random.default_rng(0).integers(0, 256, (400, 40, 40), dtype=np.uint8)
    for kind in (ours, theirs):
        buffer = kind.VectorReplayBuffer(300, 1, **ATARI)
        for i in range(300):
            buffer.add(rows(frames[None, i : i + 4], frames[None, i + 1 : i + 5]))
        assert not buffer.hasnull()
        tracemalloc.start()
        buffer.hasnull()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[0] < 20_000
    assert peaks[1] > 300 * 4 * 40 * 40
    for name, value in (("obs", np.nan), ("obs_next", np.nan), ("rew", np.nan), ("info", None)):
        buffers = [kind.VectorReplayBuffer(3, 1) for kind in (ours, theirs)]
        for i in range(6):
            batch = rows([[float(i)]], [[i + 1.0]])
            batch.info = Batch(x=np.array([value if (name, i) == ("info", 1) else i], object))
            if i == 1 and name != "info":
                batch[name].flat[0] = value
            for buffer in buffers:
                buffer.add(copy.deepcopy(batch))
            assert [buffer.hasnull() for buffer in buffers] == [1 <= i < 4] * 2


VECTOR = np.zeros((2, 3), np.float32)
STACKS = np.zeros((2, 4, 6, 5), np.uint8)


@pytest.mark.parametrize(
    ("options", "obs", "obs_next", "message"),
    [
        ({}, VECTOR, VECTOR[:, :2], "obs_next: expected shape (2, 3), got shape (2, 2)"),
        ({}, VECTOR[:1], VECTOR[:1], "obs: expected shape (2, 3), got shape (1, 3)"),
        ({}, VECTOR, None, "obs_next: expected an array of numbers, got NoneType"),
        ({}, Batch(obs=VECTOR, goal=VECTOR), VECTOR, "obs: expected an array of numbers, got Batch"),
        ({}, Batch(obs=VECTOR, mask=VECTOR), VECTOR, "mask: expected masks in obs and obs_next, got obs with a mask"),
        ({}, np.array([None, "x"]), VECTOR, "obs: expected an array of numbers, got ndarray"),
        ({"stack": 4}, STACKS, STACKS + 1, "next_obs: expected obs moved on by one frame"),
        (ATARI, STACKS, STACKS + 1, "next_obs: expected obs moved on by one frame"),
        (ATARI, np.zeros(2), np.zeros(2), "obs: expected stacks, as save_only_last_obs says"),
    ],
)
def test_bad_transitions(options, obs, obs_next, message):
    buffer = ours.VectorReplayBuffer(10, 2, **options)
    batch = rows(VECTOR, VECTOR)
    batch.obs, batch.obs_next = obs, obs_next
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        buffer.add(batch)
    assert str(caught.value).startswith(message)
    assert len(buffer) == 0


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: ours.VectorReplayBuffer(0, 1), "total_size: expected an integer of at least 1"),
        (lambda: ours.VectorReplayBuffer(9, 0), "buffer_num: expected an integer of at least 1"),
        (lambda: ours.VectorReplayBuffer(9, 1, stack_num=0), "stack_num: expected an integer of at least 1"),
        (lambda: ours.PrioritizedReplayBuffer(9, 0, 1), "alpha, beta: expected"),
        (lambda: ours.ReplayBuffer(9).sample(1), "batch_size: expected 0 as long as nothing is held, got 1"),
        (lambda: ours.PrioritizedReplayBuffer(9, 1, 1).sample(1), "batch_size: expected 0"),
        (lambda: ours.ReplayBuffer(9)[0], "index: expected positions at which transitions are held, got 0"),
        (lambda: counting(ours.VectorReplayBuffer, 1, 3)[[1, 5]], "index: expected positions at which transitions"),
        (lambda: counting(ours.VectorReplayBuffer, 1, 3).obs, "obs: no such column is kept; use buffer[index].obs"),
        (lambda: counting(ours.VectorReplayBuffer, 1, 3).buffers[0][0], "buffers: expected the whole buffer"),
        (lambda: counting(ours.VectorReplayBuffer, 1, 3).get(0, "obs", stack_num=4), "stack_num: expected 1 of obs"),
    ],
)
def test_bad_uses(use, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        use()
    assert str(caught.value).startswith(message)


def test_what_is_not_possible():
    buffer = counting(ours.VectorReplayBuffer, 1, 3)
    for name, arguments in (("set_batch", [buffer[:]]), ("dropnull", []), ("update", [buffer])):
        with pytest.raises(NotImplementedError):
            getattr(buffer, name)(*arguments)
    with pytest.raises(TypeError):
        ours.VectorReplayBuffer(9, 1, stak_num=4)

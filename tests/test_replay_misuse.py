"""The replay memory under misuse: wrong arguments."""

from __future__ import annotations

import numpy as np
import pytest
from oracles import fill

from pydqn import FrameReplay

# --- arguments ---

GOOD = {
    "frame": np.zeros((2, 3), np.uint8),
    "action": [0, 1],
    "reward": [0.0, 1.0],
    "terminated": [False, True],
    "truncated": [False, False],
    "first": [False, False],
}


def test_arrays_that_begin_at_any_byte_are_taken():
    """NumPy has such arrays; the core, as C++ in general, has not."""

    def odd(values, dtype):
        array = np.frombuffer(b"x" + np.array(values, dtype).tobytes(), dtype, offset=1)
        assert not array.flags.aligned
        return array

    replay, off = FrameReplay(20, (3,), num_envs=2, stack=1, prioritized=True), np.zeros(2, bool)
    for tick in range(5):
        frames = np.full((2, 3), tick, np.uint8)
        replay.append(frames, odd([1, 2], np.int64), odd([0.5, 1.5], np.float64), off, off, ~off if not tick else off)
    index = replay.valid_indices()
    assert replay.gather(odd(index, np.int64)).reward.tolist() == [0.5, 1.5] * 4
    replay.update_priorities(odd(index, np.int64), odd(index + 1.0, np.float64))
    batch = replay.empty_batch(2)
    with pytest.raises(ValueError, match="^reward: expected a C-contiguous, aligned array"):
        replay.sample(2, batch._replace(reward=odd([0, 0], np.float32)))


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("frame", np.zeros((3,), np.uint8)),
        ("frame", np.zeros((1, 3), np.uint8)),
        ("frame", np.zeros((2, 3), np.float32)),
        ("frame", "pixels"),
        ("action", [0]),
        ("action", [0.5, 1.0]),
        ("action", [0, -1]),
        ("action", [0, 2**40]),
        ("action", None),
        ("reward", [0.0, np.nan]),
        ("reward", [0.0, 1e300]),
        ("reward", ["a", "b"]),
        ("terminated", [0.0, 1.0]),
        ("truncated", [False]),
        ("first", 3),
    ],
)
def test_append_names_what_is_wrong_and_stores_nothing(name, bad):
    replay = FrameReplay(20, (3,), num_envs=2)
    with pytest.raises(ValueError, match="first: expected True in every lane"):
        replay.append(**GOOD)
    replay.append(**{**GOOD, "first": [True, True]})
    before = replay.latest()
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        replay.append(**{**GOOD, name: bad})
    np.testing.assert_array_equal(replay.latest(), before)
    replay.append(**GOOD)
    assert len(replay) == 2


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("capacity", 0),
        ("capacity", 2.5),
        ("capacity", -1),
        ("capacity", 3),
        ("frame_shape", ()),
        ("frame_shape", (84, 0)),
        ("frame_shape", 84),
        ("stack", 0),
        ("n_step", 0),
        ("gamma", 1.5),
        ("gamma", float("nan")),
        ("gamma", "high"),
        ("num_envs", 0),
        ("dtype", "object"),
        ("dtype", "complex64"),
        ("dtype", "nonsense"),
        ("padding", "edge"),
        ("seed", -1),
    ],
)
def test_the_constructor_names_what_is_wrong(name, bad):
    arguments = {"capacity": 100, "num_envs": 4, name: bad}
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        FrameReplay(**arguments)


@pytest.mark.parametrize(
    "arguments", [{"capacity": 1 << 46}, {"capacity": 1 << 63}, {"frame_shape": (1 << 63, 1 << 63)}]
)
def test_a_ring_beyond_the_address_space_is_a_memory_error(arguments):
    with pytest.raises(MemoryError, match="capacity"):
        FrameReplay(**{"capacity": 100, **arguments})


def test_sampling_too_early_is_a_clear_error():
    replay = FrameReplay(20, (3,))
    with pytest.raises(RuntimeError, match="nothing has been appended"):
        replay.latest()
    with pytest.raises(RuntimeError, match="no transition"):
        replay.sample(4)
    with pytest.raises(ValueError, match="batch_size"):
        replay.sample(0)


def test_bad_indices_and_batches_are_refused():
    replay = fill(FrameReplay(20, (3,), stack=2), 40)
    for bad in ([-1], [0], [39], [10**12], [1.5], [], 7):
        with pytest.raises(ValueError, match="index"):
            replay.gather(bad)
    with pytest.raises(ValueError, match="obs"):
        replay.sample(4, replay.empty_batch(5))
    with pytest.raises(ValueError, match="next_obs: expected memory apart"):
        FrameReplay(20, (3,), stack=2, n_step=2).sample(4, replay.empty_batch(4))
    other = replay.empty_batch(4)._replace(reward=np.empty(4))
    with pytest.raises(ValueError, match="reward: expected dtype float32"):
        replay.sample(4, other)

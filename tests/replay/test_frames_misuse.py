"""Wrong arguments are refused by name, and change nothing."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from pydqn import FrameReplay
from tests.helpers.reference import Entry, EpisodeReplay, fill

GOOD = {
    "frame": np.zeros((2, 3), np.uint8),
    "action": [0, 1],
    "reward": [0.0, 1.0],
    "terminated": [False, True],
    "truncated": [False, False],
    "first": [False, False],
}


def test_arrays_that_begin_at_any_byte_are_taken():
    """NumPy has such arrays; C++ does not."""

    def odd(values, dtype):
        array = np.frombuffer(b"x" + np.array(values, dtype).tobytes(), dtype, offset=1)
        assert not array.flags.aligned
        return array

    replay, off = FrameReplay(20, (3,), num_envs=2, stack=1, prioritized=True), np.zeros(2, bool)
    for time_step in range(5):
        frames = np.full((2, 3), time_step, np.uint8)
        replay.append(
            frames, odd([1, 2], np.int64), odd([0.5, 1.5], np.float64), off, off, ~off if not time_step else off
        )
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
    with pytest.raises(ValueError, match="first: expected True in every environment"):
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


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("n_step", [1, 2, 3, 5])
@pytest.mark.parametrize("stack", [1, 2, 4])
def test_each_environment_must_hold_a_transition(stack, n_step, num_envs):
    """Capacities are refused if, by the reference, no transition is held in the middle of an episode; no others are."""
    for frames in range(1, 12):
        reference = EpisodeReplay(frames, num_envs, stack, n_step, 0.9, "zero")
        for time_step in range(30):
            reference.append([Entry(np.zeros(1, np.uint8), 0, 0.0, False, False, time_step == 0)] * num_envs)
        for capacity in range(frames * num_envs, (frames + 1) * num_envs):  # the remainder adds no frame
            make = functools.partial(FrameReplay, capacity, (1,), stack=stack, n_step=n_step, num_envs=num_envs)
            if reference.transitions():
                replay = make()
                for time_step in range(30):
                    replay.append(np.zeros((num_envs, 1), np.uint8), *row(num_envs, first=time_step == 0))
                assert len(replay) == len(reference.transitions())
            else:
                least = num_envs * (stack + n_step)
                message = rf"^capacity: expected at least num_envs \* \(stack \+ n_step\) = {least} .*, got {capacity}$"
                with pytest.raises(ValueError, match=message):
                    make()


def row(num_envs, first):
    off = np.zeros(num_envs, bool)
    return np.zeros(num_envs, np.int64), np.zeros(num_envs), off, off, off | first


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
    with pytest.raises(ValueError, match="next_obs: expected memory that does not overlap obs"):
        FrameReplay(20, (3,), stack=2, n_step=2).sample(4, replay.empty_batch(4))
    other = replay.empty_batch(4)._replace(reward=np.empty(4))
    with pytest.raises(ValueError, match="reward: expected dtype float32"):
        replay.sample(4, other)


@pytest.mark.parametrize("n_step", [1, 2])
def test_a_batch_whose_arrays_overlap_is_refused(n_step):
    replay = fill(FrameReplay(20, (3,), stack=2, n_step=n_step, prioritized=True), 40)
    batch, wide = replay.empty_batch(4), np.empty((4, 9, 3), np.uint8)
    memory = np.empty((30, 3), np.uint8)
    overlapping = np.lib.stride_tricks.as_strided(memory, (4, 2, 3), (3, 3, 1))
    bad = {
        "next_obs": [
            {"next_obs": batch.obs},
            {"next_obs": batch.obs[::-1]},
            {"obs": batch.obs[::-1], "next_obs": batch.obs[::-1]},
            {"obs": wide[:, :2], "next_obs": wide[::-1, 2:4]},  # each in the rows of another, and not by one step
            {"obs": memory[:8].reshape(4, 2, 3), "next_obs": memory[1:9].reshape(4, 2, 3)},
            {"obs": memory[:8].reshape(4, 2, 3), "next_obs": memory[7:15].reshape(4, 2, 3)},
            {"obs": wide[:, 1:3], "next_obs": wide[:, :2]},
        ],
        "obs": [{"obs": overlapping}],
        "index": [{"index": batch.action}, {"action": batch.index}],
        "weight": [{"weight": batch.reward}, {"discount": batch.weight}],
        "discount": [{"discount": batch.reward}],
        "reward": [{"reward": batch.obs.base.reshape(-1)[:16].view(np.float32)}] if n_step == 1 else [],
    }
    if n_step == 2:
        bad["next_obs"] += [{"next_obs": wide[:, 1:3], "obs": wide[:, :2]}]
    for name, changes in bad.items():
        for change in changes:
            before = {field: np.array(getattr(batch._replace(**change), field)) for field in batch._fields}
            with pytest.raises(ValueError, match=f"^{name}: expected .* not overlap"):
                replay.sample(4, batch._replace(**change))
            for field, value in before.items():
                np.testing.assert_array_equal(getattr(batch._replace(**change), field), value)


@pytest.mark.parametrize("n_step", [1, 2])
def test_batches_of_any_layout_are_filled(n_step):
    """Arrays that do not overlap may lie in any order."""
    replay = fill(FrameReplay(60, (3,), stack=2, n_step=n_step), 50)
    index = replay.valid_indices()[:4]
    expected = replay.gather(index)
    wide, two, flat = np.empty((4, 9, 3), np.uint8), np.empty((2, 4, 2, 3), np.uint8), np.empty((16, 3), np.uint8)
    good = [
        (wide[:, 2:4], wide[:, 4:6]),
        (wide[:, 4:6], wide[:, 2:4]),
        (wide[:, :2], wide[:, 7:9]),
        (wide[::-1, :2], wide[::-1, 2:4]),
        (two[0], two[1]),
        (two[1], two[0]),
        (two[1][::-1], two[0]),
        (flat[:8].reshape(4, 2, 3), flat[8:].reshape(4, 2, 3)),
        (wide[:, :2], two[0]),
    ]
    if n_step == 1:
        good += [(wide[:, :2], wide[:, 1:3]), (wide[::-1, 3:5], wide[::-1, 4:6])]
    for obs, next_obs in good:
        batch = replay.gather(index, replay.empty_batch(4)._replace(obs=obs, next_obs=next_obs))
        for ours, theirs in zip(batch, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    for start in (0, 2):  # one transition alone, whose next_obs begins within its obs
        pair = {"obs": flat[1:3][None], "next_obs": flat[start : start + 2][None]}
        if n_step > 1 or start == 0:
            with pytest.raises(ValueError, match="^next_obs: expected memory that does not overlap obs"):
                replay.gather(index[:1], replay.empty_batch(1)._replace(**pair))
    single = replay.gather(index[:1], replay.empty_batch(1)._replace(obs=two[0, :1], next_obs=two[0, 1:2]))
    np.testing.assert_array_equal(single.next_obs, expected.next_obs[:1])


def test_what_cannot_be_filled_is_named():
    replay = fill(FrameReplay(20, (3,), stack=2), 40)
    batch = replay.empty_batch(4)
    for column in batch:
        column.flags.writeable = False
    with pytest.raises(ValueError, match="^obs: expected a writable array"):
        replay.sample(4, batch)
    with pytest.raises(ValueError, match="^reward: expected a writable array"):
        replay.sample(4, replay.empty_batch(4)._replace(reward=batch.reward))
    with pytest.raises(ValueError, match="^out: expected a writable array"):
        latest = replay.latest()
        latest.flags.writeable = False
        replay.latest(latest)
    for bad in (None, [], replay.empty_batch(4)._replace(reward=[0.0] * 4), tuple(batch)):
        if bad is not None:
            with pytest.raises(ValueError, match="^out: expected a batch of arrays, as empty_batch returns it, got"):
                replay.sample(4, bad)


def test_too_little_memory_is_not_damage(tmp_path, monkeypatch):
    """For the ring, or for a decompressed file: the files are good, and no error says that they are not."""
    replay = fill(FrameReplay(20, (3,), stack=2), 40)
    replay.save(tmp_path / "replay")

    def fails(*_, **__):
        raise MemoryError("no room")

    for name in ("_core.FrameReplay", "replay.chunks.ChunkReader.read", "replay.saving.np.frombuffer"):
        with monkeypatch.context() as patched:
            patched.setattr(f"pydqn.{name}", fails)
            with pytest.raises(MemoryError, match=r"replay: too little memory to load it \(.+\)$"):
                FrameReplay.load(tmp_path / "replay")
    assert len(FrameReplay.load(tmp_path / "replay")) == len(replay)

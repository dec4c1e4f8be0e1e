"""The replay memory under misuse: wrong arguments, damaged and hostile files."""

from __future__ import annotations

import json
import zlib

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


# --- files ---


def saved(tmp_path, ticks=30):
    replay = fill(FrameReplay(40, (5,), num_envs=2, stack=2, n_step=2, dtype="float32"), ticks, ends={7})
    replay.save(tmp_path / "memory")
    return replay, tmp_path / "memory"


def test_save_and_load_give_the_same_batches(tmp_path):
    replay, path = saved(tmp_path)
    loaded = FrameReplay.load(path)
    assert len(loaded) == len(replay)
    for ours, theirs in zip(replay.sample(50), loaded.sample(50), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_every_flipped_byte_is_found(tmp_path):
    _, path = saved(tmp_path)
    whole = path.read_bytes()
    body = whole.index(b"\n") + 1
    for position in [*range(0, body, 31), *range(body, len(whole), 13)]:
        damaged = bytearray(whole)
        damaged[position] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="memory"):
            FrameReplay.load(path)


@pytest.mark.parametrize("cut", [0, 1, 100, -1, -50])
def test_a_cut_file_is_refused(tmp_path, cut):
    _, path = saved(tmp_path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match="memory"):
        FrameReplay.load(path)


@pytest.mark.parametrize(
    "change",
    [
        {"capacity": 1 << 62},
        {"capacity": 10**12, "ticks": 10**12},
        {"ticks": 1 << 62},
        {"ticks": 0, "num_envs": 10**12, "capacity": 10**12},
        {"stack": 1 << 62},
        {"n_step": 1 << 62},
        {"frame_shape": [1 << 63, 1 << 63]},
        {"generator": "0 " * 313},
        {"ticks": -1},
        {"frame_shape": [1 << 40]},
        {"frame_shape": "x"},
        {"dtype": "O"},
        {"num_envs": 0},
        {"version": 99},
        {"generator": "nonsense"},
        {"generator": 5},
        {"extra": 1},
        {"kind": "weights"},
    ],
)
def test_a_hostile_header_is_refused(tmp_path, change):
    _, path = saved(tmp_path)
    header, body = path.read_bytes().split(b"\n", 1)
    changed = json.dumps({**json.loads(header[9:]), **change}).encode()
    path.write_bytes(f"{zlib.crc32(changed):08x} ".encode() + changed + b"\n" + body)
    with pytest.raises(ValueError, match="memory"):
        FrameReplay.load(path)


def test_a_failed_save_keeps_the_file_before(tmp_path, monkeypatch):
    _, path = saved(tmp_path)
    whole = path.read_bytes()
    monkeypatch.setattr("pydqn.checkpoint.zlib.crc32", lambda data: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        saved(tmp_path)
    assert path.read_bytes() == whole
    assert [file.name for file in tmp_path.iterdir()] == ["memory"]


def test_appending_while_saving_is_refused(tmp_path, monkeypatch):
    replay, path = saved(tmp_path)
    original = FrameReplay._runs

    def append_meanwhile(self, stored):
        for run in original(self, stored):
            fill_one = np.zeros((2, 5), np.float32)
            replay.append(fill_one, [0, 0], [0.0, 0.0], *[np.zeros(2, bool)] * 3)
            yield run

    monkeypatch.setattr(FrameReplay, "_runs", append_meanwhile)
    with pytest.raises(RuntimeError, match="appended while"):
        replay.save(path)
    monkeypatch.undo()
    assert len(FrameReplay.load(path))

"""A replay buffer on the disk: saved again, damaged, hostile."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pydqn.replay.chunks
from pydqn import FrameReplay
from pydqn._util.files import Damaged, write_index
from pydqn.replay.saving import verify_saved
from tests.helpers.reference import fill

SHAPE = {"frame_shape": (5,), "num_envs": 2, "stack": 2, "n_step": 2, "dtype": "float32"}


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr("pydqn.replay.saving._BYTES_PER_CHUNK", 8 * 2 * (5 * 4 + 9))  # eight time steps


def saved(tmp_path, time_steps=30, **settings):
    replay = fill(FrameReplay(40, **SHAPE, **settings), time_steps, ends={7})
    replay.save(tmp_path / "saved")
    return replay, tmp_path / "saved"


def more(replay, time_steps, seed=0):
    """Append without starting an episode."""
    random, off = np.random.default_rng(seed), np.zeros(2, bool)
    for _ in range(time_steps):
        frames = random.random((2, 5)).astype(np.float32)
        replay.append(frames, random.integers(0, 9, 2), random.random(2), off, off, off)


def same(one, other):
    np.testing.assert_array_equal(one.valid_indices(), other.valid_indices())
    index = one.valid_indices()
    for ours, theirs in zip(one.gather(index), other.gather(index), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert one._core.generator_state == other._core.generator_state
    for ours, theirs in zip(one.sample(50), other.sample(50), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def names(path):
    return {file.name: file.stat().st_ino for file in path.iterdir()}


@pytest.mark.parametrize("time_steps", [1, 7, 8, 9, 19, 20, 21, 30, 100])
@pytest.mark.parametrize("prioritized", [False, True])
def test_a_loaded_buffer_equals_the_saved_one(tmp_path, time_steps, prioritized):
    replay, path = saved(tmp_path, time_steps, prioritized=prioritized)
    loaded = FrameReplay.load(path)
    assert loaded.settings == replay.settings
    if len(replay):
        same(replay, loaded)
    np.testing.assert_array_equal(loaded.latest(), replay.latest())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 25), st.booleans(), st.booleans()), min_size=1, max_size=6))
def test_saved_again_and_again(tmp_path_factory, rounds):
    """To the same folder or to another, by the buffer itself or by one that was loaded meanwhile."""
    root = tmp_path_factory.mktemp("saved")
    replay = fill(FrameReplay(40, **SHAPE, prioritized=True), 3)
    for number, (time_steps, elsewhere, reloaded) in enumerate(rounds):
        more(replay, time_steps, number)
        batch = replay.sample(8)
        replay.update_priorities(batch.index, np.arange(1.0, 9.0))
        path = root / (str(number) if elsewhere else "here")
        replay.save(path)
        verify_saved(path)
        loaded = FrameReplay.load(path)
        same(loaded, replay)
        assert len(names(path)) <= 2 + 4  # index, priorities, and the chunks that hold 20 time steps
        if reloaded:
            replay = loaded


def test_saved_chunks_are_linked_not_written_again(tmp_path, monkeypatch):
    replay, path = saved(tmp_path, 20)  # two chunks of eight, and half of one
    before, written = names(path), []
    write = pydqn.replay.chunks.write_with_checksum
    monkeypatch.setattr(
        pydqn.replay.chunks, "write_with_checksum", lambda file, data: (written.append(file.name), write(file, data))[1]
    )
    more(replay, 5)  # the third is full now, and a fourth begins
    replay.save(tmp_path / "next")
    assert len(written) == 2
    after = names(tmp_path / "next")
    assert [after[name] for name in sorted(after)[:2]] == [before[name] for name in sorted(before)[:2]]
    # Each folder is whole by itself.
    for file in path.iterdir():
        file.unlink()
    same(FrameReplay.load(tmp_path / "next"), replay)
    # Chunks that were loaded are known, too; with nothing new, only the index is written.
    written.clear()
    loaded = FrameReplay.load(tmp_path / "next")
    loaded.save(tmp_path / "last")
    assert written == []
    same(FrameReplay.load(tmp_path / "last"), loaded)


@pytest.mark.parametrize("trouble", ["no links", "gone", "cut"])
def test_chunks_that_cannot_be_linked_are_written(tmp_path, monkeypatch, trouble):
    replay, path = saved(tmp_path)
    if trouble == "no links":

        def refuse(*_):
            raise OSError("not supported")

        monkeypatch.setattr(os, "link", refuse)
    for file in path.glob("*.zst"):
        if trouble == "gone":
            file.unlink()
        elif trouble == "cut":
            file.write_bytes(file.read_bytes()[:-1])
    replay.save(tmp_path / "next")
    same(FrameReplay.load(tmp_path / "next"), replay)


def test_two_buffers_loaded_from_one_folder_do_not_mix(tmp_path):
    _, path = saved(tmp_path, 20)
    one, other = FrameReplay.load(path), FrameReplay.load(path)
    for number, replay in enumerate((one, other)):
        more(replay, 15, seed=number)
        replay.save(tmp_path / "shared")  # each over what the other has saved there
        same(FrameReplay.load(tmp_path / "shared"), replay)
    one.save(tmp_path / "shared")
    same(FrameReplay.load(tmp_path / "shared"), one)


def test_other_files_in_the_folder_are_left_alone(tmp_path):
    (tmp_path / "saved").mkdir()
    for name in ("notes.txt", "data.zst", "step.part"):
        (tmp_path / "saved" / name).write_text("mine")
    replay, path = saved(tmp_path)
    more(replay, 40)
    replay.save(path)
    assert {"notes.txt", "data.zst", "step.part"} <= set(names(path))


def test_progress_is_reported(tmp_path):
    shares = []
    fill(FrameReplay(100, **SHAPE), 50).save(tmp_path / "saved", progress=shares.append)
    assert (shares, len(shares), shares[-1]) == (sorted(shares), 7, 1)


# --- damage ---


def test_every_flipped_byte_is_found(tmp_path):
    _, path = saved(tmp_path, prioritized=True)
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        for position in range(0, len(whole), 1 if len(whole) < 500 else 13):
            damaged = bytearray(whole)
            damaged[position] ^= 4
            file.write_bytes(damaged)
            for read in (FrameReplay.load, verify_saved):
                with pytest.raises(Damaged, match=file.name):
                    read(path)
        file.write_bytes(whole)
    verify_saved(path)


@pytest.mark.parametrize("cut", [0, 1, -2])
def test_a_cut_or_missing_file_is_named(tmp_path, cut):
    _, path = saved(tmp_path, prioritized=True)
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        file.write_bytes(whole[:cut])
        with pytest.raises(Damaged, match=file.name):
            FrameReplay.load(path)
        file.unlink()
        with pytest.raises(Damaged, match=f"{file.name}: cannot be read"):
            FrameReplay.load(path)
        file.write_bytes(whole)


def test_a_failed_save_keeps_what_was_saved_before(tmp_path, monkeypatch):
    replay, path = saved(tmp_path)
    before = names(path)
    more(replay, 12)
    monkeypatch.setattr("pydqn.replay.chunks.write_index", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        replay.save(path)
    assert names(path) == before
    monkeypatch.undo()
    verify_saved(path)
    replay.save(path)
    same(FrameReplay.load(path), replay)


def test_an_interrupt_after_the_index_keeps_the_new_buffer(tmp_path, monkeypatch):
    """The index has been renamed, but the folder is still being flushed."""
    replay, path = saved(tmp_path)
    more(replay, 12)
    write = pydqn.replay.chunks.write_index

    def interrupted(*arguments):
        write(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(pydqn.replay.chunks, "write_index", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replay.save(path)
    verify_saved(path)
    same(FrameReplay.load(path), replay)


def test_appending_while_saving_is_refused(tmp_path):
    replay, path = saved(tmp_path)
    before = names(path)
    more(replay, 12)
    with pytest.raises(RuntimeError, match="appended while"):
        replay.save(path, progress=lambda _: more(replay, 1))
    assert names(path) == before
    assert len(FrameReplay.load(path))


# --- hostile ---


def forge(path, **change):
    """Change what the index says, with a checksum that is right."""
    whole = json.loads((path / "index.json").read_text())
    write_index(path / "index.json", change.pop("kind", whole["kind"]), {**whole["content"], **change})


HOSTILE = [
    {"capacity": 1 << 62},
    {"capacity": 10**12, "time_steps": 10**12},
    {"time_steps": 1 << 62},
    {"time_steps": 0, "num_envs": 10**12, "capacity": 10**12},
    {"time_steps": -1},
    {"time_steps": 29},
    {"time_steps": 31},
    {"time_steps": True},
    {"time_steps": 30.0},
    {"stack": 1 << 62},
    {"n_step": 1 << 62},
    {"gamma": float("nan")},
    {"beta": float("inf")},
    {"frame_shape": [1 << 63, 1 << 63]},
    {"frame_shape": [1 << 40]},
    {"frame_shape": "x"},
    {"frame_shape": []},
    {"dtype": "O"},
    {"dtype": "V8"},
    {"dtype": "2float32"},  # NumPy compiles what stands before it
    {"dtype": ["float32"]},
    {"num_envs": 0},
    {"version": 99},
    {"generator": "0 " * 313},
    {"generator": "nonsense"},
    {"generator": 5},
    {"largest_priority": float("nan")},
    {"largest_priority": -1},
    {"extra": 1},
    {"self": 1},
    {"kind": "weights"},
    {"chunks": None},
    {"chunks": []},
    {"chunks": [[0, 30, [10, 10]]]},
    {"chunks": [["../../../etc/passwd", 30, [10, 10]]]},
    {"chunks": [[0, 8, ["../../secret", 10]]]},
    {"chunks": [[10, 1 << 60, [10, 10]]]},
    {"chunks": [[10, 16, [1 << 60, 10]]] * 3},
    {"chunks": {"start": 1}},
    {"changing": [10, 10]},
    {"prioritized": True},
    {"seed": 3},
    {"device": "cuda"},
]


@pytest.mark.parametrize("change", HOSTILE, ids=lambda change: "-".join(change))
def test_a_hostile_index_is_refused(tmp_path, change):
    _, path = saved(tmp_path)
    if change == {"changing": [10, 10]}:
        change = {"prioritized": True, **change}
    forge(path, **change)
    with pytest.raises(ValueError, match="saved"):
        FrameReplay.load(path)


def test_another_version_is_refused_with_advice(tmp_path):
    replay, path = saved(tmp_path)
    forge(path, version=3)
    way_on = (
        "expected a replay buffer of format version 4, got version 3; read it with the release .* or fill a new one"
    )
    with pytest.raises(ValueError, match=f"saved: {way_on}"):
        FrameReplay.load(path)
    with pytest.raises(ValueError, match=f"saved: {way_on}"):
        replay.restore(path)
    assert len(replay)


def test_what_is_no_index_is_refused(tmp_path):
    path = tmp_path / "saved"
    path.mkdir()
    deep = b'{"content":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    for content in (
        b"",
        b"null",
        b"[]",
        b"\xff" * 100,
        pickle.dumps({"kind": 1}),
        deep,
        b'{"a":' + b"9" * 10_000 + b"}",
    ):
        (path / "index.json").write_bytes(content)
        with pytest.raises(Damaged, match=r"saved/index.json: "):
            FrameReplay.load(path)
    with open(path / "index.json", "wb") as file:
        file.truncate(1 << 40)  # a terabyte of nothing
    with pytest.raises(Damaged, match=r"saved/index.json: too large"):
        FrameReplay.load(path)
    with pytest.raises(Damaged, match=r"none/index.json: cannot be read"):
        FrameReplay.load(tmp_path / "none")


def test_chunks_longer_than_ours_are_refused(tmp_path, monkeypatch):
    """Loading holds one chunk at a time."""
    with monkeypatch.context() as larger:
        larger.setattr("pydqn.replay.saving._BYTES_PER_CHUNK", 1 << 20)
        _, path = saved(tmp_path)
    with pytest.raises(Damaged, match="its chunks are not the rows from 10 to 30"):
        FrameReplay.load(path)


def test_a_chunk_that_swells_is_refused(tmp_path):
    """A few bytes that would become a terabyte, or more than the index says."""
    import zstandard

    _, path = saved(tmp_path)
    swelling = zstandard.ZstdCompressor().compress(bytes(4 << 20))
    checksum = pydqn.replay.chunks.Checksum.of(swelling)
    (start, stop, _), *chunks = json.loads((path / "index.json").read_text())["content"]["chunks"]
    name = pydqn.replay.chunks.Chunk(start, stop, checksum).name
    (path / name).write_bytes(swelling)
    forge(path, chunks=[[start, stop, checksum], *chunks])
    with pytest.raises(Damaged, match=f"{name}: "):
        FrameReplay.load(path)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux how much memory a process has had")
def test_a_hostile_index_takes_little_memory(tmp_path):
    """An index may claim any size: memory is taken only for what is read."""
    replay = FrameReplay(40, **SHAPE, prioritized=True)
    replay.save(tmp_path / "saved")
    forge(tmp_path / "saved", capacity=1 << 34)  # with priorities, 700 GB
    program = (
        "import sys, resource, pydqn\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    print(len(pydqn.FrameReplay.load(sys.argv[1])))\n"
        "except ValueError as error:\n    print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "saved"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 64 << 10  # kilobytes


def test_other_settings_are_refused(tmp_path):
    replay, path = saved(tmp_path)
    FrameReplay.load(path, replay.settings)
    with pytest.raises(ValueError, match=r"saved: the replay buffer has capacity 40, expected 41"):
        FrameReplay.load(path, {**replay.settings, "capacity": 41})


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs a file that never ends")
def test_a_file_that_never_ends_is_refused(tmp_path):
    _, path = saved(tmp_path)
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        file.unlink()
        file.symlink_to("/dev/zero")
        with pytest.raises(Damaged, match=f"{file.name}: is not a regular file"):
            FrameReplay.load(path)
        file.unlink()
        file.write_bytes(whole)


def test_links_out_of_the_folder_are_refused(tmp_path):
    """A chunk that is a link to another file is only read, and is not what was written."""
    _, path = saved(tmp_path)
    victim = sorted(path.glob("*.zst"))[0]
    victim.unlink()
    victim.symlink_to(Path(sys.executable))
    with pytest.raises(Damaged, match=victim.name):
        FrameReplay.load(path)

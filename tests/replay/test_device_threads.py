"""Frames on the device, appended by one thread and read by others: nobody sees a row before its frame is there."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from pydqn import FrameReplay
from pydqn.replay.device import DeviceReplay, Uploads
from pydqn.replay.lookup import look_up
from tests.replay.test_device import Late, Streams, seen

SHAPE = (48, 48)


def appended(memory, time_step, with_slot):
    """Append the frame of this time step, all of whose numbers are the time step."""
    if with_slot:
        frame = memory.next_slot()
        frame[...] = time_step
    else:
        frame = np.full((1, *SHAPE), time_step)
    memory.append(frame, [0], [0.0], [False], [False], [time_step == 0])


def run_beside(memory, read, with_slot, time_steps=3000):
    """Append in this thread while another one reads; returns how often it did."""
    for time_step in range(20):
        appended(memory, time_step, with_slot)
    reads, wrong, over = 0, [], threading.Event()

    def reader():
        nonlocal reads
        while not over.is_set() and not wrong:
            wrong.extend(read())
            reads += 1

    thread = threading.Thread(target=reader)
    thread.start()
    for time_step in range(20, time_steps):
        appended(memory, time_step, with_slot)
        if wrong:
            break
    over.set()
    thread.join()
    assert not wrong, wrong[:3]
    return reads


def uniform(frames):
    """The number that all of a frame's pixels are, (...) of (..., *SHAPE); -1 where they are not the same."""
    flat = frames.reshape(*frames.shape[: -len(SHAPE)], -1)
    return np.where((flat == flat[..., :1]).all(-1), flat[..., 0], -1)


@pytest.mark.parametrize("with_slot", [False, True])
def test_another_thread_sees_the_newest_frame_whole(with_slot):
    """Without `reading`: a row is good for as many appends as there are rows."""
    memory = DeviceReplay(2000, SHAPE, device="cpu", dtype="int64")

    def read():
        (time_steps,) = uniform(seen(memory, memory.latest()))
        return [] if (np.diff(time_steps) == 1).all() else [time_steps]

    assert run_beside(memory, read, with_slot) > 50


@pytest.mark.parametrize("with_slot", [False, True])
def test_rows_stay_as_they_are_while_another_thread_reads(with_slot):
    """A small ring: what is sampled would be written over at once."""
    memory = DeviceReplay(9, SHAPE, device="cpu", dtype="int64")

    def read():
        with memory.reading():
            batch, (newest,) = memory.sample(8), memory.latest()
            gathered = memory.gather(batch.index)
            found = [uniform(seen(memory, rows))[:, -1] for rows in (batch.obs, batch.next_obs, gathered.obs)]
            time_steps = uniform(seen(memory, newest))
        expected = [batch.index, batch.index + 1, batch.index]
        return [] if np.array_equal(found, expected) and (np.diff(time_steps) == 1).all() else [(found, time_steps)]

    assert run_beside(memory, read, with_slot) > 20


def test_several_threads_may_append():
    memory = DeviceReplay(100_000, (1,), device="cpu", dtype="int64", stack=1)
    memory.append(np.zeros((1, 1), np.int64), [0], [0.0], [False], [False], [True])

    def append(number):
        for count in range(1000):
            frame = np.array([[number * 1000 + count]])
            memory.append(frame, frame[0], [0.0], [False], [False], [False])

    threads = [threading.Thread(target=append, args=(number,)) for number in range(1, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert memory.env_time_steps == [3001]
    batch = memory.gather(memory.valid_indices())
    # Each action is the number of the frame that it led to.
    np.testing.assert_array_equal(seen(memory, batch.next_obs)[:, 0, 0], batch.action)


def test_a_copy_holds_the_frames_of_its_rows(tmp_path, monkeypatch):
    """Rows are read first, then their frames: no append comes in between."""
    memory = DeviceReplay(9, SHAPE, device="cpu", dtype="int64", stack=1)
    for time_step in range(20):
        appended(memory, time_step, with_slot=False)
    export, threads = FrameReplay._export, []

    def and_append(*arguments):
        rows = export(*arguments)
        if not threads:
            several = lambda: [appended(memory, time_step, with_slot=False) for time_step in range(20, 25)]  # noqa: E731
            threads.append(threading.Thread(target=several))
            threads[0].start()
            threads[0].join(0.3)
        return rows

    monkeypatch.setattr(FrameReplay, "_export", and_append)
    memory.save(tmp_path / "replay")
    threads[0].join()
    again = DeviceReplay.load(tmp_path / "replay")
    batch = again.gather(again.valid_indices())
    assert again.env_time_steps == [20]
    assert uniform(seen(again, batch.obs))[:, 0].tolist() == batch.index.tolist() == [*range(11, 19)]
    assert memory.env_time_steps == [25]


def test_what_is_refused_is_seen_by_nobody():
    memory = DeviceReplay(9, SHAPE, device="cpu", dtype="int64", stack=2)
    for time_step in range(5):
        appended(memory, time_step, with_slot=False)
    before = seen(memory, memory.latest())
    with pytest.raises(ValueError, match="^reward: expected finite"):
        memory.append(np.full((1, *SHAPE), 99), [0], [np.nan], [False], [False], [False])
    np.testing.assert_array_equal(seen(memory, memory.latest()), before)
    appended(memory, 5, with_slot=False)
    assert uniform(seen(memory, memory.latest())).tolist() == [[4, 5]]


# --- streams: the other thread's current stream is not the one on which appends launch ---


def race(seed, break_rule=None):
    """Readers on another stream; returns what they saw that was not theirs."""
    streams = Streams(seed)
    memory = DeviceReplay(8, (1,), stack=1, device="cpu", dtype="int64", seed=seed)
    memory._uploads = Uploads(Late(memory.frames, streams), 1, cuda=streams)
    if break_rule:
        break_rule(memory._uploads)
    other, wrong = streams.Stream("cpu"), []

    def read(rows, expected):
        def check():
            if not np.array_equal(seen(memory, rows)[..., 0], expected):
                wrong.append(expected)

        streams.launch(check)

    for time_step in range(60):
        slot = memory.next_slot()
        slot[...] = time_step
        memory.append(slot, [0], [0.0], [False], [False], [time_step == 0])
        with streams.stream(other), memory.reading():
            read(memory.latest().copy(), [[time_step]])
            if len(memory):
                batch = memory.sample(4)
                read(batch.obs.copy(), batch.index[:, None])
                oldest = memory.gather(memory.valid_indices()[:1])
                read(oldest.obs.copy(), oldest.index[:, None])
    streams.run()
    return wrong


@pytest.mark.parametrize("seed", range(20))
def test_readers_on_another_stream_see_their_frames(seed):
    assert not race(seed)


def no_wait_for_the_upload(uploads):
    uploads.wait = lambda: None


def no_wait_for_other_streams(uploads):
    uploads.let_finish = lambda: None


@pytest.mark.parametrize("rule", [no_wait_for_the_upload, no_wait_for_other_streams])
def test_each_rule_is_needed(rule):
    assert any(race(seed, rule) for seed in range(20))


def test_readers_leave_one_event_for_each_stream():
    """However often they read between two appends."""
    streams = Streams(0)
    memory = DeviceReplay(8, (1,), stack=1, device="cpu", dtype="int64")
    memory._uploads = Uploads(Late(memory.frames, streams), 1, cuda=streams)
    for stream in (streams.main, streams.Stream("cpu")):
        for _ in range(100):
            with streams.stream(stream), memory.reading():
                pass
    assert len(memory._uploads._readers) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_another_thread_with_a_stream_of_its_own():
    memory = DeviceReplay(9, SHAPE, device="cuda", dtype="int64")
    stream = torch.cuda.Stream()

    def read():
        with torch.cuda.stream(stream), memory.reading():
            batch = memory.sample(8)
            # To the host on this stream as well: another one would not wait for what is looked up.
            found = look_up(memory.frames, torch.from_numpy(batch.obs).cuda())[:, -1, 0, 0].cpu().numpy()
        return [] if np.array_equal(found, batch.index) else [batch.index]

    assert run_beside(memory, read, with_slot=True) > 20

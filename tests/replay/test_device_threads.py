"""Frames on a device, appended by one thread and read by others: no thread sees a row before its frame is there."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from pydqn import DeviceReplay
from pydqn.replay.lookup import look_up
from tests.helpers.cuda_streams import FakeCuda, launch_check, looked_up, upload_through

SHAPE = (48, 48)


def appended(replay, time_step, with_slot):
    """Append a frame whose numbers are all the time step."""
    if with_slot:
        frame = replay.next_slot()
        frame[...] = time_step
    else:
        frame = np.full((1, *SHAPE), time_step)
    replay.append(frame, [0], [0.0], [False], [False], [time_step == 0])


def run_beside(replay, read, with_slot, time_steps=3000, least_reads=50, limit_s=120):
    """Append `time_steps` frames in this thread, and more until another one has read `least_reads` times."""
    for time_step in range(20):
        appended(replay, time_step, with_slot)
    reads, wrong, over = 0, [], threading.Event()

    def reader():
        nonlocal reads
        while not over.is_set() and not wrong:
            wrong.extend(read())
            reads += 1

    thread = threading.Thread(target=reader)
    thread.start()
    start, time_step = time.monotonic(), 20
    # How often the scheduler lets the reader in is the machine's matter: no number of appends makes sure of it.
    while (time_step < time_steps or reads < least_reads) and not wrong and time.monotonic() - start < limit_s:
        appended(replay, time_step, with_slot)
        time_step += 1
    over.set()
    thread.join()
    assert not wrong, wrong[:3]
    assert reads >= least_reads, f"{reads} reads beside {time_step} appends"


def uniform(frames):
    """Return, (...) of (..., *SHAPE), the number that all pixels of a frame are; -1 where they differ."""
    flat = frames.reshape(*frames.shape[: -len(SHAPE)], -1)
    return np.where((flat == flat[..., :1]).all(-1), flat[..., 0], -1)


@pytest.mark.parametrize("with_slot", [False, True])
def test_another_thread_sees_the_newest_frame_whole(with_slot):
    """Without `reading`: a row stays as it is for as many appends as there are rows."""
    replay = DeviceReplay(2000, SHAPE, device="cpu", dtype="int64")

    def read():
        (time_steps,) = uniform(looked_up(replay, replay.latest()))
        return [] if (np.diff(time_steps) == 1).all() else [time_steps]

    run_beside(replay, read, with_slot)


@pytest.mark.parametrize("with_slot", [False, True])
def test_rows_stay_as_they_are_while_another_thread_reads(with_slot):
    """In a small ring, whose rows would be overwritten at once."""
    replay = DeviceReplay(9, SHAPE, device="cpu", dtype="int64")

    def read():
        with replay.reading():
            batch, (newest,) = replay.sample(8), replay.latest()
            gathered = replay.gather(batch.index)
            found = [uniform(looked_up(replay, rows))[:, -1] for rows in (batch.obs, batch.next_obs, gathered.obs)]
            time_steps = uniform(looked_up(replay, newest))
        expected = [batch.index, batch.index + 1, batch.index]
        return [] if np.array_equal(found, expected) and (np.diff(time_steps) == 1).all() else [(found, time_steps)]

    run_beside(replay, read, with_slot)


def test_several_threads_may_append():
    replay = DeviceReplay(100_000, (1,), device="cpu", dtype="int64", stack=1)
    replay.append(np.zeros((1, 1), np.int64), [0], [0.0], [False], [False], [True])

    def append(number):
        for count in range(1000):
            frame = np.array([[number * 1000 + count]])
            replay.append(frame, frame[0], [0.0], [False], [False], [False])

    threads = [threading.Thread(target=append, args=(number,)) for number in range(1, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert replay.env_time_steps == [3001]
    batch = replay.gather(replay.valid_indices())
    # Each action is the number in the frame that it led to.
    np.testing.assert_array_equal(looked_up(replay, batch.next_obs)[:, 0, 0], batch.action)


def test_a_copy_holds_the_frames_of_its_rows(tmp_path, monkeypatch):
    """Rows are read first, then their frames: no append comes between them."""
    replay = DeviceReplay(9, SHAPE, device="cpu", dtype="int64", stack=1)
    for time_step in range(20):
        appended(replay, time_step, with_slot=False)
    read, threads = replay._store.read, []

    def read_after_an_append(rows):
        if not threads:
            several = lambda: [appended(replay, time_step, with_slot=False) for time_step in range(20, 25)]  # noqa: E731
            threads.append(threading.Thread(target=several))
            threads[0].start()
            threads[0].join(0.3)
        return read(rows)

    monkeypatch.setattr(replay._store, "read", read_after_an_append)
    replay.save(tmp_path / "replay")
    threads[0].join()
    again = DeviceReplay.load(tmp_path / "replay")
    batch = again.gather(again.valid_indices())
    assert again.env_time_steps == [20]
    assert uniform(looked_up(again, batch.obs))[:, 0].tolist() == batch.index.tolist() == [*range(11, 19)]
    assert replay.env_time_steps == [25]


def test_no_thread_sees_a_refused_frame():
    replay = DeviceReplay(9, SHAPE, device="cpu", dtype="int64", stack=2)
    for time_step in range(5):
        appended(replay, time_step, with_slot=False)
    before = looked_up(replay, replay.latest())
    with pytest.raises(ValueError, match="^reward: expected finite"):
        replay.append(np.full((1, *SHAPE), 99), [0], [np.nan], [False], [False], [False])
    np.testing.assert_array_equal(looked_up(replay, replay.latest()), before)
    appended(replay, 5, with_slot=False)
    assert uniform(looked_up(replay, replay.latest())).tolist() == [[4, 5]]


# --- streams: the other thread has another current stream than the one that appends ---


def race(seed, break_rule=None):
    """Readers on another stream; return what they expected and did not find."""
    cuda = FakeCuda(seed)
    replay = DeviceReplay(8, (1,), stack=1, device="cpu", dtype="int64", seed=seed)
    uploads, wrong = upload_through(replay, cuda), []
    if break_rule:
        break_rule(uploads)
    other = cuda.Stream("cpu")
    for time_step in range(60):
        slot = replay.next_slot()
        slot[...] = time_step
        replay.append(slot, [0], [0.0], [False], [False], [time_step == 0])
        with cuda.stream(other), replay.reading():
            launch_check(replay, cuda, replay.latest(), [[time_step]], wrong)
            if len(replay):
                batch, oldest = replay.sample(4), replay.gather(replay.valid_indices()[:1])
                for each in (batch, oldest):
                    launch_check(replay, cuda, each.obs, each.index[:, None], wrong)
    cuda.run()
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
    """However often each reads between two appends."""
    cuda = FakeCuda(0)
    replay = DeviceReplay(8, (1,), stack=1, device="cpu", dtype="int64")
    uploads = upload_through(replay, cuda)
    for stream in (cuda.main, cuda.Stream("cpu")):
        for _ in range(100):
            with cuda.stream(stream), replay.reading():
                pass
    assert len(uploads._readers) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_another_thread_with_its_own_stream():
    replay = DeviceReplay(9, SHAPE, device="cuda", dtype="int64")
    stream = torch.cuda.Stream()

    def read():
        with torch.cuda.stream(stream), replay.reading():
            batch = replay.sample(8)
            # Copied to the host on this stream, too: another one would not wait for the look-up.
            found = look_up(replay.frames, torch.from_numpy(batch.obs).cuda())[:, -1, 0, 0].cpu().numpy()
        return [] if np.array_equal(found, batch.index) else [batch.index]

    run_beside(replay, read, with_slot=True)

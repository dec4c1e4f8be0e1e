"""Frames on the device: the same memory as on the host; and no copy overtakes what may still read."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from pydqn import FrameReplay
from pydqn.replay.device import DeviceReplay, Uploads, resolve_storage
from pydqn.replay.lookup import look_up
from tests.replay.test_frames import assert_same as assert_twin
from tests.replay.test_frames import play, streams

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))]


def both(device="cpu", capacity=60, **options):
    """The same stream, with ends of all kinds, in memory of both kinds."""
    host = FrameReplay(capacity, (5, 3), num_envs=3, seed=4, **options)
    there = DeviceReplay(capacity, (5, 3), num_envs=3, seed=4, device=device, **options)
    return host, there


def feed(memories, time_steps, seed=0, since=0):
    generator = np.random.default_rng(seed)
    for time_step in range(since, since + time_steps):
        frame = generator.integers(1, 255, (3, 5, 3), dtype=np.uint8)
        ends = generator.random((2, 3)) < 0.1
        first = (generator.random(3) < 0.1) | (time_step == 0)
        row = (generator.integers(4, size=3), generator.normal(size=3), *ends, first)
        for number, memory in enumerate(memories):
            if (time_step + number) % 2:  # both ways to bring in a frame
                slot = memory.next_slot()
                slot[...] = frame
                memory.append(slot, *row)
            else:
                memory.append(frame, *row)


def assert_same(host, there):
    np.testing.assert_array_equal(host.valid_indices(), there.valid_indices())
    np.testing.assert_array_equal(host.latest(), seen(there, there.latest()))
    if len(host):
        one, other = host.sample(16), there.sample(16)
        assert other.obs.dtype == other.next_obs.dtype == np.int32
        np.testing.assert_array_equal(one.obs, seen(there, other.obs))
        np.testing.assert_array_equal(one.next_obs, seen(there, other.next_obs))
        for name in ("action", "reward", "discount", "index", "weight"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def seen(memory, rows):
    return look_up(memory.frames, torch.from_numpy(rows).to(memory.device)).cpu().numpy()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n_step", [1, 3])
@pytest.mark.parametrize("padding", ["zero", "first"])
@pytest.mark.parametrize("prioritized", [False, True])
def test_equals_the_memory_on_the_host(device, n_step, padding, prioritized):
    host, there = both(device, n_step=n_step, padding=padding, prioritized=prioritized)
    for since in range(70):
        feed((host, there), 1, seed=since, since=since)
        assert_same(host, there)
        if prioritized and len(host):
            index = host.valid_indices()[::3]
            for memory in (host, there):
                memory.update_priorities(index, 1.0 + index % 5)


class LookedUp(DeviceReplay):
    """Gives observations, as the memory on the host does."""

    def __init__(self, *shape, **options):
        super().__init__(*shape, device="cpu", **options)

    def sample(self, batch_size, out=None):
        return self._looked_up(super().sample(batch_size, out))

    def gather(self, index):
        return self._looked_up(super().gather(index))

    def latest(self, out=None):
        return seen(self, super().latest(out))

    def _looked_up(self, batch):
        return batch._replace(obs=seen(self, batch.obs), next_obs=seen(self, batch.next_obs))


@settings(max_examples=100, deadline=None)
@given(streams())
def test_equals_the_twin_at_every_tick(stream):
    for replay, twin in play(stream, kind=LookedUp):
        assert_twin(replay, twin)


@pytest.mark.parametrize("saved", ["host", "device"])
@pytest.mark.parametrize("loaded", ["host", "device"])
def test_either_kind_reads_what_either_saved(tmp_path, saved, loaded):
    host, there = both(prioritized=True)
    feed((host, there), 90)
    (host if saved == "host" else there).save(tmp_path / "replay")
    again = (FrameReplay if loaded == "host" else DeviceReplay).load(tmp_path / "replay")
    for since in range(90, 130):
        if loaded == "host":
            assert_same(again, there)
        else:
            assert_same(host, again)
        feed((host, there, again), 1, seed=since, since=since)


def test_bad_frames_change_nothing():
    _, there = both()
    feed([there], 10)
    before = there.valid_indices()
    row = ([0] * 3, [0.0] * 3, [False] * 3, [False] * 3, [False] * 3)
    with pytest.raises(ValueError, match=r"^frame: expected shape \(3, 5, 3\), got shape \(5, 3\)"):
        there.append(np.zeros((5, 3), np.uint8), *row)
    with pytest.raises(ValueError, match="^frame: expected dtype uint8, got dtype float64"):
        there.append(np.zeros((3, 5, 3)), *row)
    with pytest.raises(ValueError, match="^reward: expected finite"):
        there.append(np.zeros((3, 5, 3), np.uint8), [0] * 3, [np.nan] * 3, *row[2:])
    np.testing.assert_array_equal(there.valid_indices(), before)


def test_dtypes_that_pytorch_lacks_are_refused():
    with pytest.raises(ValueError, match="^dtype: expected one that PyTorch has"):
        DeviceReplay(10, (1,), device="cpu", dtype="longdouble")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["bool", "uint8", "uint16", "uint32", "uint64", "int64", "float16", "float64"])
def test_frames_of_any_dtype_come_back(device, dtype, tmp_path):
    """Also those for which PyTorch has few kernels: through a file, too, and a copy."""
    memory = DeviceReplay(40, (3,), num_envs=2, stack=2, dtype=dtype, device=device)
    host = FrameReplay(40, (3,), num_envs=2, stack=2, dtype=dtype)
    generator, off = np.random.default_rng(0), np.zeros(2, bool)
    for time_step in range(30):
        bits = generator.integers(0, 256, (2, 3 * np.dtype(dtype).itemsize), dtype=np.uint8)
        frame = bits & 1 == 1 if dtype == "bool" else bits.view(dtype)
        for replay in (host, memory):
            replay.append(np.nan_to_num(frame), [0, 0], [0.0, 0.0], off, off, ~off if time_step % 9 == 0 else off)
    memory.save(tmp_path / "replay")
    index = host.valid_indices()
    for replay in (memory, DeviceReplay.load(tmp_path / "replay", device=device), copy.deepcopy(memory)):
        found, expected = replay.gather(index), host.gather(index)
        np.testing.assert_array_equal(seen(replay, found.obs), expected.obs)
        np.testing.assert_array_equal(seen(replay, found.next_obs), expected.next_obs)
        assert seen(replay, found.obs).dtype == dtype


def test_bytes_are_counted():
    assert DeviceReplay(1000, (84, 84), device="cpu").nbytes >= 1001 * 84 * 84


def test_where_frames_are_kept(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * 10**9, 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * 10**9)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3 * 10**9)
    assert resolve_storage("auto", torch.device("cpu"), 1)[0] == "host"
    assert resolve_storage("auto", cuda, 7 * 10**9) == ("device", "7.0 GB of frames, 10.0 GB free on cuda")
    assert resolve_storage("auto", cuda, 9 * 10**9)[0] == "host"
    # PyTorch holds two more, and would give them back.
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1 * 10**9)
    assert resolve_storage("auto", cuda, 9 * 10**9) == ("device", "9.0 GB of frames, 12.0 GB free on cuda")
    assert resolve_storage("auto", cuda, 10 * 10**9)[0] == "host"
    assert resolve_storage("host", cuda, 1)[0] == "host"
    assert resolve_storage("device", torch.device("cpu"), 1)[0] == "device"


# --- streams ---


class Streams:
    """Stands for `torch.cuda`: work is kept in queues, and then done in any order that streams and events allow."""

    def __init__(self, seed):
        self.main, self._active = self._Stream(self), None
        self.queues = [self.main]
        self._choose = np.random.default_rng(seed)

    class _Stream:
        def __init__(self, owner):
            self.owner, self.work, self.cuda_stream = owner, [], id(self)

        def wait_event(self, event):
            recorded = event.times
            self.work.append((lambda: event.passed >= recorded, lambda: None))

    class _Event:
        def __init__(self, owner):
            self.owner, self.times, self.passed = owner, 0, 0

        def record(self, stream):
            self.times += 1
            time = self.times

            def passes():
                self.passed = time

            stream.work.append((lambda: True, passes))

        def synchronize(self):
            self.owner.run(until=lambda: self.passed >= self.times)

    def Stream(self, device):
        stream = self._Stream(self)
        self.queues.append(stream)
        return stream

    def Event(self):
        return self._Event(self)

    def current_stream(self, device):
        return self._active or self.main

    def stream(self, stream):
        owner = self

        class Within:
            def __enter__(self):
                owner._active = stream

            def __exit__(self, *error):
                owner._active = None

        return Within()

    def launch(self, work):
        (self._active or self.main).work.append((lambda: True, work))

    def run(self, until=lambda: False):
        """Do what is queued until the condition holds, one thing at a time, from a queue drawn at random."""
        while not until():
            ready = [queue for queue in self.queues if queue.work and queue.work[0][0]()]
            if not ready:
                assert not any(queue.work for queue in self.queues), "the streams wait for each other"
                return
            _, work = ready[self._choose.integers(len(ready))].work.pop(0)
            work()


class Late:
    """A tensor that is written when its stream comes to it."""

    def __init__(self, tensor, streams):
        self._tensor, self._streams = tensor, streams
        self.device, self.shape, self.dtype = tensor.device, tensor.shape, tensor.dtype

    def __getitem__(self, rows):
        return Late(self._tensor[rows], self._streams)

    def copy_(self, source, non_blocking):
        assert non_blocking
        self._streams.launch(lambda: self._tensor.copy_(source))


def race(seed, break_rule=None):
    """Steps of a loop in which the host runs ahead of the device; returns whether each reader saw its own frames."""
    streams = Streams(seed)
    memory = DeviceReplay(8, (1,), stack=1, device="cpu", dtype="int64", seed=seed)
    memory._uploads = Uploads(Late(memory.frames, streams), 1, cuda=streams)
    if break_rule:
        break_rule(memory._uploads)
    wrong = []

    def read(rows, expected):
        def check():
            if not np.array_equal(seen(memory, rows)[..., 0], expected):
                wrong.append(expected)

        streams.launch(check)

    for time_step in range(60):
        slot = memory.next_slot()
        slot[...] = time_step
        memory.append(slot, [0], [0.0], [False], [False], [time_step == 0])
        newest = memory.latest()
        read(newest.copy(), [[time_step]])
        if len(memory):
            batch = memory.sample(4)
            read(batch.obs.copy(), batch.index[:, None])
            read(batch.next_obs.copy(), batch.index[:, None] + 1)
    streams.run()
    return wrong


@pytest.mark.parametrize("seed", range(20))
def test_no_reader_sees_another_frame(seed):
    assert not race(seed)


def no_wait_for_readers(uploads):
    uploads._stream.wait_event = lambda event: None


def no_wait_for_the_writer(uploads):
    uploads._cuda.main.wait_event = lambda event: None


def no_wait_for_the_staging_memory(uploads):
    for event in uploads._arrived:
        event.synchronize = lambda: None


@pytest.mark.parametrize("rule", [no_wait_for_readers, no_wait_for_the_writer, no_wait_for_the_staging_memory])
def test_each_rule_is_needed(rule):
    """The test above would see a race: without any one of the rules it does."""
    assert any(race(seed, rule) for seed in range(20))

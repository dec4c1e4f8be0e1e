"""A buffer with its frames on a device equals one on the host; and no copy overwrites what may still be read."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from pydqn import DeviceReplay, FrameReplay, preset
from pydqn.replay.device import resolve_storage
from tests.helpers.cuda_streams import FakeCuda, launch_check, looked_up, upload_through
from tests.helpers.replay_streams import assert_equals_reference, play, streams

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))]


def both(device="cpu", capacity=60, seed=4, **options):
    """Return empty buffers of both kinds with the same settings."""
    host = FrameReplay(capacity, (5, 3), num_envs=3, seed=seed, **options)
    there = DeviceReplay(capacity, (5, 3), num_envs=3, seed=seed, device=device, **options)
    return host, there


def feed(replays, time_steps, seed=0, since=0):
    """Append the same stream, with ends of all kinds, to several buffers."""
    generator = np.random.default_rng(seed)
    for time_step in range(since, since + time_steps):
        frame = generator.integers(1, 255, (3, 5, 3), dtype=np.uint8)
        ends = generator.random((2, 3)) < 0.1
        first = (generator.random(3) < 0.1) | (time_step == 0)
        row = (generator.integers(4, size=3), generator.normal(size=3), *ends, first)
        for number, replay in enumerate(replays):
            if (time_step + number) % 2:  # both ways to append a frame
                slot = replay.next_slot()
                slot[...] = frame
                replay.append(slot, *row)
            else:
                replay.append(frame, *row)


def saved_to(replay, path):
    replay.save(path)
    return path


def assert_equal(one, other):
    """Compare two `FrameReplay`, without a draw."""
    index = one.valid_indices()
    np.testing.assert_array_equal(index, other.valid_indices())
    assert one._core.generator_state == other._core.generator_state
    for ours, theirs in zip(one.gather(index), other.gather(index), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def assert_same(host, there):
    """Compare a `FrameReplay` with a `DeviceReplay`, draws included."""
    np.testing.assert_array_equal(host.valid_indices(), there.valid_indices())
    np.testing.assert_array_equal(host.latest(), looked_up(there, there.latest()))
    if len(host):
        one, other = host.sample(16), there.sample(16)
        assert other.obs.dtype == other.next_obs.dtype == np.int32
        np.testing.assert_array_equal(one.obs, looked_up(there, other.obs))
        np.testing.assert_array_equal(one.next_obs, looked_up(there, other.next_obs))
        for name in ("action", "reward", "discount", "index", "weight"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n_step", [1, 3])
@pytest.mark.parametrize("padding", ["zero", "first"])
@pytest.mark.parametrize("prioritized", [False, True])
def test_equals_the_buffer_on_the_host(device, n_step, padding, prioritized):
    host, there = both(device, n_step=n_step, padding=padding, prioritized=prioritized)
    for since in range(70):
        feed((host, there), 1, seed=since, since=since)
        assert_same(host, there)
        if prioritized and len(host):
            index = host.valid_indices()[::3]
            for replay in (host, there):
                replay.update_priorities(index, 1.0 + index % 5)


class LookedUp(DeviceReplay):
    """Returns observations instead of rows, as `FrameReplay` does."""

    def __init__(self, *shape, **options):
        super().__init__(*shape, device="cpu", **options)

    def sample(self, batch_size, out=None):
        return self._looked_up(super().sample(batch_size, out))

    def gather(self, index):
        return self._looked_up(super().gather(index))

    def latest(self, out=None):
        return looked_up(self, super().latest(out))

    def _looked_up(self, batch):
        return batch._replace(obs=looked_up(self, batch.obs), next_obs=looked_up(self, batch.next_obs))


@settings(max_examples=100, deadline=None)
@given(streams())
def test_equals_the_reference_at_every_time_step(stream):
    for replay, reference in play(stream, kind=LookedUp):
        assert_equals_reference(replay, reference)


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


def test_uneven_environments_are_loaded(tmp_path):
    """Saved by a `FrameReplay` whose environments have different numbers of frames."""
    host = FrameReplay(24, (1,), num_envs=2, stack=1, seed=4)
    time_step, no = np.zeros((2, 1), np.uint8), np.zeros(1, bool)
    for env_index in [0, 1, 0, 0, 1, *[0] * 20, *[1] * 4]:
        frame = 10 * env_index + time_step[[env_index]]
        host.append_to([env_index], frame, [0], [0.0], no, no, time_step[env_index] == 0)
        time_step[env_index] += 1
    host.save(tmp_path / "replay")
    there = DeviceReplay.load(tmp_path / "replay")
    for each in range(30):
        assert_same(host, there)
        for replay in (host, there):
            two = np.zeros(2, int)
            replay.append(np.full((2, 1), 100 + each, np.uint8), two, two, two > 0, two > 0, two > 0)


@pytest.mark.parametrize("where", ["host", *DEVICES])
def test_restored_in_place(tmp_path, where):
    """What is restored is sampled as the saved buffer would have sampled, and no frame of before comes back."""
    host, there = both(prioritized=True)
    feed((host, there), 90)
    host.beta = there.beta = 0.7
    host.update_priorities(host.valid_indices()[:9], np.arange(1.0, 10.0))
    host.save(tmp_path / "replay")
    for before in (0, 7, 50):
        replay = both("cpu" if where == "host" else where, seed=0, prioritized=True)[where != "host"]
        feed((replay,), before, seed=99)
        frames = getattr(replay, "frames", None)
        replay.restore(tmp_path / "replay")
        assert getattr(replay, "frames", None) is frames
        expected = FrameReplay.load(tmp_path / "replay")
        assert replay.beta == 0.7
        for since in range(90, 130):
            (assert_equal if where == "host" else assert_same)(expected, replay)
            feed((expected, replay), 1, seed=since, since=since)
        replay.save(tmp_path / "again")  # links no chunk of the buffer before
        assert_equal(FrameReplay.load(tmp_path / "again"), expected)


@pytest.mark.parametrize("where", ["host", *DEVICES])
def test_a_refused_restore_keeps_what_is_held(tmp_path, where):
    saved = both()[0]
    feed((saved,), 60)
    saved.save(tmp_path / "replay")
    for trouble, other in (("capacity 60, expected 63", {"capacity": 63}), ("alpha 0.6", {"alpha": 0.5}), ("", {})):
        expected, there = both("cpu" if where == "host" else where, **other)
        feed((expected, there), 30, seed=1)
        replay = there if where != "host" else FrameReplay.load(saved_to(expected, tmp_path / "held"))
        if not trouble:
            chunk = min((tmp_path / "replay").glob("*.zst"))
            chunk.write_bytes(chunk.read_bytes()[:-1])
        with pytest.raises(ValueError, match=f"replay.*{trouble}"):
            replay.restore(tmp_path / "replay")
        (assert_equal if where == "host" else assert_same)(expected, replay)


def test_where_reading_fails_on_a_device_the_buffer_is_empty(tmp_path, monkeypatch):
    """Its checksums are right, but it holds no replay buffer."""
    host, there = both(n_step=2)
    feed((host, there), 60)
    host.save(tmp_path / "replay")
    monkeypatch.setattr("pydqn.replay.chunks.ChunkReader.read", lambda *_: b"")
    with pytest.raises(ValueError, match="what it holds is no replay buffer"):
        there.restore(tmp_path / "replay")
    assert (len(there), there.env_time_steps) == (0, [0, 0, 0])
    monkeypatch.undo()
    there.restore(tmp_path / "replay")
    assert_same(host, there)


@pytest.mark.parametrize("device", DEVICES)
def test_cleared_it_is_empty_and_the_generator_goes_on(tmp_path, device):
    host, there = both(device, prioritized=True)
    for replay in (host, there):
        feed((replay,), 40)
        replay.save(tmp_path / "replay")
        replay.sample(5)
        replay.alpha, replay.beta = 0.3, 0.9
        generator = replay._core.generator_state
        replay.clear()
        assert (len(replay), replay.alpha, replay.beta, replay.largest_priority) == (0, 0.3, 0.9, 1)
        assert replay._core.generator_state == generator
        with pytest.raises(RuntimeError, match="nothing has been appended"):
            replay.latest()
    feed((host, there), 50, seed=3)
    assert_same(host, there)
    host.save(tmp_path / "replay")  # links no chunk of before
    assert_equal(FrameReplay.load(tmp_path / "replay"), host)


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
    """Also dtypes for which PyTorch has few kernels; also through a file and a copy."""
    there = DeviceReplay(40, (3,), num_envs=2, stack=2, dtype=dtype, device=device)
    host = FrameReplay(40, (3,), num_envs=2, stack=2, dtype=dtype)
    generator, off = np.random.default_rng(0), np.zeros(2, bool)
    for time_step in range(30):
        bits = generator.integers(0, 256, (2, 3 * np.dtype(dtype).itemsize), dtype=np.uint8)
        frame = bits & 1 == 1 if dtype == "bool" else bits.view(dtype)
        for replay in (host, there):
            replay.append(np.nan_to_num(frame), [0, 0], [0.0, 0.0], off, off, ~off if time_step % 9 == 0 else off)
    there.save(tmp_path / "replay")
    index = host.valid_indices()
    for replay in (there, DeviceReplay.load(tmp_path / "replay", device=device), copy.deepcopy(there)):
        found, expected = replay.gather(index), host.gather(index)
        np.testing.assert_array_equal(looked_up(replay, found.obs), expected.obs)
        np.testing.assert_array_equal(looked_up(replay, found.next_obs), expected.next_obs)
        assert looked_up(replay, found.obs).dtype == dtype


def test_bytes_are_counted():
    assert DeviceReplay(1000, (84, 84), device="cpu").nbytes >= 1001 * 84 * 84


@pytest.mark.parametrize(
    ("gigabytes", "name", "where"),
    [
        (8, "nature", "host"),
        (12, "nature", "device"),
        (24, "nature", "device"),
        (8, "pong", "device"),
        (8, "minatar-dqn", "device"),
    ],
)
def test_where_frames_are_kept_on_common_cards(monkeypatch, gigabytes, name, where):
    """A card has a twentieth less than it says for PyTorch, and half a gigabyte is taken by its context."""
    free = int(0.95 * gigabytes * 2**30 - 5e8)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    frame = 10 * 10 * 4 if name == "minatar-dqn" else 84 * 84
    nbytes = preset(name).replay_capacity_frames * frame
    assert resolve_storage("auto", torch.device("cuda"), nbytes)[0] == where


def test_where_frames_are_kept(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * 10**9, 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * 10**9)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3 * 10**9)
    assert resolve_storage("auto", torch.device("cpu"), 1)[0] == "host"
    assert resolve_storage("auto", cuda, 7 * 10**9) == ("device", "7.0 GB of frames, 10.0 GB free on cuda")
    assert resolve_storage("auto", cuda, 9 * 10**9)[0] == "host"
    # PyTorch holds two more GB, and would give them back.
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1 * 10**9)
    assert resolve_storage("auto", cuda, 9 * 10**9) == ("device", "9.0 GB of frames, 12.0 GB free on cuda")
    assert resolve_storage("auto", cuda, 10 * 10**9)[0] == "host"
    assert resolve_storage("host", cuda, 1)[0] == "host"
    assert resolve_storage("device", torch.device("cpu"), 1)[0] == "device"


# --- streams ---


def race(seed, break_rule=None):
    """Steps of a loop in which the host runs ahead of the device; return what readers expected and did not find."""
    cuda = FakeCuda(seed)
    replay = DeviceReplay(8, (1,), stack=1, device="cpu", dtype="int64", seed=seed)
    uploads, wrong = upload_through(replay, cuda), []
    if break_rule:
        break_rule(uploads)
    for time_step in range(60):
        slot = replay.next_slot()
        slot[...] = time_step
        replay.append(slot, [0], [0.0], [False], [False], [time_step == 0])
        launch_check(replay, cuda, replay.latest(), [[time_step]], wrong)
        if len(replay):
            batch = replay.sample(4)
            launch_check(replay, cuda, batch.obs, batch.index[:, None], wrong)
            launch_check(replay, cuda, batch.next_obs, batch.index[:, None] + 1, wrong)
    cuda.run()
    return wrong


@pytest.mark.parametrize("seed", range(20))
def test_no_reader_sees_another_frame(seed):
    assert not race(seed)


def no_wait_for_readers(uploads):
    uploads._stream.wait_event = lambda event: None


def no_wait_for_the_writer(uploads):
    uploads._cuda.main.wait_event = lambda event: None


def no_wait_for_the_pinned_memory(uploads):
    for event in uploads._arrived:
        event.synchronize = lambda: None


@pytest.mark.parametrize("rule", [no_wait_for_readers, no_wait_for_the_writer, no_wait_for_the_pinned_memory])
def test_each_rule_is_needed(rule):
    """Without any one of the rules of `Uploads`, the test above finds a race."""
    assert any(race(seed, rule) for seed in range(20))

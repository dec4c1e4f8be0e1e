"""PyTorch's default device changes nothing: all code that makes a tensor names its device."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch

from pydqn import DeviceReplay, FrameReplay, preset, train
from pydqn._util.cuda import DeviceToHost, HostToDevice
from pydqn._util.weights import load_weights, save_weights
from pydqn.learning.networks import Table, make_network
from pydqn.learning.policy import Actor
from pydqn.replay.uploads import Uploads
from pydqn.runs.checkpoint import latest_checkpoint, load_checkpoint
from tests.learning.test_learner import assert_equal_learners
from tests.learning.test_learner import make as make_learner


@contextlib.contextmanager
def default_device(name):
    before = torch.get_default_device()
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(before if before.type != "cpu" else None)


@pytest.mark.parametrize("network", ["nature", "nature_7x7", "small", "mlp"])
def test_weights_are_the_same(network):
    shape, units = ((4,) if network == "mlp" else (84, 84)), (() if network == "nature_7x7" else (8,))
    expected = make_network(network, 4, shape, 3, hidden_units=units, seed=4)
    with default_device("meta"):
        found = make_network(network, 4, shape, 3, hidden_units=units, seed=4)
        assert Table(2, 3).values.device.type == "cpu"
    assert {tensor.device.type for tensor in found.parameters()} == {"cpu"}
    assert all(map(torch.equal, expected.parameters(), found.parameters()))


def test_seeding_weights_leaves_other_devices_alone(monkeypatch):
    def refuse(*_):
        raise AssertionError("a generator of a GPU was seeded")

    for name in ("manual_seed", "manual_seed_all"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    with pytest.raises(AssertionError, match="a generator of a GPU"):
        torch.manual_seed(3)
    make_network("mlp", 1, (4,), 2, seed=3)


@pytest.mark.parametrize("storage", ["host", "device"])
@pytest.mark.parametrize("settings", [{"precision": "bfloat16"}, {"optimizer": "rmsprop_centered"}], ids=str)
def test_a_learner_learns_the_same(tmp_path, settings, storage):
    def learned():
        learner, replay, _ = make_learner(storage=storage, **settings)
        actor = Actor(learner.policy, replay.latest(), getattr(replay, "frames", None))
        for _ in range(8):
            learner.update(replay.sample(32))
        save_weights(tmp_path / "state.safetensors", learner.state_dict(), {})
        learner, _, _ = make_learner(storage=storage, **settings)
        learner.load_state_dict(load_weights(tmp_path / "state.safetensors")[0])
        learner.update(replay.sample(32))
        assert learner.diagnosis()
        return learner, learner.statistics()[:-1], actor.values(replay.latest()).copy()

    expected, statistics, values = learned()
    with default_device("meta"):
        found, found_statistics, found_values = learned()
    assert_equal_learners(expected, found, rtol=0, atol=0)
    assert statistics == found_statistics
    np.testing.assert_array_equal(values, found_values)


def test_a_buffer_on_a_device_is_saved_and_loaded(tmp_path):
    with default_device("meta"):
        replay = DeviceReplay(20, (3,), device="cpu", stack=2)
        for time_step in range(9):
            replay.append(np.full((1, 3), time_step, np.uint8), [0], [0.0], [False], [False], [time_step == 0])
        replay.save(tmp_path / "replay")
        again = DeviceReplay.load(tmp_path / "replay")
    host = FrameReplay.load(tmp_path / "replay")
    np.testing.assert_array_equal(again.frames.numpy()[again.latest()], host.latest())


def test_a_run_is_the_same_run(tmp_path):
    settings = {"total_steps": 300, "learning_starts_steps": 50, "checkpoint_every_steps": 150, "device": "cpu"}
    config = preset("cartpole", **settings, torch_threads=1, hidden_units=(8,))
    train(config, tmp_path / "one")
    with default_device("meta"):
        train(config, tmp_path / "other")
    one, other = (load_checkpoint(latest_checkpoint(tmp_path / name)).tensors for name in ("one", "other"))
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_pinned_memory_is_on_the_host(monkeypatch):
    """With a GPU, memory for transfers is pinned. Here without one, under another default device."""
    made, empty = [], torch.empty

    def noted(*shape, pin_memory=False, device=None, **named):
        if pin_memory:
            made.append(device)
        return empty(*shape, device="cpu", **named)

    class Events:
        def record(self, stream=None):
            """Nothing runs here."""

        synchronize = record

    class Frames:
        device, shape, dtype = torch.device("cuda", 0), (9, 3), torch.uint8

    class Streams:
        Stream = staticmethod(lambda device: "a stream")
        current_stream = staticmethod(lambda device: "a stream")
        Event = staticmethod(lambda: Events())

    monkeypatch.setattr(torch, "empty", noted)
    monkeypatch.setattr(torch.cuda, "Event", Events)
    monkeypatch.setattr("pydqn.replay.uploads.on", lambda device: contextlib.nullcontext())
    cuda = torch.device("cuda", 0)
    with default_device("meta"):
        HostToDevice([np.zeros(3, np.float32)], cuda)
        DeviceToHost(cuda).put(empty(3, device="cpu"))
        Uploads(Frames(), 1, Streams)
    assert made == ["cpu"] * 3

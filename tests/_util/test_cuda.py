"""What cannot be captured in a CUDA graph runs without one, and a failed capture changes nothing. CUDA is a fake."""

from __future__ import annotations

import contextlib
import gc
import itertools
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from pydqn._util.cuda import CaptureError, Graph, preserved, warm_up
from pydqn.learning import learner as learner_module
from pydqn.learning.optimizers import TorchOptimizer
from pydqn.learning.policy import Actor, Policy
from tests.helpers.learners import (
    SIZE,
    assert_equal_learners,
    copied,
    make,
    make_custom,
    needs_cuda,
    of_distributions,
)


class Cuda:
    """Streams, captures and the debug mode, as far as they can fail."""

    class Stream:
        def __init__(self, device="cuda:0"):
            self.device, self.waits_for = torch.device(device, 0) if device == "cuda" else torch.device(device), []

        def wait_stream(self, other):
            self.waits_for.append(other)

        def synchronize(self):
            self.done = True

    class Graph:
        def __init__(self):
            self.function = None

        def replay(self):
            self.function()

    def __init__(self, monkeypatch):
        self.main, self.mode, self.capturing, self.broken, self.waits = self.Stream(), 0, False, False, []
        self.current = self.main
        names = ["current_stream", "set_stream", "stream", "graph", "get_sync_debug_mode", "set_sync_debug_mode"]
        for name in names:
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "Stream", self.Stream)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", self.Graph)
        self.allocating, handles = set(), itertools.count()  # pools of captures that have not ended
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles), raising=False)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end_allocation, raising=False)

    def end_allocation(self, index, pool):
        assert index is not None
        self.allocating.remove(pool)

    def current_stream(self, device=None):
        return self.current

    def set_stream(self, stream):
        self.current = stream

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def graph(self, graph, *, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        assert not self.allocating, "captures_underway.empty() INTERNAL ASSERT FAILED"
        before, self.current = self.current, stream
        self.capturing, self.broken = True, False
        self.allocating.add(pool)
        try:
            yield
        finally:
            self.capturing = False
            if self.broken:  # as in PyTorch, the stream stays, and allocations go to the capture's pool
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
            self.allocating.remove(pool)
        self.current = before

    def get_sync_debug_mode(self):
        return self.mode

    def set_sync_debug_mode(self, mode):
        warnings.warn("Synchronization debug mode is a prototype feature", UserWarning, stacklevel=1)
        self.mode = {"default": 0, "warn": 1, "error": 2}.get(mode, mode)

    def item(self):
        """Wait for the device, which the debug mode detects."""
        if self.mode == 2:
            raise RuntimeError("called a synchronizing CUDA operation")
        self.synchronize()

    def synchronize(self):
        """Wait for the device, which the debug mode does not detect."""
        self.waits.append((self.current is self.main, self.capturing, gc.isenabled()))
        if self.capturing:
            self.broken = True
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore lines")


@pytest.fixture
def cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "default_generators", [_Generator()])
    return Cuda(monkeypatch)


class _Generator:
    """The device's generator: in use by a capture until that ends successfully."""

    def __init__(self):
        self.state = None

    def clone_state(self):
        return "a copy"

    def graphsafe_set_state(self, state):
        self.state = state


@pytest.mark.parametrize("enabled", [True, False])
def test_no_garbage_is_collected_during_a_capture(cuda, enabled):
    collections = []
    gc.callbacks.append(lambda phase, info: collections.append(phase))
    (gc.enable if enabled else gc.disable)()
    try:
        graph = Graph(lambda: cuda.waits.append((cuda.capturing, gc.isenabled())) or "tensors", cuda.Stream())
        assert gc.isenabled() == enabled
    finally:
        gc.enable()
        gc.callbacks.pop()
    assert cuda.waits == [(True, False)]
    assert collections  # before
    assert cuda.current is cuda.main
    graph._graph.function = lambda: None
    assert graph() == "tensors"


def test_a_failed_capture_changes_nothing(cuda):
    with pytest.raises(CaptureError, match="not permitted") as caught:
        Graph(cuda.synchronize, cuda.Stream())
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("CUDA error: operation not permitted when stream is capturing")
    assert "test_cuda.py:" in str(caught.value)
    assert cuda.current is cuda.main
    assert gc.isenabled()
    assert torch.cuda.default_generators[0].state == "a copy"


def test_a_capture_after_a_failed_one(cuda):
    stream, pool = cuda.Stream(), "a pool"
    for given in (None, pool):
        with pytest.raises(CaptureError):
            Graph(cuda.synchronize, stream, given)
        graph = Graph(lambda: "tensors", stream, given)
        graph._graph.function = lambda: None
        assert graph() == "tensors"


def test_an_interrupted_capture_raises_the_interrupt(cuda):
    def interrupted():
        cuda.broken = True
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Graph(interrupted, cuda.Stream())
    assert cuda.current is cuda.main


def test_the_last_warm_up_detects_waits(cuda):
    stream, runs = cuda.Stream(), []

    def waits():
        runs.append(cuda.mode)
        cuda.item()

    with pytest.raises(CaptureError, match=r"test_cuda.py:\d+: .*: called a synchronizing"):
        warm_up(waits, stream)
    assert runs == [0, 0, 2]
    assert cuda.mode == 0
    assert cuda.current is cuda.main
    assert cuda.main.waits_for == [stream]  # later work sees its results
    warm_up(lambda: runs.append(cuda.mode), stream)
    assert runs[3:] == [0, 0, 2]


def test_other_errors_are_not_changed(cuda):
    def wrong():
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="^shapes do not fit$") as caught:
        warm_up(wrong, cuda.Stream())
    assert not isinstance(caught.value, CaptureError)
    assert cuda.main.waits_for


def test_too_little_memory_is_an_error_with_or_without_a_graph(cuda):
    runs = []

    def grows():
        runs.append(cuda.mode)
        if cuda.capturing or cuda.mode == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError, match=r"^CUDA out of memory\.$"):
        warm_up(grows, cuda.Stream())
    assert runs == [0, 0, 2]
    assert cuda.mode == 0
    with pytest.raises(torch.OutOfMemoryError, match=r"^CUDA out of memory\.$"):
        Graph(grows, cuda.Stream())
    assert cuda.current is cuda.main


def test_the_device_is_idle_when_the_last_warm_up_begins(cuda):
    stream, idle = cuda.Stream(), []
    warm_up(lambda: idle.append(getattr(stream, "done", False)), stream)
    assert idle == [False, False, True]


def test_tensors_are_restored_after_an_exception():
    tensor = torch.ones(3)
    with pytest.raises(ZeroDivisionError), preserved([tensor]):
        tensor.zero_()
        raise ZeroDivisionError
    assert torch.equal(tensor, torch.ones(3))


def learner_of(cuda, monkeypatch, wait, captured, must_capture=False, **settings):
    """Return a learner each of whose steps waits for the device. If `captured`, it tries to capture graphs."""
    monkeypatch.setattr(learner_module, "make_optimizer", TorchOptimizer)
    learner, replay, _ = make(**settings)
    step = learner._step

    def waiting_step(number):
        wait() if cuda.capturing else None  # first, because a capture computes nothing
        outputs = step(number)
        wait()
        return outputs

    learner._step = waiting_step
    if captured:
        learner._stream, learner._must_capture = cuda.Stream(), must_capture
    return learner, replay


@pytest.mark.parametrize(
    ("optimizer", "precision", "restored"),
    [
        ("adam", "float32", False),
        ("adam", "bfloat16", True),
        ("rmsprop_tf", "bfloat16", False),
        ("rmsprop_centered", "float32", True),
    ],
)
@pytest.mark.parametrize("wait", ["item", "synchronize"])
def test_a_learner_goes_on_without_graphs(cuda, monkeypatch, wait, optimizer, precision, restored):
    """The attempt changes nothing, bit for bit."""
    settings = {"optimizer": optimizer, "precision": precision, "double": True}
    wait = getattr(cuda, wait)
    eager, replay = learner_of(cuda, monkeypatch, wait, False, **settings)
    captured, _ = learner_of(cuda, monkeypatch, wait, True, **settings)
    if restored:
        for _ in range(5):
            eager.update(replay.sample(32))
        captured.load_state_dict(copied(eager.state_dict()))
    for number in range(3):
        batch = replay.sample(32)
        eager.update(batch)
        if number:
            captured.update(batch)
        else:
            with pytest.warns(RuntimeWarning, match="^updates run without CUDA graphs, and slower: .*test_cuda.py:"):
                captured.update(batch)
        assert_equal_learners(eager, captured, rtol=0, atol=0)
        np.testing.assert_array_equal(eager.td_errors(), captured.td_errors())
    assert captured.updates == eager.updates == 3 + 5 * restored
    assert cuda.current is cuda.main


def test_a_learner_that_must_capture_says_why_it_cannot(cuda, monkeypatch):
    learner, replay = learner_of(cuda, monkeypatch, cuda.item, True, must_capture=True)
    before = {name: value.clone() for name, value in learner.state_dict().items() if "optimizer" not in name}
    with pytest.raises(RuntimeError, match=r"^capture: the update cannot become a CUDA graph \(.*called a synchroniz"):
        learner.update(replay.sample(32))
    assert all(torch.equal(value, learner.state_dict()[name]) for name, value in before.items())
    assert learner.updates == 0


class Counting(nn.Module):
    """Counts its forward passes in a buffer."""

    def __init__(self, wait):
        super().__init__()
        self.linear, self.wait = nn.Linear(4, 3), wait
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, obs):
        self.wait()
        self.runs += 1
        return self.linear(obs.float().mean(dim=(2, 3)))


@pytest.mark.parametrize("wait", ["item", "synchronize", None])
def test_an_actor_goes_on_without_a_graph(cuda, monkeypatch, wait):
    network = Counting(getattr(cuda, wait) if wait else lambda: None)
    policy = Policy(network, torch.device("cpu"), "float32")
    obs = np.random.default_rng(0).integers(0, 255, (2, 4, 8, 8), dtype=np.uint8)
    actor = Actor(policy, obs)
    actor._captures = True
    monkeypatch.setattr(Cuda.Stream, "__init__", lambda self, device: setattr(self, "device", torch.device("cuda:0")))
    monkeypatch.setattr(Cuda.Stream, "wait_stream", lambda self, other: None)
    if wait:
        with pytest.warns(
            RuntimeWarning, match="^actions are chosen without a CUDA graph, and slower: .*test_cuda.py:"
        ):
            values = actor.values(obs)
    else:
        monkeypatch.setattr(Cuda.Graph, "replay", lambda self: None)
        values = actor.values(obs)
    assert network.runs == 1
    np.testing.assert_array_equal(values, network(torch.from_numpy(obs)).detach())
    actor.values(obs)
    must_capture = Actor(policy, obs)
    must_capture._captures = must_capture._must_capture = True
    if wait:
        with pytest.raises(RuntimeError, match=r"^capture: the policy cannot become a CUDA graph \("):
            must_capture.values(obs)


@needs_cuda
@pytest.mark.parametrize("capture", [None, True])
def test_a_loss_that_waits_for_the_device_needs_no_graph(capture):
    def waits(online, target, batch):
        losses = of_distributions(online, target, batch)
        return losses * 2 if losses.sum().item() > 0 else losses

    learner, replay = make_custom(waits, device="cuda", capture=capture)
    eager, _ = make_custom(of_distributions, device="cuda", capture=False)
    batch = replay.sample(SIZE)
    if capture:
        with pytest.raises(RuntimeError, match=r"^capture: the update cannot become a CUDA graph \(.*item\(\)"):
            learner.update(batch)
        return
    with pytest.warns(RuntimeWarning, match="^updates run without CUDA graphs, .*item"):
        learner.update(batch)
    eager.update(batch)
    np.testing.assert_allclose(learner.td_errors(), 2 * eager.td_errors(), rtol=1e-3)

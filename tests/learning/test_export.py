"""Networks can be exported and traced, and compute the same values afterwards."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from pydqn.learning.networks import make_network, mixed_precision_copy
from pydqn.learning.pixels import to_channels_last
from pydqn.learning.policy import Policy

NETWORKS = ["nature", "nature_7x7", "small"]
pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning")]  # torch.jit is on its way out


def network_of(name, precision="float32", stack=4):
    """Return a network as a learner computes with it: channels-last, and in bfloat16 if that is the precision."""
    units = () if name == "nature_7x7" else (16,)
    network = make_network(
        name, stack, (84, 84), 6, hidden_units=units, dueling=True, pixel_mean=0.3, pixel_std=0.5, seed=1
    )
    policy = Policy(network, torch.device("cpu"), precision)
    return policy.compute_network.eval()


def pixels(size, stack=4):
    generator = torch.Generator().manual_seed(size)
    return torch.randint(0, 256, (size, stack, 84, 84), dtype=torch.uint8, generator=generator)


def exported(strict):
    def export(network, example):
        batch = torch.export.Dim("batch")
        return torch.export.export(network, (example,), dynamic_shapes=({0: batch},), strict=strict).module()

    return export


WAYS = {
    "export": exported(False),
    "strict export": exported(True),
    "jit.trace": lambda network, example: torch.jit.trace(network, (example,)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_traced_network_gives_the_same_values(name, precision, way):
    """For other pixels than those of the trace, and for more."""
    network = network_of(name, precision)
    traced = WAYS[way](network, pixels(3))
    for size in (3, 5):
        obs = pixels(size) // 2
        with torch.no_grad():
            assert torch.equal(traced(obs), network(obs))


@pytest.mark.parametrize("stack", [3, 4])
def test_no_operation_is_missing(stack):
    """An operation that PyTorch does not see would become a constant."""
    network = network_of("small", stack=stack)
    graph = make_fx(network)(pixels(3, stack))
    obs = pixels(3, stack) // 2
    assert torch.equal(graph(obs), network(obs))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_can_be_traced_with_prepared_observations(name):
    network = network_of(name)
    traced = torch.export.export(network, (network.prepare(pixels(3)),)).module()
    obs = network.prepare(pixels(3) // 2)
    assert torch.equal(traced(obs), network(obs))


def test_dispatch_modes_see_everything():
    with FlopCounterMode(display=False) as counter:
        network_of("nature")(pixels(2))
    assert counter.get_total_flops() > 10_000_000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_tracing_the_compiled_loop_converts_pixels(monkeypatch, dtype):
    """Otherwise the tests above would prove nothing."""
    calls = []
    name = "_to_float32" if dtype == torch.float32 else "_to_bfloat16"
    monkeypatch.setattr(f"pydqn.learning.pixels.{name}", lambda flat, stride, out, size: calls.append(out.fill(0)))
    images = pixels(2)
    assert torch.equal(to_channels_last(images, dtype), torch.zeros(2, 4, 84, 84, dtype=dtype))
    assert len(calls) == 1


@pytest.mark.parametrize("way", WAYS)
def test_a_mixed_precision_copy_can_be_traced(way):
    network = mixed_precision_copy(make_network("small", 4, (84, 84), 6, hidden_units=(16,)), torch.bfloat16).eval()
    traced = WAYS[way](network, pixels(3))
    with torch.no_grad():
        assert torch.equal(traced(pixels(5)), network(pixels(5)))


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime"))),
    reason="needs onnx, onnxscript and onnxruntime",
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", NETWORKS)
def test_onnx_gives_about_the_same_values(tmp_path, name):
    import onnxruntime

    network, path = network_of(name), tmp_path / "network.onnx"
    torch.onnx.export(network, (pixels(3),), path, dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    obs = pixels(5)
    (values,) = session.run(None, {session.get_inputs()[0].name: obs.numpy()})
    torch.testing.assert_close(torch.from_numpy(values), network(obs).detach(), rtol=1e-3, atol=1e-4)

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pydqn.envs.frames import FrameLayout, Part
from pydqn.learning.networks import Table, make_network, mixed_precision_copy
from pydqn.learning.policy import Policy
from pydqn.learning.torsos import TORSOS


def pixels(size=3, seed=0):
    return torch.randint(0, 256, (size, 4, 84, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dueling", [False, True])
@pytest.mark.parametrize("mean", [0.0, 0.34])
def test_nature_against_a_plain_sequential(dueling, mean):
    network = make_network("nature", 4, (84, 84), 6, dueling=dueling, pixel_mean=mean, pixel_std=0.5, seed=1)
    first, second, third = network.torso.convs
    plain = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third, nn.ReLU(), nn.Flatten())
    features = plain((pixels().float() / 255 - mean) / 0.5)
    expected = network.advantage(features)
    if dueling:
        expected = network.value(features) + expected - expected.mean(dim=1, keepdim=True)
    torch.testing.assert_close(network(pixels()), expected, rtol=1e-4, atol=1e-5)


def test_nature_has_the_published_shape():
    network = make_network("nature", 4, (84, 84), 18)
    shapes = [tuple(parameter.shape) for name, parameter in network.named_parameters() if "weight" in name]
    assert shapes == [(32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3), (512, 3136), (18, 512)]


@pytest.mark.parametrize("dueling", [False, True])
@pytest.mark.parametrize("mean", [0.0, 0.34])
def test_nature_7x7_against_a_plain_sequential(dueling, mean):
    network = make_network(
        "nature_7x7", 4, (84, 84), 5, hidden_units=(), dueling=dueling, pixel_mean=mean, pixel_std=0.5, seed=1
    )
    shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    convs = {
        f"torso.convs.{i}.weight": shape for i, shape in enumerate([(32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3)])
    }
    streams = {"advantage.0.weight": (5, 256 if dueling else 512), "advantage.0.bias": (5,)}
    if dueling:
        streams |= {"value.0.weight": (1, 256), "value.0.bias": (1,)}
    assert shapes == {**convs, "torso.convs.3.weight": (512, 64, 7, 7), **streams}
    x = (pixels().float() / 255 - mean) / 0.5
    for conv in network.torso.convs:
        x = F.relu(F.conv2d(x, conv.weight, stride=conv.stride))
    x = x.flatten(1)
    expected = network.advantage(x[:, 256:] if dueling else x)
    if dueling:
        expected = network.value(x[:, :256]) + expected - expected.mean(dim=1, keepdim=True)
    torch.testing.assert_close(network(pixels()), expected, rtol=1e-4, atol=1e-5)


def test_nature_7x7_starts_as_xavier():
    network = make_network("nature_7x7", 4, (84, 84), 5, hidden_units=(), dueling=True)
    for weight in (parameter for parameter in network.parameters() if parameter.dim() > 1):
        area = weight[0, 0].numel()
        bound = (6 / (weight.shape[0] * area + weight.shape[1] * area)) ** 0.5
        assert 0.95 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    assert all((parameter == 0).all() for parameter in network.parameters() if parameter.dim() == 1)


def test_a_table_reads_the_row_of_the_newest_state():
    table = Table(5, 3)
    assert (table(torch.eye(5)[:, None]) == 0).all()
    with torch.no_grad():
        table.values.copy_(torch.arange(15.0).view(5, 3))
    obs = torch.eye(5)[torch.tensor([[0, 4], [3, 1]])]
    assert table(obs).tolist() == [[12.0, 13.0, 14.0], [3.0, 4.0, 5.0]]


def test_dueling_advantages_have_no_mean():
    network = make_network("mlp", 1, (5,), 4, hidden_units=(16,), dueling=True)
    obs = torch.randn(7, 1, 5)
    values = network(obs)
    torch.testing.assert_close(values.mean(dim=1, keepdim=True), network.value(obs.flatten(1)))


def test_mlp():
    network = make_network("mlp", 2, (3,), 2, hidden_units=(16, 8))
    obs = torch.randn(5, 2, 3)
    layers = [layer for layer in network.advantage if isinstance(layer, nn.Linear)]
    x = obs.flatten(1)
    for layer in layers[:-1]:
        x = F.relu(layer(x))
    torch.testing.assert_close(network(obs), layers[-1](x))
    assert [layer.out_features for layer in layers] == [16, 8, 2]


def test_weights_come_from_the_seed_and_leave_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one = make_network("small", 4, (84, 84), 6, seed=1)
    np.testing.assert_array_equal(torch.rand(3), expected)
    two, three = make_network("small", 4, (84, 84), 6, seed=1), make_network("small", 4, (84, 84), 6, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.torso.convs[0].weight, three.torso.convs[0].weight)


def test_bfloat16_stays_close():
    network = make_network("nature", 4, (84, 84), 6)
    exact = network(pixels())
    with torch.autocast("cpu", torch.bfloat16):
        rough = network(pixels())
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("shape", [(84, 84), (10, 10, 4), (3, 20, 24), (96, 96, 3), (130, 160)], ids=str)
@pytest.mark.parametrize("name", TORSOS)
def test_bfloat16_on_any_machine(name, shape):
    """Every network, also one with a single convolution, in the precision that some processors choose by themselves."""
    try:
        network = make_network(name, 2, shape, 3, hidden_units=(16,), dueling=True)
    except ValueError as error:
        assert "larger frames" in str(error)  # noqa: PT017
        return
    obs = torch.randint(0, 256, (4, 2, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for frames in (obs, obs.float()):
        policy = Policy(network, torch.device("cpu"), "bfloat16")
        torch.testing.assert_close(policy.forward(frames), network(frames), rtol=0.05, atol=0.03)
        policy.compute_network(frames).sum().backward()
        assert all(parameter.grad is not None for parameter in policy.compute_network.parameters())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_records_in_either_precision(precision):
    parts = (
        Part("grid", (10, 10, 4), np.dtype(np.uint8), (0, 1), "last"),
        Part("position", (2,), np.dtype(np.float32), (-1, 1), ""),
    )
    network = make_network("auto", 1, FrameLayout(parts), 3, hidden_units=(16,))
    obs = torch.randint(0, 2, (4, 1, 408), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    values = Policy(network, torch.device("cpu"), precision).forward(obs)
    torch.testing.assert_close(values, network(obs), rtol=0.05, atol=0.02)


@pytest.mark.parametrize(
    ("name", "shape"), [("nature", (4,)), ("nature", (20, 20)), ("small", (2, 84, 84, 3)), ("resnet", (84, 84))]
)
def test_frames_that_do_not_fit(name, shape):
    with pytest.raises(ValueError, match="network"):
        make_network(name, 4, shape, 6)


@pytest.mark.parametrize("dueling", [False, True])
def test_a_mixed_precision_copy_computes_as_under_autocast(dueling):
    network = make_network("nature", 4, (84, 84), 6, dueling=dueling, pixel_mean=0.3, pixel_std=0.2)
    low = mixed_precision_copy(network, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        values, expected = low(pixels()), network(pixels())
        assert torch.equal(values, expected)
        (values**2).mean().backward()
        (expected**2).mean().backward()
    names = dict(network.named_parameters())
    assert [name for name, _ in low.named_parameters()] == list(names)
    for name, parameter in low.named_parameters():
        shared = name.startswith("torso.convs.0")
        assert (parameter is names[name]) == shared
        assert parameter.dtype == (torch.float32 if shared else torch.bfloat16)
        assert parameter.stride() == names[name].stride()
        if not shared:
            torch.testing.assert_close(parameter.grad.float(), names[name].grad)
    assert network.torso.convs[0].weight.grad.abs().sum() > 0


def test_a_mixed_precision_copy_shares_what_autocast_leaves_alone():
    linear = nn.Linear(3, 3)
    network = nn.Sequential(linear, nn.BatchNorm1d(3), linear)
    low = mixed_precision_copy(network, torch.bfloat16)
    assert low[0].weight is low[2].weight
    assert low[0].weight.dtype == torch.bfloat16
    assert low[1].weight is network[1].weight
    assert low[1].running_mean is network[1].running_mean
    assert len(list(low.parameters())) == len(list(network.parameters()))

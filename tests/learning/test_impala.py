"""IMPALA's residual torso, and spectral normalization."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from pydqn import Learner, LearnerSettings
from pydqn.learning.networks import make_network
from pydqn.learning.policy import Policy
from pydqn.learning.torsos import ImpalaSettings, ImpalaTorso, SpectralConv
from tests.helpers.learners import CPU, copied, make


def pixels(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def plain(torso, x):
    """The published network, step by step, of scaled frames."""
    for conv, blocks in zip(torso.convs, torso.residuals, strict=True):
        x = F.max_pool2d(F.conv2d(x, conv.weight, conv.bias, padding=1), 3, 2, 1)
        for block in blocks:
            y = F.conv2d(F.relu(x), block.convs[0].weight, block.convs[0].bias, padding=1)
            x = x + F.conv2d(F.relu(y), block.convs[1].weight, block.convs[1].bias, padding=1)
    return F.relu(x)


@pytest.mark.parametrize("mean", [0.0, 0.3])
@pytest.mark.parametrize(("shape", "channels"), [((84, 84), "none"), ((3, 33, 40), "first"), ((12, 11, 4), "last")])
def test_against_the_layers_one_by_one(shape, channels, mean):
    torso, obs = ImpalaTorso(2, shape, mean, 0.5, channels=channels), pixels(2, 2, *shape)
    images = obs.float()
    if channels != "none":
        images = (images if channels == "first" else images.permute(0, 1, 4, 2, 3)).flatten(1, 2)
    expected = plain(torso, (images / 255 - mean) / 0.5).flatten(1)
    assert torso.features == expected.shape[1]
    torch.testing.assert_close(torso(obs), expected, rtol=1e-4, atol=1e-4)


def test_the_published_shapes():
    torso = ImpalaTorso(4, (84, 84))
    assert [conv.out_channels for conv in torso.convs] == [16, 32, 32]
    assert torso.features == 32 * 11 * 11
    wide = ImpalaTorso(4, (84, 84), width=2, spectral=True, pooled=6)  # Beyond the Rainbow
    assert [conv.out_channels for conv in wide.convs] == [32, 64, 64]
    assert wide.features == 64 * 6 * 6
    assert sum(isinstance(module, SpectralConv) for module in wide.modules()) == 12
    assert not any(isinstance(conv, SpectralConv) for conv in wide.convs)
    expected = F.adaptive_max_pool2d(ImpalaTorso.forward(_unpooled(wide), pixels(1, 4, 84, 84)).view(1, 64, 11, 11), 6)
    torch.testing.assert_close(wide.eval()(pixels(1, 4, 84, 84)), expected.flatten(1))


def _unpooled(torso):
    other = copy.deepcopy(torso).eval()
    other._side = 0
    return other


def test_spectral_normalization_against_pytorch():
    """PyTorch's parametrization makes one step of the power method per pass in training mode, from its own vectors."""
    torch.manual_seed(0)
    ours, theirs = SpectralConv(5, 7), nn.Conv2d(5, 7, 3, padding=1)
    theirs.load_state_dict({name: value for name, value in ours.state_dict().items() if name != "u"})
    theirs = spectral_norm(theirs, n_power_iterations=1)
    theirs.parametrizations.weight[0]._u.copy_(ours.u)
    x = torch.randn(2, 5, 8, 8)
    for _ in range(400):
        found, expected = ours(x), theirs(x)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    largest = torch.linalg.matrix_norm(ours.weight.detach().flatten(1), 2)
    torch.testing.assert_close(F.conv2d(x, ours.weight / largest, ours.bias, padding=1), found, rtol=1e-3, atol=1e-3)
    for one in (found, expected):
        one.square().sum().backward()
    torch.testing.assert_close(ours.weight.grad, theirs.parametrizations.weight.original.grad, rtol=1e-2, atol=1e-2)


def test_only_passes_with_gradients_in_training_refine_the_vector():
    layer, x = SpectralConv(3, 4), torch.randn(1, 3, 5, 5)
    before = layer.u.clone()
    with torch.no_grad():
        layer(x)
    layer.eval()(x)
    assert torch.equal(layer.u, before)
    layer.train()(x)
    assert not torch.equal(layer.u, before)


def learner_of(precision="float32", **settings):
    _, replay, _ = make(batch_size=8)
    settings = LearnerSettings(
        batch_size=8, precision=precision, target_update_period=3, learning_rate=1e-3, **settings
    )
    impala = ImpalaSettings(1, spectral=True, pooled=3)
    network = make_network("impala", 4, (84, 84), 6, hidden_units=(16,), settings=settings, impala=impala)
    return Learner(network, settings, CPU, replay.empty_batch(8)), replay


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_learner_with_it(precision):
    """It learns, its vectors reach the target network, and a restored learner goes on as the saved one."""
    learner, replay = learner_of(precision)
    first = {name: value.clone() for name, value in learner.online.state_dict().items()}
    for number in range(1, 4):
        learner.update(replay.sample(8))
        vectors = [
            [value for name, value in network.state_dict().items() if name.endswith(".u")]
            for network in (learner.online, learner.target)
        ]
        assert len(vectors[0]) == 12
        same = all(map(torch.equal, *vectors))
        assert same == (number == 3)
    assert all(not torch.equal(value, first[name]) for name, value in learner.online.state_dict().items())
    obs = replay.sample(4).obs
    assert np.array_equal(learner.policy.values(obs), Policy(copy.deepcopy(learner.online), CPU, precision).values(obs))
    restored, _ = learner_of(precision)
    restored.load_state_dict(copied(learner.state_dict()))
    batch = replay.sample(8)
    for one in (learner, restored):
        one.update(batch)
    for one, other in zip(learner.online.state_dict().values(), restored.online.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_bfloat16_stays_close():
    network = make_network("impala", 4, (84, 84), 6, hidden_units=(16,), impala=ImpalaSettings(2, True, 6)).eval()
    obs = pixels(3, 4, 84, 84).numpy()
    exact, rough = (Policy(network, CPU, precision).values(obs) for precision in ("float32", "bfloat16"))
    np.testing.assert_allclose(rough, exact, atol=0.02, rtol=0.1)

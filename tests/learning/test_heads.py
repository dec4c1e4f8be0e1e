"""Layer normalization and the shared bias, against PyTorch's own layers, and in learners."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pydqn import Config, Learner, LearnerSettings
from pydqn.learning.heads import LayerNorm, SharedBias
from pydqn.learning.networks import make_network
from pydqn.learning.noise import Noise, NoisyLinear
from pydqn.learning.policy import Policy
from pydqn.learning.torsos import ImpalaSettings
from tests.helpers.learners import CPU, DISTRIBUTIONS, copied, make


def pixels(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def scrambled(layer):
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 1.0)
    return layer


@pytest.mark.parametrize("shape", [(3, 7), (2, 7, 5, 4)])
def test_layer_norm_against_pytorch(shape):
    x, ours = 3 * torch.randn(shape) + 1, scrambled(LayerNorm(7))
    plain = F.layer_norm(x, shape[1:])
    per_feature = (1, 7) + (1,) * (len(shape) - 2)
    expected = plain * ours.weight.reshape(per_feature) + ours.bias.reshape(per_feature)
    torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5)
    low = ours(x.to(torch.bfloat16))
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low, ours(x.to(torch.bfloat16).float()).to(torch.bfloat16))


@pytest.mark.parametrize(("where", "norms"), [("none", 0), ("head", 2), ("torso", 3), ("both", 5)])
def test_where_it_normalizes(where, norms):
    """Before each ReLU of the head, of the torso, or of both."""
    network = make_network("nature", 4, (84, 84), 5, hidden_units=(16, 8), layer_norm=where, seed=1)
    assert sum(isinstance(module, LayerNorm) for module in network.modules()) == norms
    for module in network.modules():
        if isinstance(module, LayerNorm):
            scrambled(module)
    x = pixels(3, 4, 84, 84)
    features = x.float() / 255
    for number, conv in enumerate(network.torso.convs):
        features = conv(features)
        features = F.relu(network.torso.norms[number](features) if norms in (3, 5) else features)
    features = features.flatten(1)
    for layer in network.advantage:
        features = layer(features)
    torch.testing.assert_close(network(x), features, rtol=1e-4, atol=1e-4)


def test_impala_with_it():
    """Two of each residual block, and the one before the last ReLU."""
    impala = ImpalaSettings(1, True, 3)
    network = make_network("impala", 4, (42, 42), 5, hidden_units=(16,), layer_norm="both", impala=impala)
    assert sum(isinstance(module, LayerNorm) for module in network.modules()) == 3 * 2 * 2 + 1 + 1
    inputs = []
    for module in network.modules():
        if isinstance(module, LayerNorm):
            module.register_forward_hook(lambda _, __, out: inputs.append(out.clone()))
    network(pixels(2, 4, 42, 42))
    assert len(inputs) == 14
    for out in inputs:  # neither scaled nor shifted yet
        torch.testing.assert_close(out.flatten(1).mean(dim=1), torch.zeros(2), rtol=0, atol=1e-4)


def test_a_network_without_it_is_the_one_before():
    """So old checkpoints load."""
    network = make_network("nature", 4, (84, 84), 5, hidden_units=(16,))
    assert not [name for name in network.state_dict() if "norm" in name]


@pytest.mark.parametrize("noisy", [0.0, 0.5])
@pytest.mark.parametrize("value", ["scalar", *DISTRIBUTIONS])
def test_the_last_layer_has_one_bias_for_all_actions(value, noisy):
    settings = LearnerSettings(value=value, **DISTRIBUTIONS.get(value, {}))
    network = make_network(
        "mlp", 1, (4,), 3, hidden_units=(16,), settings=settings, shared_bias=True, noisy_sigma=noisy, seed=1
    )
    last = network.advantage[-1]
    outputs = 1 if network.representation is None else network.representation.outputs
    assert isinstance(last, SharedBias)
    assert tuple(last.bias.shape) == (outputs,)
    assert 0 < last.bias.abs().max() <= 0.25
    x = torch.randn(5, 16)
    weight = last.linear.mu.weight if noisy else last.linear.weight
    torch.testing.assert_close(last(x), x @ weight.T + last.bias.repeat(3))
    assert (last.linear.mu if noisy else last.linear).bias is None
    if noisy:
        noise = Noise(network, 1, CPU)
        noise.draw(torch.Generator().manual_seed(0))
        with noise.applied():
            assert not torch.equal(last(x), x @ weight.T + last.bias.repeat(3))


def test_a_noisy_layer_may_lack_the_bias_of_its_means():
    layer = NoisyLinear(4, 3, bias=False)
    assert layer.mu.bias is None
    assert layer.sigma.bias is not None


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("where", "shared", "dueling"), list(itertools.product(["head", "both"], [0, 1], [0, 1])))
def test_a_learner_with_both(where, shared, dueling, precision):
    """Every parameter learns, also under bfloat16, and a restored learner goes on as the saved one."""

    def learner():
        _, replay, _ = make(batch_size=8)
        settings = LearnerSettings(batch_size=8, precision=precision, target_update_period=3, learning_rate=1e-2)
        network = make_network(
            *("small", 4, (84, 84), 6),
            hidden_units=(16,),
            dueling=bool(dueling),
            layer_norm=where,
            shared_bias=bool(shared),
        )
        return Learner(network, settings, CPU, replay.empty_batch(8)), replay

    one, replay = learner()
    before = {name: value.clone() for name, value in one.online.state_dict().items()}
    for _ in range(3):
        one.update(replay.sample(8))
    after = one.online.state_dict()
    still = {name for name in after if torch.equal(before[name], after[name])}
    # What all advantages have in common does not reach the action values, so that this gradient is rounding errors.
    assert not still - ({"advantage.3.bias"} if shared and dueling else set())
    obs = replay.sample(4).obs
    assert np.isfinite(Policy(one.online, CPU, precision).values(obs)).all()
    other, _ = learner()
    other.load_state_dict(copied(one.state_dict()))
    batch = replay.sample(8)
    for each in (one, other):
        each.update(batch)
    for ours, theirs in zip(one.online.state_dict().values(), other.online.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="^layer_norm: expected one of none, head, torso, both, got 'all'"):
        make_network("mlp", 1, (4,), 2, layer_norm="all")
    with pytest.raises(ValueError, match="^layer_norm: 'torso' needs convolutions, which this network lacks"):
        make_network("auto", 1, (4,), 2, layer_norm="torso")
    with pytest.raises(ValueError, match="^weight_decay: expected 0 with optimizer = 'adam'"):
        Config(weight_decay=0.1)
    with pytest.raises(ValueError, match="^weight_decay: expected less than 1 / learning_rate = 1000"):
        Config(weight_decay=1000.0, learning_rate=1e-3, optimizer="adamw")


@pytest.mark.parametrize("dueling", [False, True])
def test_levels_are_embedded_behind_the_first_hidden_layer_of_vectors(dueling):
    """Not into the four numbers themselves, with which CartPole was not learned."""
    settings = LearnerSettings(value="implicit_quantile", **DISTRIBUTIONS["implicit_quantile"])
    network = make_network("mlp", 1, (4,), 3, hidden_units=(16, 12), dueling=dueling, settings=settings, seed=1)
    obs, tau = torch.randn(5, 1, 4), torch.rand(5, 6)
    psi = F.relu(network.encoder[0](obs.flatten(1)))
    assert tuple(psi.shape) == (5, 16)
    cosines = torch.cos(torch.pi * tau[:, :, None] * torch.arange(1, 9))
    product = psi[:, None] * F.relu(network.representation.embedding(cosines))
    expected = network.advantage(product)
    assert [layer.out_features for layer in network.advantage if isinstance(layer, nn.Linear)] == [12, 3]
    if dueling:
        expected = network.value(product) + expected - expected.mean(dim=2, keepdim=True)
    torch.testing.assert_close(network.outputs(obs, tau), expected.transpose(1, 2), rtol=1e-4, atol=1e-5)
    pixels_or_no_layers = [make_network("small", 4, (84, 84), 3, hidden_units=(16,), settings=settings)]
    pixels_or_no_layers.append(make_network("mlp", 1, (4,), 3, hidden_units=(), settings=settings))
    assert all(other.encoder is None for other in pixels_or_no_layers)

"""The gradients that are written out, against autograd's."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from pydqn import LearnerSettings
from pydqn.envs.frames import FrameLayout, Part
from pydqn.learning.fused import FusedGradients, FusedValues, _conv_relu, _linear_relu, reason_against
from pydqn.learning.gradients import Autograd
from pydqn.learning.networks import make_network
from pydqn.learning.objectives import Transitions
from pydqn.learning.policy import Policy
from tests.helpers.learners import needs_cuda

CPU, SIZE = torch.device("cpu"), 6
NETWORKS = {
    "nature": ((84, 84), (24,)),
    "small": ((84, 84), (24, 16)),
    "nature_7x7": ((84, 84), ()),
    "minatar": ((10, 10, 4), (24,)),
    "grid": ((3, 40, 40), (24,)),
    "mlp": ((5,), (24, 16)),
}


def make(name, seed, settings, dtype=torch.float32, **others):
    shape, units = NETWORKS[name]
    network = make_network(name, 2, shape, 3, hidden_units=units, settings=settings, seed=seed, **others)
    return Policy(network.to(dtype), CPU, "float32")


def batch_of(name, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def observations():
        shape = (SIZE, 2, *NETWORKS[name][0])
        if name == "mlp":
            return torch.randn(shape, generator=generator)
        return torch.randint(0, 256, shape, generator=generator).to(torch.uint8)

    obs, next_obs = observations(), observations()
    reward, discount = 3 * torch.randn(SIZE, generator=generator), torch.rand(SIZE, generator=generator)
    return Transitions(obs, torch.arange(SIZE) % 3, reward, discount, next_obs), torch.rand(SIZE, generator=generator)


def gradients_of(policy):
    found = {name: parameter.grad for name, parameter in policy.network.named_parameters()}
    for parameter in policy.network.parameters():
        parameter.grad = None
    return found


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dueling", [False, True])
def test_they_are_autograds(name, dueling):
    """Those of autograd in float64, for a network whose first layer is scaled and shifted, and for one that is not.

    Vectors are float32 in any network, so there autograd computes in float32, too.
    """
    precise = torch.float32 if name == "mlp" else torch.float64
    for double, loss, mean in itertools.product((False, True), ("huber", "mse"), (0.0, 0.34)):
        settings = LearnerSettings(batch_size=SIZE, double=double, loss=loss)
        pixels = {} if name == "mlp" else {"pixel_mean": mean, "pixel_std": 0.5}
        exact, online, target, exact_target = (
            make(name, seed, settings, dtype, dueling=dueling, **pixels)
            for seed, dtype in ((0, precise), (0, torch.float32), (1, torch.float32), (1, precise))
        )
        assert not reason_against(online.network, settings)
        batch, weight = batch_of(name)
        expected = Autograd(exact, exact_target.network, settings)(batch, weight)
        found = FusedGradients(online.network, target.network, settings)(batch, weight)
        torch.testing.assert_close(found.values, expected.values.float(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.errors, expected.errors.float(), rtol=1e-4, atol=1e-5)
        ours, theirs = gradients_of(online), gradients_of(exact)
        for parameter, (key, gradient) in zip(online.network.parameters(), theirs.items(), strict=True):
            assert ours[key].stride() == parameter.stride()  # what the optimizers want
            assert (ours[key] - gradient).norm() <= 2e-5 * gradient.norm(), (key, double, loss, mean)


def test_frames_may_be_looked_up():
    settings = LearnerSettings(batch_size=SIZE, double=True)
    for name in ("small", "minatar", "mlp"):
        batch, weight = batch_of(name)
        frames = torch.cat([batch.obs, batch.next_obs]).flatten(0, 1)
        rows = torch.arange(len(frames), dtype=torch.int32).view(2, SIZE, 2)
        of_rows = batch._replace(obs=rows[0], next_obs=rows[1])
        policies = [make(name, 0, settings) for _ in range(2)]
        found = [
            FusedGradients(policy.network, make(name, 1, settings).network, settings, where)(of_what, weight)
            for policy, where, of_what in zip(policies, (None, frames), (batch, of_rows), strict=True)
        ]
        torch.testing.assert_close(found[0], found[1])
        torch.testing.assert_close(*(gradients_of(policy) for policy in policies))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dueling", [False, True])
def test_action_values_are_the_networks(name, dueling):
    batch, _ = batch_of(name)
    network = make(
        name, 0, LearnerSettings(), dueling=dueling, **({} if name == "mlp" else {"pixel_mean": 0.34})
    ).network
    expected = network(batch.obs).detach()
    torch.testing.assert_close(FusedValues(network)(batch.obs), expected, rtol=1e-4, atol=1e-5)
    frames = batch.obs.flatten(0, 1)
    rows = torch.arange(len(frames), dtype=torch.int32).view(SIZE, 2)
    torch.testing.assert_close(FusedValues(network, frames)(rows), expected, rtol=1e-4, atol=1e-5)


class Larger(nn.Module):
    def forward(self, obs):
        return obs


def test_reasons_against():
    scalar = LearnerSettings()
    for expected, settings, name, others in (
        ("", scalar, "nature", {}),
        ("not scalar", LearnerSettings(value="quantile"), "nature", {}),
        ("Munchausen", LearnerSettings(munchausen=True, double=False), "nature", {}),
        ("NoisyLinear", scalar, "mlp", {"noisy_sigma": 0.5}),
        ("LayerNorm", scalar, "nature", {"layer_norm": "both"}),
        ("SharedBias", scalar, "mlp", {"shared_bias": True}),
        ("ImpalaTorso", scalar, "impala", {}),
    ):
        shape = NETWORKS.get(name, NETWORKS["nature"])[0]
        network = make_network(name, 2, shape, 3, settings=settings, **others)
        reason = reason_against(network, settings)
        assert expected in reason
        assert bool(expected) == bool(reason)
    record = FrameLayout((Part("", (4,), torch.zeros(0).numpy().dtype, (0, 1)),), masked_actions=3)
    assert "parts" in reason_against(make_network("auto", 1, record, 3), scalar)
    assert "pooled" in reason_against(make_network("nature", 2, (160, 160), 3), scalar)
    assert "not compute in float32" in reason_against(make_network("nature", 2, (84, 84), 3).bfloat16(), scalar)
    assert "not pydqn's" in reason_against(Larger(), scalar)
    frozen, tied, watched, hooked = (make_network("mlp", 1, (4,), 3, hidden_units=(8, 8)) for _ in range(4))
    frozen.advantage[0].requires_grad_(False)
    assert "frozen" in reason_against(frozen, scalar)
    tied.advantage[2].bias = tied.advantage[0].bias
    assert "share" in reason_against(tied, scalar)
    watched.advantage[0].weight.register_hook(lambda gradient: None)
    assert "hooks" in reason_against(watched, scalar)
    hooked.advantage[0].register_forward_hook(lambda *_: None)
    assert "hooks" in reason_against(hooked, scalar)


@needs_cuda
def test_what_cudnn_and_cublas_do_with_nan():
    """Memory that holds NaN changes nothing; NaN in the input is not lost in a ReLU: a run that diverges shows it."""
    conv, linear = nn.Conv2d(4, 16, 8, 4).cuda().to(memory_format=torch.channels_last), nn.Linear(64, 16).cuda()
    with torch.no_grad():
        x = torch.rand(8, 4, 84, 84, device="cuda").contiguous(memory_format=torch.channels_last)
        for _ in range(3):
            waste = torch.full((8, 16, 20, 20), torch.nan, device="cuda")
            del waste
            assert _conv_relu(x, conv, conv.bias).isfinite().all()
        torch.testing.assert_close(_conv_relu(x, conv, conv.bias), conv(x).relu(), rtol=1e-2, atol=1e-2)
        x[3, 0, 0, 0] = torch.nan
        assert _conv_relu(x, conv, conv.bias)[3].isnan().any()
        assert _linear_relu(torch.full((2, 64), torch.nan, device="cuda"), linear).isnan().all()

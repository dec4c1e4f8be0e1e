"""Acting: devices, precision, exploration, and actors."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

from pydqn import FrameReplay
from pydqn.learning.networks import make_network
from pydqn.learning.policy import Actor, Policy, resolve_device, resolve_precision
from pydqn.replay.device import DeviceReplay
from tests.helpers.learners import CPU, make, needs_cuda


def test_environments_explore_independently():
    learner, _, _ = make()
    obs = np.random.default_rng(0).integers(0, 255, (64, 4, 84, 84), dtype=np.uint8)
    policy = learner.policy
    greedy = policy.values(obs).argmax(axis=1)
    np.testing.assert_array_equal(policy.choose(policy.values(obs), 0.0, np.random.default_rng(1)), greedy)
    explored = policy.choose(policy.values(obs), 0.5, np.random.default_rng(1)) != greedy
    assert 10 < explored.sum() < 45
    assert len(set(policy.choose(policy.values(obs), 1.0, np.random.default_rng(1)).tolist())) == 6


@pytest.mark.parametrize("name", ["tpu", "cuda:99", "mps", "", "cuda:x"])
def test_devices_that_do_not_exist(name):
    with pytest.raises(ValueError, match="^device: "):
        resolve_device(name)


def test_precision():
    assert resolve_precision("float32", CPU) == torch.float32
    assert resolve_precision("bfloat16", CPU) == torch.bfloat16
    with mock.patch("pydqn.learning.policy._bfloat16_is_faster", return_value=True):
        assert resolve_precision("auto", CPU) == torch.bfloat16
        assert resolve_precision("auto", torch.device("cuda")) == torch.float32
    with mock.patch("pydqn.learning.policy._bfloat16_is_faster", return_value=False):
        assert resolve_precision("auto", CPU) == torch.float32
    assert resolve_precision("auto", CPU) in (torch.float32, torch.bfloat16)


PLAIN = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
IMAGES = make_network("grid", 1, (40, 40), 3)
VECTORS = make_network("mlp", 3, (4,), 3)


@pytest.mark.parametrize(
    ("network", "chosen"), [(IMAGES, torch.bfloat16), (VECTORS, torch.float32), (PLAIN, torch.float32)]
)
def test_only_our_networks_of_pixels_lose_digits_by_themselves(network, chosen):
    """On a processor that multiplies bfloat16."""
    with mock.patch("pydqn.learning.policy._bfloat16_is_faster", return_value=True):
        assert Policy(network, CPU).dtype == chosen


@pytest.mark.parametrize("network", [VECTORS, PLAIN])
def test_values_are_float32_in_every_precision(network):
    obs = np.random.default_rng(0).normal(size=(5, 3, 4)).astype(np.float32)
    exact, rough = (Policy(network, CPU, precision).values(obs) for precision in ("float32", "bfloat16"))
    assert exact.dtype == rough.dtype == np.float32
    np.testing.assert_allclose(rough, exact, atol=0.05)
    policy = Policy(network, CPU, "bfloat16")
    assert np.array_equal(Actor(policy, obs).values(obs), rough)


@pytest.mark.parametrize("device", [CPU, pytest.param(torch.device("cuda"), marks=needs_cuda)])
def test_an_actor_gives_the_values_of_its_policy(device):
    """From observations and from row numbers, while the network learns."""
    learner, replay, _ = make(device)
    on_device = DeviceReplay(60, num_envs=3, device=device)
    on_host = FrameReplay(60, num_envs=3)
    actor = Actor(learner.policy, on_host.empty_batch(3).obs)
    actor_of_rows = Actor(learner.policy, on_device.empty_batch(3).obs, on_device.frames)
    # A GPU may round to TensorFloat-32, in one form of the values as in another.
    tolerance = {"rtol": 1e-3, "atol": 1e-5} if device == CPU else {"rtol": 2e-2, "atol": 2e-3}
    generator = np.random.default_rng(0)
    for time_step in range(30):
        frame = generator.integers(0, 255, (3, 84, 84), dtype=np.uint8)
        for buffer in (on_host, on_device):
            buffer.append(frame, [0] * 3, [0.0] * 3, [False] * 3, [False] * 3, [time_step == 0] * 3)
        values = learner.policy.values(on_host.latest())
        assert values.shape == (3, 6)
        np.testing.assert_allclose(actor.values(on_host.latest()), values, **tolerance)
        np.testing.assert_allclose(actor_of_rows.values(on_device.latest()), values, **tolerance)
        learner.update(replay.sample(32))


def test_a_policy_needs_no_learner():
    network = make_network("mlp", 1, (4,), 2, hidden_units=(8,))
    values = Policy(network, CPU).values(np.zeros((3, 1, 4), np.float32))
    assert values.shape == (3, 2)
    assert values.dtype == np.float32


def test_any_parameters_will_do():
    """Also those of 3D convolutions, and in any memory layout."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.volume, self.image = nn.Conv3d(1, 2, 3), nn.Conv2d(1, 2, 3)
            self.turned = nn.Parameter(torch.arange(6.0).view(2, 3).t())

    network = Odd()
    before = [value.clone() for value in network.parameters()]
    policy = Policy(network, torch.device("cpu"), "float32")
    assert all(map(torch.equal, before, policy.network.parameters()))
    assert network.image.weight.is_contiguous(memory_format=torch.channels_last)
    assert network.turned.is_contiguous()

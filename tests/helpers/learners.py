"""Learners with filled replay buffers, and what tests compare them by."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from torch import nn

from pydqn import FrameReplay, Learner, LearnerSettings, preset
from pydqn.learning.networks import make_network
from pydqn.replay.device import DeviceReplay

CPU = torch.device("cpu")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SIZE, ACTIONS, ATOMS, LOW, HIGH = 16, 3, 11, -3.0, 3.0  # of `make_custom`


def make(device=CPU, capture=None, at_once=1, storage="host", **overrides):
    """Return a learner of pixels, its replay buffer and its `Config`."""
    settings = {
        "precision": "float32",
        "network": "small",
        "hidden_units": (32,),
        "target_update_period": 7,
        "learning_rate": 1e-4,
    }
    config = preset("pong", **{**settings, **overrides})
    kind = FrameReplay if storage == "host" else functools.partial(DeviceReplay, device=device)
    replay = kind(400, n_step=config.n_step, gamma=config.gamma, seed=1)
    generator = np.random.default_rng(0)
    for time_step in range(300):
        frame = generator.integers(0, 255, (1, 84, 84), dtype=np.uint8)
        reward = float(generator.integers(-1, 2))
        replay.append(frame, [time_step % 6], [reward], [time_step % 50 == 49], [False], [time_step % 50 == 0])
    settings = LearnerSettings.from_config(config)
    units, dueling = config.hidden_units, config.dueling
    network = make_network(config.network, 4, (84, 84), 6, hidden_units=units, dueling=dueling, settings=settings)
    example = replay.empty_batch(at_once * config.batch_size)
    frames = getattr(replay, "frames", None)
    return Learner(network, settings, device, example, capture, frames), replay, config


# The value representations, with few outputs, and what may be combined with each.
DISTRIBUTIONS = {
    "categorical": {"num_atoms": 11, "value_min": -3.0, "value_max": 3.0},
    "hl_gauss": {"num_atoms": 11, "value_min": -3.0, "value_max": 3.0},
    "quantile": {"num_quantiles": 7},
    "implicit_quantile": {"num_taus": 5, "num_target_taus": 6, "num_action_taus": 4, "num_cosines": 8},
}
VALUES = [
    {"value": value, **DISTRIBUTIONS.get(value, {}), **others}
    for value in ("scalar", *DISTRIBUTIONS)
    for others in (
        {"double": False},
        {"double": True},
        {"double": False, "munchausen": True},
        {"double": False, "munchausen": True, "munchausen_policy": "online"},
    )
    if not (value == "categorical" and "munchausen" in others)
]


class Distribution(nn.Module):
    """(B, 2, 5) observations to (B, ACTIONS, ATOMS) logits, with batch normalization and, if `noise`, noise."""

    def __init__(self, noise=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Linear(10, 24), nn.BatchNorm1d(24)
        self.last = nn.Linear(24, ACTIONS * ATOMS)
        self.unused = nn.Parameter(torch.ones(2))
        self.size = noise
        self.register_buffer("support", torch.linspace(LOW, HIGH, ATOMS))
        self.register_buffer("noise", torch.zeros(24))

    def forward(self, obs):
        x = torch.relu(self.norm(self.first(obs.flatten(1))))
        if self.size:
            x = x * (1 + self.size * self.noise.normal_())
        return self.last(x).float().unflatten(1, (ACTIONS, ATOMS))


def of_distributions(online, target, batch):
    """Categorical DQN: cross entropy with the target's distribution, projected all at once (Bellemare et al. 2017)."""
    rows = torch.arange(len(batch.action), device=batch.action.device)
    with torch.no_grad():
        p_t = target(batch.next_obs).softmax(2)
        p_t = p_t[rows, (p_t * online.support).sum(2).argmax(1)]
        z = (batch.reward[:, None] + batch.discount[:, None] * online.support).clamp(LOW, HIGH)
        near = (z[:, None, :] - online.support[None, :, None]).abs() * ((ATOMS - 1) / (HIGH - LOW))
        goal = ((1 - near).clamp(min=0) * p_t[:, None, :]).sum(2)
    return -(goal * online(batch.obs)[rows, batch.action].log_softmax(1)).sum(1)


def fill(replay, shape):
    """Fill a replay buffer of one environment with noise."""
    generator = np.random.default_rng(0)
    for time_step in range(200):
        frame = generator.normal(size=(1, *shape)) if len(shape) == 1 else generator.integers(0, 255, (1, *shape))
        frame, reward = frame.astype(replay.dtype), float(generator.normal())
        replay.append(frame, [time_step % ACTIONS], [reward], [time_step % 50 == 49], [False], [time_step % 50 == 0])
    return replay


def make_custom(loss=of_distributions, at_once=1, device=CPU, capture=None, network=None, **settings):
    """Return a learner of vectors with a custom loss, and its replay buffer."""
    settings = LearnerSettings(**{"target_update_period": 7, "learning_rate": 1e-3, **settings, "batch_size": SIZE})
    replay = fill(FrameReplay(300, (5,), stack=2, n_step=3, dtype="float32", prioritized=True), (5,))
    example = replay.empty_batch(at_once * SIZE)
    return Learner(network or Distribution(), settings, device, example, capture, loss=loss), replay


def assert_equal_learners(one, other, **tolerance):
    """Compare networks, the optimizer's state and the number of updates."""
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name].cpu(), theirs[name].cpu(), **tolerance)


def copied(state):
    """Return a learner's state as a file would hold it: numbers without memory layouts."""
    return {name: value.clone().contiguous() for name, value in state.items()}


class Replayed:
    """Stands for a CUDA graph on the CPU: each call runs the function again."""

    def __init__(self, function, stream, pool=None, generator=None):
        self._function = function

    def __call__(self):
        return self._function()


def replay_on_the_cpu(learner_module, monkeypatch):
    """Make a learner on the CPU do all that it does for CUDA graphs, except for the capture. It needs a `_stream`."""
    packed = functools.partial(learner_module.HostToDevice, packed=True)
    monkeypatch.setattr(learner_module, "HostToDevice", packed)
    monkeypatch.setattr(learner_module, "Graph", Replayed)
    monkeypatch.setattr(learner_module, "warm_up", lambda function, stream: [function() for _ in range(3)])

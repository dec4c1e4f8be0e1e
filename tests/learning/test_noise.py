"""Noisy layers: their formula, their draws, and where noise is and is not."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from pydqn import FrameReplay, Learner, LearnerSettings
from pydqn.learning import learner as learner_module
from pydqn.learning.networks import make_network
from pydqn.learning.noise import Noise, NoisyLinear
from pydqn.learning.optimizers import TorchOptimizer
from pydqn.learning.policy import Actor, Policy
from tests.helpers.learners import CPU, DISTRIBUTIONS, assert_equal_learners, copied, fill, make, replay_on_the_cpu


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def slow(layer, x, e_in, e_out):
    """The published formula, with whole matrices of noise."""
    rows = []
    for row, a, b in zip(x, e_in, e_out, strict=True):
        weight = layer.mu.weight + layer.sigma.weight * torch.outer(b, a)
        rows.append(weight @ row + layer.mu.bias + layer.sigma.bias * b)
    return torch.stack(rows)


@pytest.mark.parametrize("rows", [1, 5])
def test_the_formula(rows):
    layer, x = NoisyLinear(4, 3), torch.randn(5, 4, generator=generator())
    noise = Noise(layer, rows, CPU)
    noise.draw(generator(1))
    ((e_in, e_out),) = noise._tensors
    assert e_in.shape == (rows, 4)
    with noise.applied():
        found = layer(x)
    torch.testing.assert_close(found, slow(layer, x, e_in.expand(5, -1), e_out.expand(5, -1)))
    assert torch.equal(layer(x), layer.mu(x))


def test_the_noise_is_the_signed_root_of_a_normal_number():
    noise = Noise(NoisyLinear(5000, 5000), 1, CPU)
    noise.draw(generator(3))
    drawn = torch.cat([tensor.flatten() for tensor in noise._tensors[0]])
    z = drawn.sign() * drawn**2
    assert abs(z.mean()) < 0.03
    assert z.std().item() == pytest.approx(1, abs=0.03)
    assert z.abs().median().item() == pytest.approx(0.6745, abs=0.03)


def test_initial_values():
    layer = NoisyLinear(100, 50, 0.3)
    for parameter in layer.mu.parameters():
        assert parameter.abs().max() <= 0.1
    assert layer.mu.weight.std().item() == pytest.approx(0.1 / math.sqrt(3), rel=0.05)
    for parameter in layer.sigma.parameters():
        assert torch.equal(parameter, torch.full_like(parameter, 0.03))


def noisy(value="scalar", **settings):
    settings = LearnerSettings(value=value, **DISTRIBUTIONS.get(value, {}), **settings)
    return make_network("mlp", 1, (4,), 3, hidden_units=(16,), dueling=True, settings=settings, noisy_sigma=0.5)


@pytest.mark.parametrize("value", ["scalar", *DISTRIBUTIONS])
def test_environments_explore_independently_and_anew_at_each_call(value):
    policy = Policy(noisy(value), CPU, "float32")
    same = np.ones((6, 1, 4), np.float32)
    actor = Actor(policy, same, seed=1)
    first, second = actor.values(same).copy(), actor.values(same).copy()
    for values in (first, second):
        assert len(np.unique(values[:, 0])) == 6
    assert not np.isclose(first, second).any()
    assert np.array_equal(Actor(policy, same, seed=1).values(same), first)
    assert not np.isclose(Actor(policy, same, seed=2).values(same), first).any()
    # Evaluations have the means: no noise, also right after acting.
    assert np.array_equal(policy.values(same), policy.values(same))
    assert np.ptp(policy.values(same)[:, 0]) < 1e-6  # some processors round rows of a batch differently


def test_levels_of_one_sample_have_its_noise():
    network = noisy("implicit_quantile")
    noise, obs = Noise(network, 2, CPU), torch.ones(2, 1, 4)
    noise.draw(generator())
    tau = torch.tensor([[0.1, 0.5, 0.9]] * 2)
    with noise.applied():
        both = network.outputs(obs, tau)
    for number in range(2):
        alone = Noise(network, 1, CPU)
        for (one_in, one_out), (e_in, e_out) in zip(alone._tensors, noise._tensors, strict=True):
            one_in.copy_(e_in[number : number + 1])
            one_out.copy_(e_out[number : number + 1])
        with alone.applied():
            torch.testing.assert_close(network.outputs(obs[:1], tau[:1])[0], both[number])
    assert not torch.allclose(both[0], both[1])


def test_updates_draw_for_both_networks_and_learn_the_noise(monkeypatch):
    settings = LearnerSettings(batch_size=8)
    replay = fill(FrameReplay(300, (4,), stack=1, dtype="float32"), (4,))
    learner = Learner(noisy(), settings, CPU, replay.empty_batch(8), seed=5)
    drawn, real = [], Noise.draw

    def draw(noise, generator):
        real(noise, generator)
        drawn.append(noise._tensors[0][0].clone())

    monkeypatch.setattr(Noise, "draw", draw)
    before = {name: value.clone() for name, value in learner.online.state_dict().items()}
    for _ in range(3):
        learner.update(replay.sample(8))
    assert len(drawn) == 6
    for i, one in enumerate(drawn):
        assert not any(torch.equal(one, other) for other in drawn[:i])
    changed = {name for name, value in learner.online.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == set(before)
    assert any("sigma" in name for name in changed)
    obs = torch.ones(1, 1, 4)
    assert torch.equal(learner.online(obs), learner.online(obs))  # nothing is left of it


def test_noisy_layers_of_a_network_of_ones_own():
    network = torch.nn.Sequential(torch.nn.Flatten(), NoisyLinear(4, 8), torch.nn.ReLU(), NoisyLinear(8, 3))
    replay = fill(FrameReplay(300, (4,), stack=1, dtype="float32"), (4,))
    learner = Learner(network, LearnerSettings(batch_size=8), CPU, replay.empty_batch(8))
    before = network[1].sigma.weight.clone()
    learner.update(replay.sample(8))
    assert not torch.equal(learner.online[1].sigma.weight, before)
    same = np.ones((4, 1, 4), np.float32)
    assert len(np.unique(Actor(learner.policy, same).values(same)[:, 0])) == 4


def test_the_update_is_that_of_the_noisy_networks():
    """Against a plain step with the same noise."""
    replay = fill(FrameReplay(300, (4,), stack=1, dtype="float32"), (4,))
    learner = Learner(noisy(), LearnerSettings(batch_size=8, double=True), CPU, replay.empty_batch(8), seed=5)
    online, target = copy.deepcopy(learner.online), copy.deepcopy(learner.target)
    noises, drawn = [Noise(net, 1, CPU) for net in (online, target)], generator(5)
    for noise in noises:
        noise.draw(drawn)
    batch = replay.sample(8)
    obs, next_obs, action = map(torch.tensor, (batch.obs, batch.next_obs, batch.action))
    with noises[0].applied(), noises[1].applied():
        q = online(obs).gather(1, action[:, None]).squeeze(1)
        with torch.no_grad():
            best = online(next_obs).argmax(1, keepdim=True)
            goal = torch.tensor(batch.reward) + torch.tensor(batch.discount) * target(next_obs).gather(1, best).squeeze(
                1
            )
    torch.nn.functional.huber_loss(q, goal).backward()
    learner.update(batch)
    for one, other in zip(learner.online.parameters(), online.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_preparing_a_capture_changes_nothing(monkeypatch, precision):
    monkeypatch.setattr(learner_module, "make_optimizer", TorchOptimizer)

    def made(**more):
        _, replay, config = make(precision=precision, **more)
        units, dueling = config.hidden_units, config.dueling
        network = make_network(config.network, 4, (84, 84), 6, hidden_units=units, dueling=dueling, noisy_sigma=0.5)
        example = replay.empty_batch(more.get("at_once", 1) * config.batch_size)
        return Learner(network, LearnerSettings.from_config(config), CPU, example), replay

    eager, replay = made()
    replay_on_the_cpu(learner_module, monkeypatch)
    captured, same_replay = made(at_once=2)
    captured._stream = "a stream"
    for _ in range(4):
        for _ in range(2):
            eager.update(replay.sample(32))
        captured.update(same_replay.sample(64))
    assert_equal_learners(eager, captured, rtol=0, atol=0)
    restored, _ = made()
    restored.load_state_dict(copied(eager.state_dict()))
    batch = replay.sample(32)
    for learner in (eager, restored):
        learner.update(batch)
    assert_equal_learners(eager, restored, rtol=0, atol=0)


def test_noise_fades_where_it_does_not_help():
    """A regression to a constant: sigma shrinks, since noise is only an error there."""
    layer = NoisyLinear(3, 1, 0.5)
    noise, drawn, x = Noise(layer, 1, CPU), generator(), torch.ones(16, 3)
    optimizer = torch.optim.Adam(layer.parameters(), 0.01)
    for _ in range(1500):
        noise.draw(drawn)
        with noise.applied():
            loss = ((layer(x) - 2.0) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert layer.sigma.weight.abs().max() < 0.1
    assert layer(x)[0].item() == pytest.approx(2, abs=0.1)

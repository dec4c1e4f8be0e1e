from __future__ import annotations

import copy
from unittest import mock

import numpy as np
import pytest
import torch

from pydqn import FrameReplay, Learner, preset
from pydqn.checkpoint import load_weights, save_weights
from pydqn.learner import Policy, resolve_device, resolve_precision
from pydqn.networks import make_network

CPU = torch.device("cpu")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def make(device=CPU, capture=None, **overrides):
    settings = {
        "precision": "float32",
        "network": "small",
        "hidden_units": (32,),
        "target_sync_updates": 7,
        "learning_rate": 1e-4,
    }
    config = preset("pong", **{**settings, **overrides})
    replay = FrameReplay(400, n_step=config.n_step, gamma=config.gamma, seed=1)
    generator = np.random.default_rng(0)
    for tick in range(300):
        frame = generator.integers(0, 255, (1, 84, 84), dtype=np.uint8)
        reward = float(generator.integers(-1, 2))
        replay.append(frame, [tick % 6], [reward], [tick % 50 == 49], [False], [tick % 50 == 0])
    network = make_network(config.network, 4, (84, 84), 6, hidden_units=config.hidden_units, dueling=config.dueling)
    learner = Learner(network, config, device, replay.empty_batch(config.batch_size), capture)
    return learner, replay, config


def parameters(module):
    return [parameter.detach().clone().cpu() for parameter in module.parameters()]


@pytest.mark.parametrize(
    "variant",
    [
        {"double": True, "dueling": True, "n_step": 3, "loss": "huber", "optimizer": "adam"},
        {"double": False, "dueling": False, "n_step": 1, "loss": "mse", "optimizer": "rmsprop"},
        {"double": True, "dueling": False, "n_step": 1, "loss": "mse", "optimizer": "adam", "max_grad_norm": 0.1},
        {"dueling": True, "n_step": 2, "loss": "huber", "rmsprop_momentum": 0.9, "optimizer": "rmsprop"},
    ],
)
def test_updates_equal_a_plain_training_step(variant):
    learner, replay, config = make(**variant)
    online, target = copy.deepcopy(learner.online), copy.deepcopy(learner.target)
    if config.optimizer == "adam":
        optimizer = torch.optim.Adam(online.parameters(), lr=config.learning_rate, eps=config.optimizer_epsilon)
    else:
        optimizer = torch.optim.RMSprop(
            online.parameters(),
            lr=config.learning_rate,
            alpha=config.rmsprop_decay,
            eps=config.optimizer_epsilon,
            momentum=config.rmsprop_momentum,
        )
    for update in range(1, 21):
        batch = replay.sample(config.batch_size)
        obs, next_obs = torch.tensor(batch.obs), torch.tensor(batch.next_obs)
        with torch.no_grad():
            q_t = target(next_obs)
            chosen = (online(next_obs) if config.double else q_t).argmax(dim=1)
            y = torch.tensor(batch.reward) + torch.tensor(batch.discount) * q_t[torch.arange(len(q_t)), chosen]
        q = online(obs)[torch.arange(len(y)), torch.tensor(batch.action)]
        loss = {"huber": torch.nn.functional.huber_loss, "mse": torch.nn.functional.mse_loss}[config.loss](q, y)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(online.parameters(), config.max_grad_norm)
        optimizer.step()
        if update % config.target_sync_updates == 0:
            target.load_state_dict(online.state_dict())
        learner.update(batch)
        assert learner.updates == update
        metrics = learner.metrics()
        np.testing.assert_allclose(metrics.loss, loss.item(), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(metrics.mean_q, q.mean().item(), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(metrics.grad_norm, norm.item(), rtol=1e-2, atol=1e-5)
    for ours, theirs in zip(learner.online.parameters(), online.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=5e-5)  # 20 updates moved them by up to 2e-3
    for ours, theirs in zip(learner.target.parameters(), target.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_the_target_moves_only_when_it_is_due():
    learner, replay, _ = make(target_sync_updates=3)
    start = parameters(learner.target)
    for update in range(1, 8):
        before = parameters(learner.target)
        learner.update(replay.sample(32))
        moved = not all(map(torch.equal, before, parameters(learner.target)))
        assert moved == (update % 3 == 0)
    assert not all(map(torch.equal, start, parameters(learner.target)))


def test_the_learning_rate_can_change_at_any_time():
    learner, replay, _ = make()
    learner.update(replay.sample(32))
    learner.learning_rate = 0.0
    before = parameters(learner.online)
    learner.update(replay.sample(32))
    assert all(map(torch.equal, before, parameters(learner.online)))
    learner.learning_rate = 1e-3
    learner.update(replay.sample(32))
    assert not all(map(torch.equal, before, parameters(learner.online)))
    assert learner.learning_rate == pytest.approx(1e-3)


def test_weights_of_the_batch_scale_the_loss():
    learner, replay, _ = make()
    batch = replay.sample(32)
    learner.update(batch._replace(weight=np.zeros(32, np.float32)))
    assert learner.metrics().loss == 0
    assert learner.metrics().grad_norm == 0


def test_errors_are_those_of_the_samples_whatever_their_weights():
    """A loss, or one with its weights, would be the wrong priority."""
    learner, replay, _ = make(double=False, n_step=1)
    batch = replay.sample(32)
    obs, next_obs = torch.tensor(batch.obs), torch.tensor(batch.next_obs)
    with torch.no_grad():
        y = torch.tensor(batch.reward) + torch.tensor(batch.discount) * learner.target(next_obs).max(dim=1).values
        q = learner.online(obs)[torch.arange(32), torch.tensor(batch.action)]
    learner.update(batch._replace(weight=np.zeros(32, np.float32)))
    np.testing.assert_allclose(learner.errors(), (y - q).abs().numpy(), rtol=1e-3, atol=1e-5)
    assert learner.errors().max() > 0.1


def test_a_network_of_ones_own():
    """Any module from observations to action values will do."""
    _, replay, config = make()

    class Mean(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(4, 6)

        def forward(self, obs):
            return self.linear(obs.float().mean(dim=(2, 3)) / 255)

    learner = Learner(Mean(), config, CPU, replay.empty_batch(32))
    before = parameters(learner.online)
    learner.update(replay.sample(32))
    assert not all(map(torch.equal, before, parameters(learner.online)))


def test_every_lane_tosses_its_own_coin():
    learner, _, _ = make()
    obs = np.random.default_rng(0).integers(0, 255, (64, 4, 84, 84), dtype=np.uint8)
    policy = learner.policy
    greedy = policy.values(obs).argmax(axis=1)
    np.testing.assert_array_equal(policy.act(obs, 0.0, np.random.default_rng(1)), greedy)
    explored = policy.act(obs, 0.5, np.random.default_rng(1)) != greedy
    assert 10 < explored.sum() < 45
    assert len(set(policy.act(obs, 1.0, np.random.default_rng(1)).tolist())) == 6


@pytest.mark.parametrize("name", ["tpu", "cuda:99", "mps", "", "cuda:x"])
def test_devices_that_are_not_there(name):
    with pytest.raises(ValueError, match="^device: "):
        resolve_device(name)


def test_capture_needs_cuda():
    with pytest.raises(ValueError, match="^capture: "):
        make(capture=True)


def test_precision():
    assert resolve_precision("float32", CPU) == torch.float32
    assert resolve_precision("bfloat16", CPU) == torch.bfloat16
    with mock.patch("pydqn.learner._bfloat16_pays", return_value=True):
        assert resolve_precision("auto", CPU) == torch.bfloat16
        assert resolve_precision("auto", torch.device("cuda")) == torch.float32
    with mock.patch("pydqn.learner._bfloat16_pays", return_value=False):
        assert resolve_precision("auto", CPU) == torch.float32
    assert resolve_precision("auto", CPU) in (torch.float32, torch.bfloat16)


def test_bfloat16_learns_about_the_same_and_with_all_its_parameters():
    exact, replay, _ = make(double=True, dueling=True)
    rough, _, _ = make(double=True, dueling=True, precision="bfloat16")
    before = parameters(rough.online)
    for _ in range(10):
        batch = replay.sample(32)
        exact.update(batch)
        rough.update(batch)
    np.testing.assert_allclose(rough.metrics().loss, exact.metrics().loss, rtol=0.1)
    assert not any(map(torch.equal, before, parameters(rough.online)))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["adam", "rmsprop", "rmsprop_tf", "rmsprop_centered"])
def test_a_restored_learner_goes_on_as_the_saved_one(tmp_path, optimizer, precision):
    saved, replay, _ = make(optimizer=optimizer, precision=precision, double=True)
    for _ in range(10):  # the target has moved once since
        saved.update(replay.sample(32))
    save_weights(tmp_path / "state.safetensors", saved.state(), {})
    tensors, _ = load_weights(tmp_path / "state.safetensors")
    restored, _, _ = make(optimizer=optimizer, precision=precision, double=True)
    restored.restore(tensors, saved.updates)
    for _ in range(6):  # the target moves again
        batch = replay.sample(32)
        saved.update(batch)
        restored.update(batch)
        assert saved.metrics() == restored.metrics()
    assert saved.state().keys() == restored.state().keys()
    for name, value in saved.state().items():
        assert torch.equal(value, restored.state()[name]), name


def test_what_acts_is_what_learned():
    """The copies in bfloat16 follow the parameters, and the policy sees them."""
    learner, replay, _ = make(precision="bfloat16")
    obs = replay.sample(32).obs
    before = learner.policy.values(obs)
    for _ in range(3):
        learner.update(replay.sample(32))
    values = learner.policy.values(obs)
    assert not np.array_equal(before, values)
    fresh = Policy(copy.deepcopy(learner.online), CPU, "bfloat16")
    np.testing.assert_array_equal(values, fresh.values(obs))


@needs_cuda
@pytest.mark.parametrize("optimizer", ["adam", "rmsprop", "rmsprop_tf", "rmsprop_centered"])
def test_captured_equals_eager(optimizer):
    """1,000 updates, the learning rate changing: parameters and the optimizer's state agree."""
    device = torch.device("cuda")
    (eager, replay, _), (captured, _, _) = (
        make(device, capture, optimizer=optimizer, double=True, dueling=True, n_step=3) for capture in (False, True)
    )
    for update in range(1000):
        batch = replay.sample(32)
        for learner in (eager, captured):
            learner.learning_rate = 1e-4 * (1 + update % 10)
            learner.update(batch)
    for ours, theirs in zip(captured.online.parameters(), eager.online.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    for ours, theirs in zip(captured.target.parameters(), eager.target.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    states = zip(captured._optimizer.state(), eager._optimizer.state(), strict=True)
    for ours, theirs in states:
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-2, atol=1e-4)


def test_buffers_reach_the_target_too():
    _, replay, config = make(target_sync_updates=2)
    network = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.BatchNorm1d(4 * 84 * 84), torch.nn.Linear(4 * 84 * 84, 6)
    )
    network.prepare = lambda obs: obs.float()
    learner = Learner(network, config, CPU, replay.empty_batch(32))
    for _ in range(2):
        learner.update(replay.sample(32))
    for ours, theirs in zip(learner.target.buffers(), learner.online.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


@needs_cuda
def test_capturing_changes_nothing():
    learner, replay, _ = make(torch.device("cuda"), True)
    twin, _, _ = make(torch.device("cuda"), False)
    batch = replay.sample(32)
    learner.update(batch)
    twin.update(batch)
    for ours, theirs in zip(learner.online.parameters(), twin.online.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@needs_cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_the_steady_state_never_synchronizes():
    learner, replay, _ = make(torch.device("cuda"), True)
    learner.update(replay.sample(32))
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(20):
            learner.update(replay.sample(32))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_policy_acts_alone():
    network = make_network("mlp", 1, (4,), 2, hidden_units=(8,))
    values = Policy(network, CPU).values(np.zeros((3, 1, 4), np.float32))
    assert values.shape == (3, 2)
    assert values.dtype == np.float32

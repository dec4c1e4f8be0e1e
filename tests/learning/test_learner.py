from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch

from pydqn import FrameReplay, Learner, preset
from pydqn._util.weights import load_weights, save_weights
from pydqn.learning import learner as learner_room
from pydqn.learning.networks import make_network
from pydqn.learning.optimizers import Kernels
from pydqn.learning.policy import Policy
from pydqn.replay.device import DeviceReplay

CPU = torch.device("cpu")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def make(device=CPU, capture=None, at_once=1, storage="host", **overrides):
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
    network = make_network(config.network, 4, (84, 84), 6, hidden_units=config.hidden_units, dueling=config.dueling)
    example = replay.empty_batch(at_once * config.batch_size)
    learner = Learner(network, config, device, example, capture, getattr(replay, "frames", None))
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
        if update % config.target_update_period == 0:
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
    learner, replay, _ = make(target_update_period=3)
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


def test_capture_needs_cuda():
    with pytest.raises(ValueError, match="^capture: "):
        make(capture=True)


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


def assert_equal_learners(one, other, **tolerance):
    """Networks, and what the optimizer remembers."""
    ours, theirs = one.state(), other.state()
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name].cpu(), theirs[name].cpu(), **tolerance)


@pytest.mark.parametrize("storage", ["host", "device"])
def test_several_steps_at_once_are_the_same_steps(storage):
    """With copies to the target network in between, and where rows stand for observations."""
    plain, replay, _ = make(double=True, n_step=3)
    several, same_replay, _ = make(double=True, n_step=3, at_once=5, storage=storage)
    errors, at_once = [], []
    for count in (5, 5, 3, 1, 5):
        for _ in range(count):
            plain.update(replay.sample(32))
            errors.extend(plain.errors())
        several.update(same_replay.sample(32 * count))
        at_once.extend(several.errors())
    assert plain.updates == several.updates == 19
    np.testing.assert_array_equal(errors, at_once)
    assert_equal_learners(plain, several, rtol=0, atol=0)
    np.testing.assert_array_equal(plain.samples()[1], several.samples()[1])
    assert plain.metrics() == several.metrics()


@pytest.mark.parametrize("size", [0, 31, 33, 96])
def test_a_batch_is_a_whole_number_of_batches(size):
    learner, replay, _ = make(at_once=2)
    batch = type(replay.empty_batch(1))(*(part[:0] for part in replay.empty_batch(1)))
    with pytest.raises(ValueError, match=rf"^batch: expected 1 to 2 times 32 transitions .*, got {size}$"):
        learner.update(replay.sample(size) if size else batch)
    assert learner.updates == 0


class Replayed:
    """Stands for a CUDA graph on the CPU: whatever is called again and again is this function, with these tensors."""

    def __init__(self, function, stream, pool):
        self._function = function

    def __call__(self):
        return self._function()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("restored", [False, True])
@pytest.mark.parametrize("optimizer", ["adam", "rmsprop_tf", "rmsprop_centered"])
def test_what_a_capture_does_changes_nothing(monkeypatch, optimizer, restored, precision):
    """All but the recording: batches through packed memory, steps before the capture undone, graphs by length."""
    monkeypatch.setattr(learner_room, "make_optimizer", Kernels)
    variant = {"double": True, "optimizer": optimizer, "precision": precision}
    eager, replay, _ = make(**variant)
    monkeypatch.setattr(learner_room, "HostToDevice", functools.partial(learner_room.HostToDevice, packs=True))
    monkeypatch.setattr(learner_room, "Graph", Replayed)
    monkeypatch.setattr(learner_room, "warm_up", lambda function, stream: [function() for _ in range(3)])
    captured, same_replay, _ = make(**variant, at_once=4, storage="device")
    captured._stream = "a stream"
    if restored:
        for _ in range(7):
            eager.update(replay.sample(32))
            same_replay.sample(32)
        captured.restore({name: value.clone() for name, value in eager.state().items()}, eager.updates)
    for number in range(12):
        for learner in (eager, captured):
            learner.learning_rate = 1e-4 * (1 + number % 3)
        for _ in range(4):
            eager.update(replay.sample(32))
        captured.update(same_replay.sample(128))
    assert eager.updates == captured.updates == 48 + 7 * restored
    assert_equal_learners(eager, captured, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="^restore: expected a learner that has made no update"):
        captured.restore(eager.state(), 0)
    # Four at once; and wherever a copy to the target falls into the four, one at a time.
    assert sorted(captured._graphs) == [(0, 1), (0, 4), (1, 1), (2, 1), (3, 1)]


@needs_cuda
@pytest.mark.parametrize("storage", ["host", "device"])
@pytest.mark.parametrize("optimizer", ["adam", "rmsprop", "rmsprop_tf", "rmsprop_centered"])
def test_captured_equals_eager(monkeypatch, optimizer, storage):
    """1,000 updates, the learning rate changing: parameters and the optimizer's state agree."""
    device = torch.device("cuda")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    if hasattr(torch.backends.cudnn, "conv"):
        monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee")
    else:  # PyTorch before 2.9
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    variant = {"optimizer": optimizer, "double": True, "dueling": True, "n_step": 3, "storage": storage}
    eager, replay, _ = make(device, False, **variant)
    captured, same_replay, _ = make(device, True, at_once=4, **variant)
    for update in range(250):
        for learner in (eager, captured):
            learner.learning_rate = 1e-4 * (1 + update % 10)
        for _ in range(4):
            eager.update(replay.sample(32))
        captured.update(same_replay.sample(128))
    assert_equal_learners(eager, captured, rtol=1e-2, atol=1e-4)


def test_buffers_reach_the_target_too():
    _, replay, config = make(target_update_period=2)
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
    """All of a step but acting, whose answer has to come."""
    learner, replay, _ = make(torch.device("cuda"), True, at_once=4, storage="device", prioritized=True)
    for _ in range(14):  # graphs of all lengths
        learner.update(replay.sample(128))
    frame = np.zeros((1, 84, 84), np.uint8)
    try:
        torch.cuda.set_sync_debug_mode("error")
        for number in range(20):
            replay.append(frame, [0], [0.0], [False], [False], [False])
            learner.learning_rate = 1e-4 * (1 + number % 3)
            learner.update(replay.sample(128))
            assert len(learner.errors()) == 128
    finally:
        torch.cuda.set_sync_debug_mode("default")

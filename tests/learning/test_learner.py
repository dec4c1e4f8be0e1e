from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from pydqn import Config, Learner, LearnerSettings, preset
from pydqn._util.weights import load_weights, save_weights
from pydqn.learning import learner as learner_module
from pydqn.learning.optimizers import TorchOptimizer
from pydqn.learning.policy import Policy
from pydqn.learning.statistics import Statistics
from tests.helpers.learners import CPU, assert_equal_learners, copied, make, needs_cuda, replay_on_the_cpu


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
        statistics = learner.statistics()
        np.testing.assert_allclose(statistics.loss, loss.item(), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(statistics.mean_q, q.mean().item(), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(statistics.grad_norm, norm.item(), rtol=1e-2, atol=1e-5)
    for ours, theirs in zip(learner.online.parameters(), online.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=5e-5)  # 20 updates moved them by up to 2e-3
    for ours, theirs in zip(learner.target.parameters(), target.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_the_target_network_changes_only_in_its_period():
    learner, replay, _ = make(target_update_period=3)
    start = parameters(learner.target)
    for update in range(1, 8):
        before = parameters(learner.target)
        learner.update(replay.sample(32))
        changed = not all(map(torch.equal, before, parameters(learner.target)))
        assert changed == (update % 3 == 0)
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
    assert learner.statistics().loss == 0
    assert learner.statistics().grad_norm == 0


def test_td_errors_do_not_depend_on_the_weights_of_the_samples():
    """Losses, or weighted errors, would be wrong priorities."""
    learner, replay, _ = make(double=False, n_step=1)
    batch = replay.sample(32)
    obs, next_obs = torch.tensor(batch.obs), torch.tensor(batch.next_obs)
    with torch.no_grad():
        y = torch.tensor(batch.reward) + torch.tensor(batch.discount) * learner.target(next_obs).max(dim=1).values
        q = learner.online(obs)[torch.arange(32), torch.tensor(batch.action)]
    learner.update(batch._replace(weight=np.zeros(32, np.float32)))
    np.testing.assert_allclose(learner.td_errors(), (y - q).abs().numpy(), rtol=1e-3, atol=1e-5)
    assert learner.td_errors().max() > 0.1


def test_any_module_from_observations_to_action_values_will_do():
    _, replay, config = make()

    class Mean(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(4, 6)

        def forward(self, obs):
            return self.linear(obs.float().mean(dim=(2, 3)) / 255)

    learner = Learner(Mean(), LearnerSettings.from_config(config), CPU, replay.empty_batch(32))
    before = parameters(learner.online)
    learner.update(replay.sample(32))
    assert not all(map(torch.equal, before, parameters(learner.online)))


def test_settings_have_the_defaults_and_the_checks_of_a_config():
    assert LearnerSettings() == LearnerSettings.from_config(Config())
    assert LearnerSettings.from_config(preset("pong", batch_size=7, double=True)).batch_size == 7
    assert LearnerSettings(batch_size=10**6).batch_size == 10**6  # not limited by a replay buffer
    for name, value in (("loss", "l1"), ("batch_size", 0), ("rmsprop_decay", 2.0), ("learning_rate", 0.0)):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            LearnerSettings(**{name: value})


def test_before_the_first_update_there_are_no_statistics():
    learner, _, _ = make()
    np.testing.assert_equal(learner.statistics(), Statistics.nothing())
    assert learner.td_errors().shape == (0,)


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
    np.testing.assert_allclose(rough.statistics().loss, exact.statistics().loss, rtol=0.1)
    assert not any(map(torch.equal, before, parameters(rough.online)))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "rmsprop", "rmsprop_tf", "rmsprop_centered"])
def test_a_restored_learner_goes_on_as_the_saved_one(tmp_path, optimizer, precision):
    saved, replay, _ = make(optimizer=optimizer, precision=precision, double=True)
    for _ in range(10):  # with one target network update
        saved.update(replay.sample(32))
    save_weights(tmp_path / "state.safetensors", saved.state_dict(), {})
    restored, _, _ = make(optimizer=optimizer, precision=precision, double=True)
    restored.load_state_dict(load_weights(tmp_path / "state.safetensors")[0])
    assert restored.updates == 10
    for _ in range(6):  # with another one
        batch = replay.sample(32)
        saved.update(batch)
        restored.update(batch)
        np.testing.assert_equal(saved.statistics(), restored.statistics())
    assert_equal_learners(saved, restored, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer.99.step": torch.ones(())}, "does not fit the config .'optimizer.99.step' is of no parameter"),
        ({"online.other": torch.ones(())}, "does not fit the config .Unexpected key"),
        ({"other.weight": torch.ones(())}, "'other.weight' is not part of a learner"),
        ({"updates": torch.ones(2)}, "expected 'updates' to be one number"),
        ({"updates": None}, "expected 'updates' to be one number"),
    ],
)
def test_a_state_that_is_not_the_learners_is_refused(changes, message):
    learner, _, _ = make()
    state = {name: value for name, value in (learner.state_dict() | changes).items() if value is not None}
    with pytest.raises(ValueError, match=f"^checkpoint: {message}"):
        learner.load_state_dict(state)


def test_the_policy_has_the_learned_weights():
    """The copies in bfloat16 follow the parameters, and the policy uses them."""
    learner, replay, _ = make(precision="bfloat16")
    obs = replay.sample(32).obs
    before = learner.policy.values(obs)
    for _ in range(3):
        learner.update(replay.sample(32))
    values = learner.policy.values(obs)
    assert not np.array_equal(before, values)
    fresh = Policy(copy.deepcopy(learner.online), CPU, "bfloat16")
    np.testing.assert_array_equal(values, fresh.values(obs))


@pytest.mark.parametrize("storage", ["host", "device"])
def test_several_steps_at_once_are_the_same_steps(storage):
    """With target network updates in between, and with row numbers in place of observations."""
    plain, replay, _ = make(double=True, n_step=3)
    several, same_replay, _ = make(double=True, n_step=3, at_once=5, storage=storage)
    errors, at_once = [], []
    for count in (5, 5, 3, 1, 5):
        for _ in range(count):
            plain.update(replay.sample(32))
            errors.extend(plain.td_errors())
        several.update(same_replay.sample(32 * count))
        at_once.extend(several.td_errors())
    assert plain.updates == several.updates == 19
    np.testing.assert_array_equal(errors, at_once)
    assert_equal_learners(plain, several, rtol=0, atol=0)
    np.testing.assert_equal(plain.statistics(), several.statistics())


@pytest.mark.parametrize("size", [0, 31, 33, 96])
def test_a_batch_is_a_whole_number_of_batches(size):
    learner, replay, _ = make(at_once=2)
    batch = type(replay.empty_batch(1))(*(part[:0] for part in replay.empty_batch(1)))
    with pytest.raises(ValueError, match=rf"^batch: expected 1 to 2 times 32 transitions .*, got {size}$"):
        learner.update(replay.sample(size) if size else batch)
    assert learner.updates == 0


@pytest.mark.parametrize(("precision", "restored"), [("float32", True), ("bfloat16", False)])
@pytest.mark.parametrize("optimizer", ["adam", "rmsprop_tf", "rmsprop_centered"])
def test_preparing_a_capture_changes_nothing(monkeypatch, optimizer, restored, precision):
    """All but the capture: batches through the packed buffer, warm-up steps undone, graphs by length."""
    monkeypatch.setattr(learner_module, "make_optimizer", TorchOptimizer)
    variant = {"double": True, "optimizer": optimizer, "precision": precision}
    eager, replay, _ = make(**variant)
    replay_on_the_cpu(learner_module, monkeypatch)
    captured, same_replay, _ = make(**variant, at_once=4, storage="device")
    captured._stream = "a stream"
    if restored:
        for _ in range(7):
            eager.update(replay.sample(32))
            same_replay.sample(32)
        captured.load_state_dict(copied(eager.state_dict()))
    for number in range(7):  # until the target network's period of 7 has met each of the four steps
        for learner in (eager, captured):
            learner.learning_rate = 1e-4 * (1 + number % 3)
        for _ in range(4):
            eager.update(replay.sample(32))
        captured.update(same_replay.sample(128))
    assert eager.updates == captured.updates == 28 + 7 * restored
    assert_equal_learners(eager, captured, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="^load_state_dict: expected a learner that has captured no CUDA graph"):
        captured.load_state_dict(eager.state_dict())
    # Four at once, or one at a time when the target network is updated between them.
    assert sorted(captured._graphs) == [(0, 1), (0, 4), (1, 1), (2, 1), (3, 1)]


@needs_cuda
@pytest.mark.parametrize("storage", ["host", "device"])
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "rmsprop", "rmsprop_tf", "rmsprop_centered"])
def test_captured_equals_eager(monkeypatch, optimizer, storage):
    """1,000 updates with a changing learning rate: parameters and the optimizer's state agree."""
    device = torch.device("cuda")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    if hasattr(torch.backends.cudnn, "conv"):
        monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee")
    else:  # PyTorch before 2.9
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    variant = {"optimizer": optimizer, "double": True, "dueling": True, "n_step": 3, "storage": storage}
    variant |= {"update": "plain", "pixel_mean": 0.0}
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
    learner = Learner(network, LearnerSettings.from_config(config), CPU, replay.empty_batch(32))
    for _ in range(2):
        learner.update(replay.sample(32))
    for ours, theirs in zip(learner.target.buffers(), learner.online.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


@needs_cuda
def test_capturing_changes_nothing():
    learner, replay, _ = make(torch.device("cuda"), True, update="plain")
    eager, _, _ = make(torch.device("cuda"), False)
    batch = replay.sample(32)
    learner.update(batch)
    eager.update(batch)
    for ours, theirs in zip(learner.online.parameters(), eager.online.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@needs_cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_the_steady_state_never_synchronizes():
    """Everything in a step but acting, which waits for the action values."""
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
            assert len(learner.td_errors()) == 128
    finally:
        torch.cuda.set_sync_debug_mode("default")

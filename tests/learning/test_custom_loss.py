"""The learner with a custom network and a custom loss."""

from __future__ import annotations

import copy
import functools
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pydqn import FrameReplay, Learner, LearnerSettings
from pydqn._util.weights import load_weights, save_weights
from pydqn.learning import learner as learner_module
from pydqn.learning.losses import huber
from pydqn.learning.networks import make_network
from pydqn.learning.optimizers import TorchOptimizer
from pydqn.replay.device import DeviceReplay
from tests.helpers.learners import (
    ACTIONS,
    ATOMS,
    CPU,
    HIGH,
    LOW,
    SIZE,
    Distribution,
    assert_equal_learners,
    copied,
    fill,
    needs_cuda,
    of_distributions,
    replay_on_the_cpu,
)
from tests.helpers.learners import make_custom as make


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def of_td_errors(online, target, batch, *, double=False, kind="huber_loss"):
    """The built-in loss as a custom loss."""
    q = online(batch.obs).gather(1, batch.action[:, None])[:, 0]
    with torch.no_grad():
        q_t = target(batch.next_obs)
        chosen = (online(batch.next_obs) if double else q_t).argmax(1, keepdim=True)
        goal = batch.reward + batch.discount * q_t.gather(1, chosen)[:, 0]
    return getattr(nn.functional, kind)(q, goal, reduction="none")


def train(learner, replay, updates):
    """Take updates with different priorities, so that importance weights differ."""
    for _ in range(updates):
        batch = replay.sample(SIZE)
        learner.update(batch)
        replay.update_priorities(batch.index, 0.5 + batch.index % 7)
    assert batch.weight.min() < 0.9


@pytest.mark.parametrize("storage", ["host", "device"])
@pytest.mark.parametrize(
    "variant",
    [
        {"double": True, "loss": "huber", "optimizer": "adam"},
        {"double": False, "loss": "huber", "optimizer": "rmsprop_centered", "max_grad_norm": 0.1},
        {"double": True, "loss": "mse", "optimizer": "rmsprop_tf", "max_grad_norm": 0.0},
    ],
)
def test_the_built_in_loss_as_a_custom_loss_gives_the_same(variant, storage):
    """With prepared pixels, n-step discounts, importance weights, row numbers in place of observations."""
    kind = {"host": FrameReplay, "device": functools.partial(DeviceReplay, device="cpu")}[storage]
    settings = LearnerSettings(batch_size=SIZE, target_update_period=7, precision="float32", **variant)
    custom_loss = functools.partial(of_td_errors, double=settings.double, kind=f"{settings.loss}_loss")
    learners = []
    for loss in (None, custom_loss):
        replay = fill(kind(300, (40, 40), n_step=3, prioritized=True, seed=1), (40, 40))
        network = make_network("small", 4, (40, 40), ACTIONS, hidden_units=(32,), dueling=True)
        frames = getattr(replay, "frames", None)
        learners.append(Learner(network, settings, CPU, replay.empty_batch(SIZE), frames=frames, loss=loss))
        train(learners[-1], replay, 30)
    built_in, custom = learners
    assert_equal_learners(built_in, custom, rtol=1e-3, atol=2e-5)  # 30 updates changed them by up to 3e-3
    assert custom.updates == built_in.updates == 30
    error = torch.from_numpy(built_in.td_errors())
    expected = huber(error) if settings.loss == "huber" else error**2
    np.testing.assert_allclose(custom.td_errors(), expected, rtol=1e-2, atol=1e-4)
    ours, theirs = custom.statistics(), built_in.statistics()
    np.testing.assert_allclose([ours.loss, ours.grad_norm], [theirs.loss, theirs.grad_norm], rtol=1e-2)
    losses, expected = ours.samples["loss_per_sample"], theirs.samples["loss_per_sample"]
    np.testing.assert_allclose(losses, expected, rtol=1e-2, atol=1e-4)


def project(p, z):
    """The projection of one distribution, atom by atom, as in algorithm 1 of Bellemare et al. 2017."""
    out, step = np.zeros(ATOMS), (HIGH - LOW) / (ATOMS - 1)
    for share, value in zip(p, np.clip(z, LOW, HIGH), strict=True):
        b = (value - LOW) / step
        below, above = math.floor(b), math.ceil(b)
        out[below] += share * (above - b if above > below else 1.0)
        out[above] += share * (b - below)
    return out


def test_a_distribution_is_learned_as_in_a_plain_loop():
    learner, replay = make(max_grad_norm=0.1)
    online, target = copy.deepcopy(learner.online), copy.deepcopy(learner.target)
    optimizer = torch.optim.Adam(online.parameters(), lr=1e-3, eps=LearnerSettings().optimizer_epsilon)
    norms = []
    for update in range(1, 41):
        batch = replay.sample(SIZE)
        with torch.no_grad():
            p_t = target(torch.tensor(batch.next_obs)).softmax(2).double().numpy()
        goals = []
        for i in range(SIZE):
            p = p_t[i, (p_t[i] * np.linspace(LOW, HIGH, ATOMS)).sum(1).argmax()]
            goals.append(project(p, batch.reward[i] + batch.discount[i] * np.linspace(LOW, HIGH, ATOMS)))
        logits = online(torch.tensor(batch.obs))[range(SIZE), batch.action]
        losses = nn.functional.cross_entropy(logits, torch.tensor(np.array(goals)).float(), reduction="none")
        loss = (torch.tensor(batch.weight) * losses).mean()
        optimizer.zero_grad()
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(online.parameters(), 0.1).item())
        optimizer.step()
        if update % 7 == 0:
            target.load_state_dict(online.state_dict())
        learner.update(batch)
        np.testing.assert_allclose(learner.td_errors(), losses.detach(), rtol=1e-4)
        statistics = learner.statistics()
        np.testing.assert_array_equal(statistics.samples["loss_per_sample"], learner.td_errors())
        assert statistics.loss == pytest.approx(loss.item(), rel=1e-4)
        assert statistics.grad_norm == pytest.approx(norms[-1], rel=1e-3)
        replay.update_priorities(batch.index, 0.5 + batch.index % 7)
    assert min(norms) > 0.1  # all were clipped
    assert batch.weight.min() < 0.9
    for ours, theirs in ((learner.online, online), (learner.target, target)):
        for name, value in ours.state_dict().items():
            torch.testing.assert_close(value, theirs.state_dict()[name], rtol=1e-3, atol=2e-5)
    assert torch.equal(learner.online.unused, torch.ones(2))


def joined(batches):
    return type(batches[0])._make(map(np.concatenate, zip(*batches, strict=True)))


def soft(online, target, batch):
    """A loss that also changes the target network itself."""
    losses = of_distributions(online, target, batch)
    with torch.no_grad():
        torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), 0.01)
    return losses


def test_several_steps_at_once_are_the_same_steps():
    """With target network updates in between, and new noise in every step."""
    found = []
    for at_once in (1, 4):
        learner, replay = make(soft, at_once, network=Distribution(noise=0.3))
        batches = [replay.sample(SIZE) for _ in range(24)]
        torch.manual_seed(1)
        errors, noises = [], []
        for start in range(0, 24, at_once):
            learner.update(joined(batches[start : start + at_once]))
            errors.extend(learner.td_errors())
            noises.append(learner.online.noise.tolist())
        assert len(np.unique(noises, axis=0)) == len(noises)
        found.append((learner, errors))
    (plain, one_by_one), (several, at_once) = found
    assert plain.updates == several.updates == 24
    np.testing.assert_array_equal(one_by_one, at_once)
    assert_equal_learners(plain, several, rtol=0, atol=0)
    np.testing.assert_equal(plain.statistics(), several.statistics())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["adam", "rmsprop_centered"])
def test_a_restored_learner_goes_on_as_the_saved_one(tmp_path, optimizer, precision):
    settings = {"optimizer": optimizer, "precision": precision}
    saved, replay = make(**settings)
    train(saved, replay, 10)
    save_weights(tmp_path / "state.safetensors", saved.state_dict(), {})
    restored, _ = make(**settings)
    restored.load_state_dict(load_weights(tmp_path / "state.safetensors")[0])
    assert restored.updates == saved.updates == 10
    for errors, again in in_turns(saved, restored, replay, 6, at_once=1):  # with a target network update
        np.testing.assert_array_equal(errors, again)
    assert_equal_learners(saved, restored, rtol=0, atol=0)


def in_turns(one, other, replay, rounds, at_once=4):
    """Train both on the same batches with a changing learning rate; `other` takes several at once."""
    for number in range(rounds):
        batches, errors = [replay.sample(SIZE) for _ in range(at_once)], []
        for learner in (one, other):
            learner.learning_rate = 1e-3 * (1 + number % 3)
        for batch in batches:
            one.update(batch)
            errors.extend(one.td_errors())
            replay.update_priorities(batch.index, 0.5 + batch.index % 7)
        other.update(joined(batches))
        yield errors, other.td_errors()


@pytest.mark.parametrize("restored", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_preparing_a_capture_changes_nothing(monkeypatch, precision, restored):
    """Warm-up steps are undone: weights, running means, and what the loss did to the target network."""
    monkeypatch.setattr(learner_module, "make_optimizer", TorchOptimizer)
    eager, replay = make(soft, precision=precision)
    replay_on_the_cpu(learner_module, monkeypatch)
    captured, _ = make(soft, 4, precision=precision)
    captured._stream = "a stream"
    if restored:
        train(eager, replay, 7)
        captured.load_state_dict(copied(eager.state_dict()))
    for errors, at_once in in_turns(eager, captured, replay, 12):
        np.testing.assert_array_equal(errors, at_once)
        assert_equal_learners(eager, captured, rtol=0, atol=0)
    np.testing.assert_equal(eager.statistics(), captured.statistics())
    assert sorted(captured._graphs) == [(0, 1), (0, 4), (1, 1), (2, 1), (3, 1)]


@needs_cuda
def test_captured_equals_eager():
    eager, replay = make(soft, device="cuda", capture=False)
    captured, _ = make(soft, 4, device="cuda")
    for errors, at_once in in_turns(eager, captured, replay, 50):
        np.testing.assert_allclose(errors, at_once, rtol=1e-2, atol=1e-3)
    assert_equal_learners(eager, captured, rtol=1e-2, atol=1e-3)


@needs_cuda
def test_noise_is_new_at_each_replay():
    learner, replay = make(device="cuda", network=Distribution(noise=0.3))
    noises = [learner.update(replay.sample(SIZE)) or learner.online.noise.tolist() for _ in range(8)]
    assert len(np.unique(noises, axis=0)) == 8


def test_the_precision_auto_is_float32():
    """On every processor. Under autocast, no cast of a weight is remembered."""
    found, kinds = {}, []

    def watched(online, target, batch):
        kinds.append((torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled(), online.first.weight.dtype))
        return of_distributions(online, target, batch)

    for precision in ("auto", "float32", "bfloat16"):
        found[precision], replay = make(watched, precision=precision)
        train(found[precision], replay, 10)
    assert kinds == [(False, False, torch.float32)] * 20 + [(True, False, torch.bfloat16)] * 10
    assert torch.is_autocast_cache_enabled()
    assert_equal_learners(found["auto"], found["float32"], rtol=0, atol=0)
    np.testing.assert_allclose(found["bfloat16"].statistics().loss, found["float32"].statistics().loss, rtol=0.05)
    rough = found["bfloat16"].online.parameters()
    for (name, before), after in zip(Distribution().named_parameters(), rough, strict=True):
        assert (name == "unused") == torch.equal(before, after)


def test_weights_scale_the_gradient_and_nothing_else():
    (learner, replay), (other, _) = make(), make()
    batch = replay.sample(SIZE)
    learner.update(batch._replace(weight=np.zeros(SIZE, np.float32)))
    other.update(batch)
    assert learner.statistics().loss == learner.statistics().grad_norm == 0
    assert other.statistics().grad_norm > 0
    np.testing.assert_array_equal(learner.td_errors(), other.td_errors())
    assert learner.td_errors().min() > 0


def test_a_custom_loss_has_no_statistics_of_action_values():
    learner, replay = make()
    learner.update(replay.sample(SIZE))
    loss, mean_q, max_q, grad_norm, samples = learner.statistics()
    assert [*map(math.isnan, (loss, mean_q, max_q, grad_norm))] == [False, True, True, False]
    assert samples.keys() == {"loss_per_sample"}
    np.testing.assert_array_equal(samples["loss_per_sample"], learner.td_errors())
    message = learner.diagnosis()
    assert re.match(r"the loss of update 1 is \d[\d.]*, the gradient's norm \d[\d.]*, rewards lie from -", message)
    learner.update(replay.sample(SIZE))
    assert not np.array_equal(samples["loss_per_sample"], learner.statistics().samples["loss_per_sample"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_losses_may_have_any_precision(dtype):
    learner, replay = make(lambda *these: of_distributions(*these).to(dtype))
    exact, _ = make()
    for errors, expected in in_turns(learner, exact, replay, 3, at_once=1):
        np.testing.assert_allclose(errors, expected, rtol=0.02)
    statistics = learner.statistics()
    assert learner.td_errors().dtype == statistics.samples["loss_per_sample"].dtype == np.float32
    assert statistics.loss == pytest.approx(exact.statistics().loss, rel=0.02)


def test_losses_are_those_before_the_step():
    """Also if they are a view of a parameter, which the step changes."""

    class Same(nn.Module):
        def __init__(self):
            super().__init__()
            self.level = nn.Parameter(torch.full((1,), 2.0))

    learner, replay = make(lambda online, target, batch: online.level.expand(SIZE), network=Same())
    learner.update(replay.sample(SIZE))
    assert learner.online.level.item() < 2
    assert set(learner.td_errors()) == set(learner.statistics().samples["loss_per_sample"]) == {2.0}


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda *these: of_distributions(*these).mean(), r"expected a tensor of shape \(16,\), .*, got shape \(\)"),
        (lambda *these: of_distributions(*these)[:, None], r"expected a tensor of .*, got shape \(16, 1\)"),
        (lambda *these: of_distributions(*these)[1:], r"expected a tensor of .*, got shape \(15,\)"),
        (lambda *these: None, r"expected a tensor of shape \(16,\), one value per sample, got NoneType"),
        (lambda *these: of_distributions(*these).tolist(), r"expected a tensor .*, got list"),
        (lambda *these: of_distributions(*these).detach(), r"expected values with a gradient .*, got some without"),
    ],
)
def test_a_loss_is_one_value_per_sample(loss, message):
    learner, replay = make(loss)
    before = {name: value.clone() for name, value in learner.online.named_parameters()}
    with pytest.raises(ValueError, match=rf"^loss: {message}"):
        learner.update(replay.sample(SIZE))
    assert learner.updates == 0
    assert all(torch.equal(value, before[name]) for name, value in learner.online.named_parameters())


def test_a_loss_is_a_function_and_a_device_may_be_a_name():
    with pytest.raises(ValueError, match=r"^loss: expected a function of \(online, target, batch\), got 'huber'"):
        make("huber")
    with pytest.raises(ValueError, match="^device: expected auto, cpu, cuda or cuda:N, got 'tpu'"):
        make(device="tpu")
    assert make(device="cpu")[0].device == CPU


def test_the_example_learns():
    path = Path(__file__).parents[2] / "examples" / "own_network.py"
    assert len(path.read_text().splitlines()) <= 55
    out = subprocess.run([sys.executable, path], capture_output=True, text=True, check=True).stdout
    first, last = re.search(r": (\d+) steps in each at first, (\d+) at last", out).groups()
    assert int(first) < 40
    assert int(last) > 100

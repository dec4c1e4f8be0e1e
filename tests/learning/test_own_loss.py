"""The learner around a network and a loss of one's own."""

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

from pydqn import Config, FrameReplay, Learner
from pydqn._util.weights import load_weights, save_weights
from pydqn.learning import learner as learner_room
from pydqn.learning.losses import huber
from pydqn.learning.networks import make_network
from pydqn.learning.optimizers import Kernels
from pydqn.replay.device import DeviceReplay
from tests.learning.test_learner import CPU, Replayed, assert_equal_learners, needs_cuda

SIZE, ACTIONS, ATOMS, LOW, HIGH = 16, 3, 11, -3.0, 3.0


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Distribution(nn.Module):
    """(B, 2, 5) observations to (B, ACTIONS, ATOMS) logits; with batch normalization, and noise where that is asked."""

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


def of_td_errors(online, target, batch, *, double=False, kind="huber_loss"):
    """What the learner has built in, as one would write it."""
    q = online(batch.obs).gather(1, batch.action[:, None])[:, 0]
    with torch.no_grad():
        q_t = target(batch.next_obs)
        chosen = (online(batch.next_obs) if double else q_t).argmax(1, keepdim=True)
        goal = batch.reward + batch.discount * q_t.gather(1, chosen)[:, 0]
    return getattr(nn.functional, kind)(q, goal, reduction="none")


def fill(replay, shape):
    generator = np.random.default_rng(0)
    for time_step in range(200):
        frame = generator.normal(size=(1, *shape)) if len(shape) == 1 else generator.integers(0, 255, (1, *shape))
        frame, reward = frame.astype(replay.dtype), float(generator.normal())
        replay.append(frame, [time_step % ACTIONS], [reward], [time_step % 50 == 49], [False], [time_step % 50 == 0])
    return replay


def make(loss=of_distributions, at_once=1, device=CPU, capture=None, network=None, **settings):
    settings = {"batch_size": SIZE, "target_update_period": 7, "learning_rate": 1e-3, **settings}
    replay = fill(FrameReplay(300, (5,), stack=2, n_step=3, dtype="float32", prioritized=True), (5,))
    example = replay.empty_batch(at_once * SIZE)
    return Learner(network or Distribution(), Config(**settings), device, example, capture, loss=loss), replay


def train(learner, replay, updates):
    """Transitions get priorities of their own, so that importance weights differ."""
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
def test_the_built_in_loss_by_hand_is_the_built_in_loss(variant, storage):
    """Pixels that are prepared, n-step discounts, importance weights, rows in place of observations."""
    kind = {"host": FrameReplay, "device": functools.partial(DeviceReplay, device="cpu")}[storage]
    config = Config(batch_size=SIZE, target_update_period=7, precision="float32", **variant)
    by_hand = functools.partial(of_td_errors, double=config.double, kind=f"{config.loss}_loss")
    learners = []
    for loss in (None, by_hand):
        replay = fill(kind(300, (40, 40), n_step=3, prioritized=True, seed=1), (40, 40))
        network = make_network("small", 4, (40, 40), ACTIONS, hidden_units=(32,), dueling=True)
        frames = getattr(replay, "frames", None)
        learners.append(Learner(network, config, CPU, replay.empty_batch(SIZE), frames=frames, loss=loss))
        train(learners[-1], replay, 30)
    built_in, own = learners
    assert_equal_learners(built_in, own, rtol=1e-3, atol=2e-5)  # 30 updates moved them by up to 3e-3
    assert own.updates == built_in.updates == 30
    size = torch.from_numpy(built_in.errors())
    np.testing.assert_allclose(own.errors(), huber(size) if config.loss == "huber" else size**2, rtol=1e-2, atol=1e-4)
    ours, theirs = own.metrics(), built_in.metrics()
    np.testing.assert_allclose([ours.loss, ours.grad_norm], [theirs.loss, theirs.grad_norm], rtol=1e-2)
    np.testing.assert_allclose(own.samples()[0], built_in.samples()[0], rtol=1e-2, atol=1e-4)


def project(p, z):
    """The projection of one distribution, atom by atom, as in algorithm 1 of Bellemare et al. 2017."""
    out, step = np.zeros(ATOMS), (HIGH - LOW) / (ATOMS - 1)
    for share, place in zip(p, np.clip(z, LOW, HIGH), strict=True):
        b = (place - LOW) / step
        below, above = math.floor(b), math.ceil(b)
        out[below] += share * (above - b if above > below else 1.0)
        out[above] += share * (b - below)
    return out


def test_a_distribution_is_learned_as_in_a_plain_loop():
    learner, replay = make(max_grad_norm=0.1)
    online, target = copy.deepcopy(learner.online), copy.deepcopy(learner.target)
    optimizer = torch.optim.Adam(online.parameters(), lr=1e-3, eps=Config().optimizer_epsilon)
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
        np.testing.assert_allclose(learner.errors(), losses.detach(), rtol=1e-4)
        np.testing.assert_array_equal(learner.samples()[0], learner.errors())
        assert learner.metrics().loss == pytest.approx(loss.item(), rel=1e-4)
        assert learner.metrics().grad_norm == pytest.approx(norms[-1], rel=1e-3)
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
    """A target that also follows by itself."""
    losses = of_distributions(online, target, batch)
    with torch.no_grad():
        torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), 0.01)
    return losses


def test_several_steps_at_once_are_the_same_steps():
    """With copies to the target in between, and noise that is new at every step."""
    found = []
    for at_once in (1, 4):
        learner, replay = make(soft, at_once, network=Distribution(noise=0.3))
        batches = [replay.sample(SIZE) for _ in range(24)]
        torch.manual_seed(1)
        errors, noises = [], []
        for start in range(0, 24, at_once):
            learner.update(joined(batches[start : start + at_once]))
            errors.extend(learner.errors())
            noises.append(learner.online.noise.tolist())
        assert len(np.unique(noises, axis=0)) == len(noises)
        found.append((learner, errors))
    (plain, one_by_one), (several, at_once) = found
    assert plain.updates == several.updates == 24
    np.testing.assert_array_equal(one_by_one, at_once)
    assert_equal_learners(plain, several, rtol=0, atol=0)
    np.testing.assert_equal(plain.metrics(), several.metrics())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["adam", "rmsprop_centered"])
def test_a_restored_learner_goes_on_as_the_saved_one(tmp_path, optimizer, precision):
    settings = {"optimizer": optimizer, "precision": precision}
    saved, replay = make(**settings)
    train(saved, replay, 10)
    save_weights(tmp_path / "state.safetensors", saved.state(), {})
    tensors, _ = load_weights(tmp_path / "state.safetensors")
    restored, _ = make(**settings)
    restored.restore(tensors, saved.updates, saved.metrics())
    np.testing.assert_equal(restored.metrics(), saved.metrics())
    for errors, again in in_turns(saved, restored, replay, 6, at_once=1):  # the target moves again
        np.testing.assert_array_equal(errors, again)
    assert_equal_learners(saved, restored, rtol=0, atol=0)


def in_turns(one, other, replay, rounds, at_once=4):
    """Train both on the same batches, the learning rate changing; `other` takes several at once."""
    for number in range(rounds):
        batches, errors = [replay.sample(SIZE) for _ in range(at_once)], []
        for learner in (one, other):
            learner.learning_rate = 1e-3 * (1 + number % 3)
        for batch in batches:
            one.update(batch)
            errors.extend(one.errors())
            replay.update_priorities(batch.index, 0.5 + batch.index % 7)
        other.update(joined(batches))
        yield errors, other.errors()


@pytest.mark.parametrize("restored", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_a_capture_does_changes_nothing(monkeypatch, precision, restored):
    """Steps before the capture are undone: weights, running means, what the loss itself did to the target."""
    monkeypatch.setattr(learner_room, "make_optimizer", Kernels)
    eager, replay = make(soft, precision=precision)
    monkeypatch.setattr(learner_room, "HostToDevice", functools.partial(learner_room.HostToDevice, packs=True))
    monkeypatch.setattr(learner_room, "Graph", Replayed)
    monkeypatch.setattr(learner_room, "warm_up", lambda function, stream: [function() for _ in range(3)])
    captured, _ = make(soft, 4, precision=precision)
    captured._stream = "a stream"
    if restored:
        train(eager, replay, 7)
        captured.restore({name: value.clone() for name, value in eager.state().items()}, eager.updates)
    for errors, at_once in in_turns(eager, captured, replay, 12):
        np.testing.assert_array_equal(errors, at_once)
        assert_equal_learners(eager, captured, rtol=0, atol=0)
    np.testing.assert_equal(eager.metrics(), captured.metrics())
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


def test_the_precision_is_float32_or_what_was_asked_for():
    """Whatever `auto` finds for networks of our own. Under autocast, no cast of a weight is remembered."""
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
    np.testing.assert_allclose(found["bfloat16"].metrics().loss, found["float32"].metrics().loss, rtol=0.05)
    rough = found["bfloat16"].online.parameters()
    for (name, before), after in zip(Distribution().named_parameters(), rough, strict=True):
        assert (name == "unused") == torch.equal(before, after)


def test_weights_scale_the_gradient_and_nothing_else():
    (learner, replay), (twin, _) = make(), make()
    batch = replay.sample(SIZE)
    learner.update(batch._replace(weight=np.zeros(SIZE, np.float32)))
    twin.update(batch)
    assert learner.metrics().loss == learner.metrics().grad_norm == 0
    assert twin.metrics().grad_norm > 0
    np.testing.assert_array_equal(learner.errors(), twin.errors())
    assert learner.errors().min() > 0


def test_what_only_the_loss_knows_is_not_a_number():
    learner, replay = make()
    assert all(map(math.isnan, learner.metrics()))
    assert learner.errors().shape == learner.samples()[0].shape == (0,)
    learner.update(replay.sample(SIZE))
    metrics = learner.metrics()
    assert list(map(math.isnan, metrics)) == [False, True, False, True]  # the loss, and the gradient's norm
    losses, values = learner.samples()
    assert values.shape == (0, 0)
    np.testing.assert_array_equal(losses, learner.errors())
    said = learner.diagnosis()
    assert re.match(r"the loss of update 1 is \d[\d.]*, the gradient's norm \d[\d.]*, rewards lie from -", said)
    learner.update(replay.sample(SIZE))
    assert not np.array_equal(losses, learner.samples()[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_losses_may_have_any_precision(dtype):
    learner, replay = make(lambda *these: of_distributions(*these).to(dtype))
    twin, _ = make()
    for errors, expected in in_turns(learner, twin, replay, 3, at_once=1):
        np.testing.assert_allclose(errors, expected, rtol=0.02)
    assert learner.errors().dtype == learner.samples()[0].dtype == np.float32
    assert learner.metrics().loss == pytest.approx(twin.metrics().loss, rel=0.02)


def test_errors_are_of_before_the_step():
    """Also where the losses are a view of a parameter, which the step changes."""

    class Same(nn.Module):
        def __init__(self):
            super().__init__()
            self.level = nn.Parameter(torch.full((1,), 2.0))

    learner, replay = make(lambda online, target, batch: online.level.expand(SIZE), network=Same())
    learner.update(replay.sample(SIZE))
    assert learner.online.level.item() < 2
    assert set(learner.errors()) == set(learner.samples()[0]) == {2.0}


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

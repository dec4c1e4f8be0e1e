"""Updates of every value representation, with double Q-learning and Munchausen, against references with loops."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from pydqn import Learner, LearnerSettings
from pydqn.envs.frames import FrameLayout, Part
from pydqn.learning import learner as learner_module
from pydqn.learning.networks import make_network
from pydqn.learning.objectives import DISTRIBUTIONAL, Transitions, munchausen_target
from pydqn.learning.optimizers import TorchOptimizer
from pydqn.learning.policy import Actor, Policy
from pydqn.learning.records import MASKED
from pydqn.replay.frames import Batch
from tests.helpers.learners import CPU, DISTRIBUTIONS, VALUES, assert_equal_learners, copied, make, replay_on_the_cpu

SIZE, ACTIONS = 6, 3
MASKS = FrameLayout((Part("", (4,), np.dtype(np.float32), (0, 1)),), ACTIONS)


def named(variant):
    return ",".join(str(value) for name, value in variant.items() if not name.startswith(("num_", "value_")))


def learner_of(variant, *, masked=False, dueling=False, **settings):
    """Return a learner of vectors whose networks differ, and a batch as it comes from a replay buffer."""
    settings = LearnerSettings(**{**variant, "batch_size": SIZE, "priority_error": "td_error", **settings})
    layout = MASKS if masked else FrameLayout(MASKS.parts)
    network = make_network("mlp", 2, layout, ACTIONS, hidden_units=(16,), dueling=dueling, settings=settings)
    generator = np.random.default_rng(0)
    obs, next_obs = generator.normal(size=(2, SIZE, 2, 4)).astype(np.float32)
    if masked:
        masks = generator.random((2, SIZE, 2, ACTIONS)) < 0.6
        masks[..., 0] |= ~masks.any(-1)
        packed = np.packbits(masks, axis=-1, bitorder="little")
        obs, next_obs = (
            np.concatenate([part.view(np.uint8), bits], axis=-1)
            for part, bits in zip((obs, next_obs), packed, strict=True)
        )
        action = np.array([generator.choice(np.flatnonzero(mask)) for mask in masks[0, :, -1]])
    else:
        action = generator.integers(ACTIONS, size=SIZE)
    reward = generator.normal(size=SIZE).astype(np.float32)
    discount = np.array([0, 0.9, 0.9, 0.81, 0, 0.9], np.float32)
    weight = generator.random(SIZE, np.float32)
    batch = Batch(obs, action, reward, discount, next_obs, np.arange(SIZE), weight)
    learner = Learner(network, settings, CPU, batch, seed=7)
    with torch.no_grad():
        for parameter in learner.target.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    return learner, batch


def softmax(x):
    powers = [math.exp(value - max(x)) for value in x]
    return [power / sum(powers) for power in powers]


def reference(learner, batch, settings):
    """Return the loss and the TD error of each sample, computed one by one in Python's float64."""
    online, target = learner.online, learner.target
    obs, next_obs = torch.tensor(batch.obs), torch.tensor(batch.next_obs)
    drawn = torch.rand((SIZE, settings.num_taus + settings.num_target_taus), generator=torch.Generator().manual_seed(7))
    tau, tau_t = drawn[:, : settings.num_taus], drawn[:, settings.num_taus :]
    with torch.no_grad():
        means, means_t, next_means = (
            net(x).tolist() for net, x in ((online, obs), (target, next_obs), (online, next_obs))
        )
        target_means = target(obs).tolist()
        if settings.value == "scalar":
            outputs, outputs_t = ([[[q] for q in row] for row in rows] for rows in (means, means_t))
        else:
            implicit = settings.value == "implicit_quantile"
            outputs = online.outputs(obs, tau if implicit else None).tolist()
            outputs_t = target.outputs(next_obs, tau_t if implicit else None).tolist()
    losses, errors = [], []
    for b in range(SIZE):
        a, r, discount = int(batch.action[b]), float(batch.reward[b]), float(batch.discount[b])
        chooser = next_means[b] if settings.double else means_t[b]
        best = max(range(ACTIONS), key=chooser.__getitem__)
        kind = settings.value
        support = None
        if kind in ("categorical", "hl_gauss"):
            low, high, count = settings.value_min, settings.value_max, settings.num_atoms
            support = [low + (high - low) * i / (count - 1) for i in range(count)]
            if kind == "hl_gauss":
                width = (high - low) / count
                support = [low + (i + 0.5) * width for i in range(count)]
        samples = [[means_t[b][x]] for x in range(ACTIONS)] if kind in ("scalar", "hl_gauss") else outputs_t[b]
        if settings.munchausen:
            t = settings.munchausen_temperature
            policy = softmax([q / t for q in means_t[b]])
            current = means[b] if settings.munchausen_policy == "online" else target_means[b]
            if settings.munchausen_policy == "online" and kind == "implicit_quantile":  # of the levels that are learned
                current = [
                    q if q == MASKED else sum(row) / len(row) for q, row in zip(means[b], outputs[b], strict=True)
                ]
            own = softmax([q / t for q in current])
            log_own = t * math.log(own[a]) if own[a] > 0 else -math.inf
            r += settings.munchausen_alpha * min(max(log_own, settings.munchausen_least), 0.0)
            chosen = [
                sum(p * (samples[x][j] - t * math.log(p)) for x, p in enumerate(policy) if p > 0)
                for j in range(len(samples[0]))
            ]
        else:
            chosen = samples[best]
        goals = [r + discount * sample for sample in chosen]
        if kind == "scalar":
            errors.append(abs(goals[0] - means[b][a]))
            losses.append(0.5 * errors[-1] ** 2 if errors[-1] <= 1 else errors[-1] - 0.5)
        elif support is not None:
            masses = [0.0] * len(support)
            if kind == "categorical":
                width = support[1] - support[0]
                for z, p in zip(support, softmax(outputs_t[b][best]), strict=True):
                    position = min(max(r + discount * z, support[0]), support[-1])
                    for i, atom in enumerate(support):
                        masses[i] += max(0.0, 1 - abs(position - atom) / width) * p
            else:
                centre, sigma = min(max(goals[0], low), high), settings.hl_gauss_sigma * width
                below = [math.erf((low + i * width - centre) / (math.sqrt(2) * sigma)) for i in range(len(support) + 1)]
                masses = [(below[i + 1] - below[i]) / (below[-1] - below[0]) for i in range(len(support))]
            own = softmax(outputs[b][a])
            losses.append(-sum(p * math.log(q) for p, q in zip(masses, own, strict=True)))
            errors.append(abs(sum(z * p for z, p in zip(support, masses, strict=True)) - means[b][a]))
        else:
            levels = tau[b].tolist() if kind == "implicit_quantile" else online.representation.tau.tolist()
            loss, error = 0.0, 0.0
            for level, q in zip(levels, outputs[b][a], strict=True):
                for goal in goals:
                    u = goal - q
                    huber = 0.5 * u * u if abs(u) <= 1 else abs(u) - 0.5
                    loss += abs(level - (u < 0)) * huber / len(goals)
                    error += abs(u) / len(goals)
            losses.append(loss)
            errors.append(error)
    return losses, errors


@pytest.mark.parametrize("dueling", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("variant", VALUES, ids=named)
def test_losses_and_errors(variant, masked, dueling):
    learner, batch = learner_of(variant, masked=masked, dueling=dueling, munchausen_temperature=0.3)
    losses, errors = reference(learner, batch, learner._settings)
    learner.update(batch)
    statistics = learner.statistics()
    np.testing.assert_allclose(statistics.samples["loss_per_sample"], losses, rtol=2e-4, atol=1e-5)
    quantiles = statistics.samples.get("return_quantiles")
    assert (quantiles is None) == (variant["value"] == "scalar")
    if quantiles is not None:
        assert quantiles.shape == (len(batch.action), 21)
        np.testing.assert_array_equal(quantiles, learner.policy.quantiles(batch.obs, batch.action))
    np.testing.assert_allclose(learner.td_errors(), errors, rtol=2e-4, atol=1e-5)
    np.testing.assert_allclose(statistics.loss, np.mean(losses * batch.weight), rtol=2e-4)


@pytest.mark.parametrize("variant", VALUES, ids=named)
def test_the_gradient_is_that_of_the_weighted_mean_of_the_losses(variant):
    learner, batch = learner_of(variant, max_grad_norm=0.0)
    settings, online = learner._settings, copy.deepcopy(learner.online)
    transitions = Transitions(
        *map(torch.tensor, (batch.obs, batch.action, batch.reward, batch.discount, batch.next_obs))
    )
    if settings.value == "scalar":
        values = online(transitions.obs)
        with torch.no_grad():
            if settings.munchausen:
                goal = munchausen_target(learner.target, values.detach(), transitions, settings)
            else:
                q_t = learner.target(transitions.next_obs)
                chosen = (online(transitions.next_obs) if settings.double else q_t).argmax(1, keepdim=True)
                goal = transitions.reward + transitions.discount * q_t.gather(1, chosen).squeeze(1)
        taken = values.gather(1, transitions.action[:, None]).squeeze(1)
        losses = torch.nn.functional.huber_loss(taken, goal, reduction="none")
    else:
        generator = torch.Generator().manual_seed(7)
        losses = DISTRIBUTIONAL[settings.value](online, learner.target, transitions, settings, generator).losses
    (losses * torch.tensor(batch.weight)).mean().backward()
    learner.update(batch)
    squares = 0.0
    for one, other in zip(learner.online.parameters(), online.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
        squares += float((other.grad**2).sum())
    assert learner.statistics().grad_norm == pytest.approx(math.sqrt(squares), rel=1e-4)
    assert squares > 0


@pytest.mark.parametrize("storage", ["host", "device"])
@pytest.mark.parametrize("variant", VALUES[::3], ids=named)
def test_several_steps_at_once_are_the_same_steps(variant, storage):
    plain, replay, _ = make(**variant, n_step=3)
    several, same_replay, _ = make(**variant, n_step=3, at_once=3, storage=storage)
    errors, at_once = [], []
    for count in (3, 3, 1):
        for _ in range(count):
            plain.update(replay.sample(32))
            errors.extend(plain.td_errors())
        several.update(same_replay.sample(32 * count))
        at_once.extend(several.td_errors())
    np.testing.assert_array_equal(errors, at_once)
    assert_equal_learners(plain, several, rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", [VALUES[3], *VALUES[4::4]], ids=named)
def test_preparing_a_capture_changes_nothing(monkeypatch, variant, precision):
    """All but the capture: warm-up steps undone, also their draws of levels; graphs by length."""
    monkeypatch.setattr(learner_module, "make_optimizer", TorchOptimizer)
    eager, replay, _ = make(**variant, precision=precision)
    replay_on_the_cpu(learner_module, monkeypatch)
    captured, same_replay, _ = make(**variant, precision=precision, at_once=2, storage="device")
    captured._stream = "a stream"
    for _ in range(2):
        for _ in range(2):
            eager.update(replay.sample(32))
        captured.update(same_replay.sample(64))
    assert_equal_learners(eager, captured, rtol=0, atol=0)


@pytest.mark.parametrize("variant", VALUES[::3], ids=named)
def test_a_restored_learner_goes_on_as_the_saved_one(variant):
    saved, replay, _ = make(**variant)
    for _ in range(5):
        saved.update(replay.sample(32))
    restored, _, _ = make(**variant)
    restored.load_state_dict(copied(saved.state_dict()))
    assert ("generator" in saved.state_dict()) == (variant["value"] == "implicit_quantile")
    for _ in range(4):
        batch = replay.sample(32)
        saved.update(batch)
        restored.update(batch)
    assert_equal_learners(saved, restored, rtol=0, atol=0)


@pytest.mark.parametrize(("kind", "change"), [("loss", lambda loss: loss), ("root_loss", np.sqrt)])
@pytest.mark.parametrize("value", ["scalar", *DISTRIBUTIONS])
def test_what_priorities_are_made_of(value, kind, change):
    learner, batch = learner_of({"value": value, **DISTRIBUTIONS.get(value, {})}, priority_error=kind)
    losses, errors = reference(learner, batch, learner._settings)
    learner.update(batch._replace(weight=np.zeros_like(batch.weight)))  # importance weights are none of it
    np.testing.assert_allclose(learner.td_errors(), change(losses), rtol=2e-4)
    auto, _ = learner_of({"value": value, **DISTRIBUTIONS.get(value, {})}, priority_error="auto")
    auto.update(batch)
    np.testing.assert_allclose(auto.td_errors(), errors if value == "scalar" else losses, rtol=2e-4)


@pytest.mark.parametrize("value", DISTRIBUTIONS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("network", ["small", "nature_7x7", "minatar", "mlp"])
def test_action_values_are_the_means(value, precision, network):
    """For acting, also of dueling networks that split their features, and in mixed precision."""
    settings = LearnerSettings(value=value, **DISTRIBUTIONS[value])
    made = make_network(network, 2, (84, 84), ACTIONS, hidden_units=(), dueling=True, settings=settings)
    obs = torch.randint(0, 256, (3, 2, 84, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    values = Policy(made, CPU, precision).values(obs.numpy())
    tau = made.representation.tau.expand(3, -1) if value == "implicit_quantile" else None
    outputs = made.outputs(obs, tau)
    count = {"categorical": 11, "hl_gauss": 11, "quantile": 7, "implicit_quantile": 4}[value]
    assert outputs.shape == (3, ACTIONS, count)
    if value in ("categorical", "hl_gauss"):
        expected = (outputs.softmax(2) * made.representation.support).sum(2)
    else:
        expected = outputs.mean(2)
    np.testing.assert_allclose(values, expected.detach(), rtol=0.1, atol=0.1 if precision == "bfloat16" else 1e-5)
    actor = Actor(Policy(made, CPU, precision), obs.numpy())
    assert np.array_equal(actor.values(obs.numpy()), values)


def test_masked_actions_have_no_value():
    for value, more in DISTRIBUTIONS.items():
        settings = LearnerSettings(value=value, **more)
        network = make_network("mlp", 1, MASKS, ACTIONS, hidden_units=(8,), settings=settings)
        obs = torch.zeros((2, 1, 17), dtype=torch.uint8)
        obs[0, 0, -1], obs[1, 0, -1] = 0b101, 0b010
        assert ((network(obs) == MASKED).tolist()) == [[False, True, False], [True, False, True]]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"value": "quantile"},
            "expected one with value='quantile', num_quantiles=200, as the settings say, got one with value='scalar'",
        ),
        (
            {"value": "categorical", "value_max": 5.0},
            "expected one with value='categorical', num_atoms=51, value_min=-10.0, value_max=5.0",
        ),
    ],
)
def test_a_network_of_another_representation_is_refused(wrong, message):
    _, batch = learner_of({})
    for network in (
        make_network("mlp", 2, (4,), ACTIONS),
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8, 3)),
    ):
        with pytest.raises(ValueError, match=f"^network: {message}"):
            Learner(network, LearnerSettings(**wrong, batch_size=SIZE), CPU, batch)
    network = make_network("mlp", 2, (4,), ACTIONS, settings=LearnerSettings(**wrong))
    with pytest.raises(ValueError, match="^network: expected one with value='scalar'"):
        Learner(network, LearnerSettings(batch_size=SIZE), CPU, batch)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"value": "c51"}, "value: expected one of scalar, categorical"),
        ({"num_atoms": 1}, "num_atoms: expected at least 2"),
        ({"value_min": 3.0, "value_max": 3.0}, "value_max: expected a finite number above value_min = 3, got 3"),
        ({"value_max": math.inf}, "value_max: expected a finite number"),
        ({"value_min": -math.inf}, "value_max: expected a finite number above value_min = -inf"),
        ({"munchausen": True, "double": True}, "munchausen: expected False with double"),
        ({"munchausen": True, "value": "categorical"}, "munchausen: expected False with value = 'categorical'"),
        ({"munchausen_temperature": 0.0}, "munchausen_temperature: expected a positive number"),
        ({"munchausen_alpha": 1.5}, "munchausen_alpha: expected a number from 0 to 1"),
        ({"munchausen_least": 0.5}, "munchausen_least: expected at most 0"),
        ({"hl_gauss_sigma": 0.0}, "hl_gauss_sigma: expected a positive number"),
        ({"first_cosine": 2}, "first_cosine: expected at most 1"),
    ],
)
def test_bad_settings(wrong, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        LearnerSettings(**wrong)

"""Runs with every value representation: exact resuming, acting, exporting; and what they learn on a known process."""

from __future__ import annotations

import dataclasses
import re
import warnings

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import pydqn
from pydqn import Learner, LearnerSettings
from pydqn.learning.networks import make_network
from pydqn.learning.policy import Policy
from pydqn.replay.frames import Batch
from pydqn.runs.checkpoint import latest_checkpoint, load_checkpoint
from pydqn.runs.layout import load_run
from pydqn.training.loop import Run
from tests.helpers.learners import CPU, DISTRIBUTIONS
from tests.helpers.runs import SMALL, digest, kill

KINDS = {
    **{value: {"value": value, **more} for value, more in DISTRIBUTIONS.items()},
    "munchausen": {"munchausen": True},
    "munchausen-implicit": {"munchausen": True, "value": "implicit_quantile", **DISTRIBUTIONS["implicit_quantile"]},
    "in-a-row": {"updates_in_a_row": 7},
    "noisy": {"noisy_sigma": 0.5, "epsilon_start": 0.0, "epsilon_end": 0.0, "dueling": True, "munchausen": True},
    "noisy-implicit": {"noisy_sigma": 0.1, "value": "implicit_quantile", **DISTRIBUTIONS["implicit_quantile"]},
    "exploration": {
        **{"epsilon_ladder": 7.0, "epsilon_start": 0.4, "epsilon_end": 0.4, "epsilon_off_steps": 200},
        **{"boltzmann_temperature": 0.1, "target_update_rate": 0.01, "target_update_period": 1, "updates_in_a_row": 7},
    },
}


def small(kind, **others):
    return pydqn.Config(**{**SMALL, "batch_size": 8, "replay_capacity_frames": 1000, **KINDS[kind], **others})


@pytest.mark.parametrize("kind", ["categorical", "hl_gauss", "quantile", "noisy", "noisy-implicit", "exploration"])
def test_a_run_is_the_same_after_a_kill(kind, tmp_path):
    config = small(kind, prioritized=True, priority_error="root_loss" if kind == "categorical" else "auto")
    pydqn.train(config, tmp_path / "whole")
    run = Run(config, tmp_path / "killed")
    for report in run.reports():
        if report.steps >= 0 and run.steps >= 180:
            break
        while run.steps < 180 and latest_checkpoint(tmp_path / "killed") is None:
            break
    kill(run)
    pydqn.resume(tmp_path / "killed")
    assert digest(tmp_path / "killed") == digest(tmp_path / "whole")
    ours, theirs = (load_checkpoint(latest_checkpoint(tmp_path / name)).tensors for name in ("killed", "whole"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_a_run_is_used_like_any_other(kind, tmp_path):
    config = small(kind, dueling=True, double=True)
    pydqn.train(config, tmp_path)
    assert len(pydqn.evaluate(tmp_path, 2)) == 2
    policy = pydqn.load_policy(tmp_path)
    obs, _ = policy.env().reset(seed=0)
    assert policy.values(obs).shape == (2,)
    assert np.array_equal(policy.values(obs), policy.values(obs))  # no chance in it
    for suffix in (".pt2", ".onnx") if kind == "implicit_quantile" else (".pt2",):
        assert pydqn.export(tmp_path, tmp_path / f"policy{suffix}").largest_difference < 1e-3
    with pytest.raises(ValueError, match="^run: the weights in .* do not fit its config"):
        pydqn.load_policy(tmp_path, value="scalar")


def test_updates_in_a_row(tmp_path):
    """As many updates as without, but only when so many are due; and the target network's period stays."""
    found = []
    with Run(small("in-a-row", total_steps=120, num_envs=1, train_period_steps=2.0), tmp_path) as run:
        for _ in run.reports():
            pass
        assert run.updates == 49
    config = small("in-a-row", total_steps=120, num_envs=1, train_period_steps=2.0, log_every_steps=1)
    with Run(config, tmp_path / "other") as run:
        next(run.reports())
        while run.steps < 120:
            before = run.updates
            run.step()
            found.append(run.updates - before)
    assert set(found) == {0, 7}


@pytest.mark.parametrize("value", ["categorical", "hl_gauss", "quantile"])
def test_a_support_that_is_too_small_is_said_once(value, tmp_path):
    """CartPole's rewards are 1: returns beyond 3 are cut off."""
    settings = {"total_steps": 1500, "log_every_steps": 100, "learning_rate": 3e-3, "checkpoint_every_steps": 0}
    settings |= {"target_update_period": 10, "train_period_steps": 1.0}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pydqn.train(small(value, **settings, prioritized=False), tmp_path)
    texts = [str(one.message) for one in caught if "value_max" in str(one.message)]
    assert len(texts) == (value != "quantile")
    for text in texts:
        assert re.match(r"value_max: the largest action value is (2|3).*, close to 3, beyond which no return can", text)


def test_a_network_of_ones_own_has_scalar_values(tmp_path):
    def network(space, num_actions):
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, num_actions))

    with pytest.raises(ValueError, match="^value: expected scalar with a network of your own"):
        pydqn.train(small("quantile"), tmp_path, network=network)
    assert pydqn.train(small("munchausen"), tmp_path, network=network).updates > 0


# --- a process whose returns are known ---

GAMMA = 0.5
# Observations of the two states. Levels of implicit quantiles are embedded in as many features.
STATES = np.random.default_rng(0).normal(size=(2, 32)).astype(np.float32)
TOSS = [(-1.0, 0.25), (2.0, 0.75)]  # rewards and their probabilities


def chain(generator, size):
    """Return transitions of a chain: state 0 leads to state 1 with reward 1, state 1 ends with a random reward.

    Action 1 ends at once with reward 1.2 in state 0 and 0 in state 1.
    """
    state, action = generator.integers(2, size=size), generator.integers(2, size=size)
    toss = generator.choice([reward for reward, _ in TOSS], p=[p for _, p in TOSS], size=size)
    reward = np.where(action == 1, np.where(state == 0, 1.2, 0.0), np.where(state == 0, 1.0, toss))
    goes_on = (state == 0) & (action == 0)
    obs, next_obs = STATES[state][:, None], STATES[np.ones(size, int)][:, None]
    discount = np.where(goes_on, GAMMA, 0.0).astype(np.float32)
    ones = np.ones(size, np.float32)
    return Batch(obs, action, reward.astype(np.float32), discount, next_obs, np.arange(size), ones)


MEAN = sum(reward * p for reward, p in TOSS)  # 1.25, so action 0 is the best in both states
TRUE = np.array([[1 + GAMMA * MEAN, 1.2], [MEAN, 0.0]])
WIDE = {
    "scalar": {"loss": "mse"},  # the Huber loss has another minimum than the mean
    "categorical": {"num_atoms": 13, "value_min": -2.0, "value_max": 4.0},
    "hl_gauss": {"num_atoms": 61, "value_min": -2.0, "value_max": 4.0},
    "quantile": {"num_quantiles": 8, "quantile_kappa": 0.0},
    "implicit_quantile": {"num_taus": 16, "num_target_taus": 16, "num_action_taus": 64, "quantile_kappa": 0.0},
}


@pytest.mark.parametrize(("value", "double"), [*((value, False) for value in WIDE), ("categorical", True)])
def test_values_and_distributions_of_a_chain(value, double):
    settings = LearnerSettings(
        value=value, **WIDE[value], double=double, batch_size=64, target_update_period=20, learning_rate=0.02
    )
    generator = np.random.default_rng(0)
    units = (64,) if value == "implicit_quantile" else ()
    network = make_network("mlp", 1, (32,), 2, hidden_units=units, settings=settings)
    learner = Learner(network, settings, CPU, chain(generator, 64))
    for update in range(1500):
        learner.learning_rate = 0.02 * (1 - update / 1500) + 1e-4
        learner.update(chain(generator, 64))
    obs = torch.from_numpy(STATES)[:, None]
    with torch.no_grad():
        means = learner.online(obs).numpy()
        # Quantiles of two masses are not their mean: the midpoints count what lies on each side of the jump.
        np.testing.assert_allclose(means, TRUE, atol=0.2 if "quantile" in value else 0.1)
        if (
            value == "categorical"
        ):  # atoms at all multiples of 0.5: the returns of state 0 are 0.5 and 2, of state 1 -1 and 2
            found = learner.online.outputs(obs).softmax(2)
            for state, returns in enumerate(([0.5, 2.0], [-1.0, 2.0])):
                masses = [found[state, 0, round((x + 2) / 0.5)].item() for x in returns]
                np.testing.assert_allclose(masses, [0.25, 0.75], atol=0.06)
        if "quantile" in value:
            tau = torch.tensor([[0.06, 0.15, 0.35, 0.5, 0.65, 0.85, 0.94]]).expand(2, -1)
            if value == "quantile":
                tau, found = learner.online.representation.tau.expand(2, -1), learner.online.outputs(obs)
            else:
                found = learner.online.outputs(obs, tau)
            for state, (low, high) in enumerate(((0.5, 2.0), (-1.0, 2.0))):
                for level, quantile in zip(tau[state].tolist(), found[state, 0].tolist(), strict=True):
                    if abs(level - 0.25) > 0.08:
                        assert quantile == pytest.approx(low if level < 0.25 else high, abs=0.25)


@pytest.mark.parametrize("value", [value for value in WIDE if value != "scalar"])
def test_quantiles_of_returns_for_display(value):
    """Evenly spaced levels; in order, and those of the distribution."""
    settings = LearnerSettings(value=value, **WIDE[value])
    network = make_network("mlp", 1, (32,), 2, hidden_units=(16,), settings=settings)
    policy, action = Policy(network, CPU), np.array([1, 0])
    found = policy.quantiles(STATES[:, None], action)
    assert found.shape == (2, 21)
    assert (np.diff(found, axis=1) >= 0).all()
    with torch.no_grad():
        obs, levels = torch.from_numpy(STATES)[:, None], (torch.arange(21) + 0.5) / 21
        if value == "implicit_quantile":
            expected = network.outputs(obs, levels.expand(2, -1))[[0, 1], action].sort(1).values
        elif value == "quantile":
            ordered = network.outputs(obs)[[0, 1], action].sort(1).values.numpy()
            centres = (np.arange(8) + 0.5) / 8
            expected = np.stack([np.interp(levels, centres, row) for row in ordered])
        else:
            below, support = network.outputs(obs)[[0, 1], action].softmax(1).cumsum(1), network.representation.support
            expected = [[support[int((row < level).sum())].item() for level in levels] for row in below]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert Policy(make_network("mlp", 1, (32,), 2), CPU).quantiles(STATES[:, None], action) is None


def test_munchausen_on_the_chain():
    """In state 1: v = t ln sum exp(q / t) and q_a = (x_a - alpha v) / (1 - alpha), with the mean rewards x."""
    alpha, t = 0.5, 1.0
    settings = LearnerSettings(
        loss="mse", munchausen=True, munchausen_alpha=alpha, munchausen_temperature=t, munchausen_least=-50.0,
        batch_size=64, target_update_period=20, learning_rate=0.02,
    )  # fmt: skip
    generator, network = np.random.default_rng(0), make_network("mlp", 1, (32,), 2, hidden_units=())
    learner = Learner(network, settings, CPU, chain(generator, 64))
    for update in range(3000):
        learner.learning_rate = 0.02 * (1 - update / 3000) + 1e-4
        learner.update(chain(generator, 64))

    def solved(x):
        v = 0.0
        for _ in range(10_000):
            v += 0.01 * (t * np.logaddexp(*((x - alpha * v) / (1 - alpha) / t)) - v)
        return v, (x - alpha * v) / (1 - alpha)

    v1, q1 = solved(TRUE[1])
    _, q0 = solved(np.array([1 + GAMMA * v1, 1.2]))
    with torch.no_grad():
        np.testing.assert_allclose(learner.online(torch.from_numpy(STATES)[:, None]), [q0, q1], atol=0.1)


def test_settings_are_kept(tmp_path):
    config = small("munchausen-implicit", total_steps=60)
    pydqn.train(config, tmp_path)
    assert dataclasses.replace(load_run(tmp_path), env_id=config.env_id) == config
    board = EventAccumulator(str(tmp_path)).Reload()
    assert board.Histograms("learning/return_quantiles")[-1].histogram_value.num == 21 * config.batch_size

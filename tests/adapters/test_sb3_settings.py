"""Stable-Baselines3's settings reach our buffer: n-step returns, discounts, early samples and saving."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from gymnasium import spaces

pytest.importorskip("stable_baselines3", reason="needs Stable-Baselines3: pip install 'pydqn[adapters]'")

import torch
from stable_baselines3 import DQN
from stable_baselines3.common.buffers import NStepReplayBuffer
from stable_baselines3.common.buffers import ReplayBuffer as TheirBuffer
from stable_baselines3.common.env_util import make_vec_env

from pydqn.adapters import cleanrl
from pydqn.adapters.sb3 import PrioritizedDQN, ReplayBuffer
from tests.helpers.sb3_models import model_of

IMAGES = spaces.Box(0, 255, (4, 8, 8), np.uint8)
TWO = spaces.Discrete(2)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def images(steps):
    """Stacks of four frames and what follows them, (steps, 1, 4, 8, 8) each."""
    frames = np.random.default_rng(0).integers(1, 255, (steps + 4, 8, 8), np.uint8)
    stacks = np.stack([frames[step : step + 4] for step in range(steps + 1)])[:, None]
    return stacks[:-1], stacks[1:]


def filled(kind, n_steps):
    settings = {"n_steps": n_steps, "gamma": 0.9} if kind == "sb3" else {}
    if kind == "rainbow":
        buffer = cleanrl.PrioritizedReplayBuffer(20, IMAGES.shape, "cpu", n_steps, 0.9)
    else:
        buffer = (ReplayBuffer if kind == "sb3" else cleanrl.ReplayBuffer)(20, IMAGES, TWO, "cpu", **settings)
    for obs, next_obs in zip(*images(10), strict=True):
        row = (np.array([0]), np.array([1.0]))
        if kind == "rainbow":
            buffer.add(obs, *row, next_obs, np.array([False]))
        else:
            buffer.add(obs, next_obs, *row, np.array([False]), [{}])
    return buffer


@pytest.mark.parametrize(("kind", "n_steps"), [("sb3", 1), ("sb3", 3), ("cleanrl", 1), ("rainbow", 1), ("rainbow", 3)])
def test_samples_share_no_memory(kind, n_steps):
    buffer = filled(kind, n_steps)
    drawn = [buffer.sample(16)]
    if kind == "sb3":
        drawn += [buffer.sample_weighted(16)[0], buffer._get_samples(buffer.transitions.frame_replay.valid_indices())]
    for samples in drawn:
        before = samples.next_observations.clone(), samples.observations.clone()
        samples.observations[:] = 0
        assert torch.equal(samples.next_observations, before[0])
        samples.next_observations[:] = 7
        assert (samples.observations == 0).all()
        assert samples.observations.is_contiguous()
        assert samples.next_observations.is_contiguous()
    again = buffer.transitions.gather(buffer.transitions.frame_replay.valid_indices())
    np.testing.assert_array_equal(again.obs[:, None], images(10)[0][: len(again.obs)])  # nor with the buffer


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_first_windows_are_cut_short_as_theirs(steps, n_envs):
    """With windows of four steps, none of which is complete yet."""
    space = spaces.Box(-9, 9, (2,))
    arguments = (100, space, TWO, "cpu", n_envs)
    ours = ReplayBuffer(*arguments, n_steps=4, gamma=0.9, prioritized=True)
    theirs = NStepReplayBuffer(*arguments, n_steps=4, gamma=0.9)
    random = np.random.default_rng(0)
    obs = random.normal(size=(steps + 1, n_envs, 2)).astype(np.float32)
    for step in range(steps):
        row = (random.integers(2, size=n_envs), random.normal(size=n_envs), np.zeros(n_envs, bool), [{}] * n_envs)
        for buffer in (ours, theirs):
            buffer.add(obs[step].copy(), obs[step + 1].copy(), *row)
    start, env_index = (grid.ravel() for grid in np.meshgrid(np.arange(steps), np.arange(n_envs)))
    mine = ours._cut_short(start, env_index, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np.random, "randint", lambda *_, **__: env_index)
        their = theirs._get_samples(start)
    for name, one, other in zip(mine._fields, mine, their, strict=True):
        assert one.dtype == other.dtype, name
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6, msg=name)
    drawn, weight, index = ours.sample_weighted(1000)
    rows = {(*obs.tolist(), *reward.tolist()) for obs, reward in zip(mine.observations, mine.rewards, strict=True)}
    seen = {(*obs.tolist(), *reward.tolist()) for obs, reward in zip(drawn.observations, drawn.rewards, strict=True)}
    assert seen == rows
    assert (weight == 1).all()
    ours.update_priorities(index, np.ones(1000))  # ignored: the transitions have none yet
    ours.reset()
    with pytest.raises(RuntimeError, match="no transition"):
        ours.sample(1)


def qrdqn():
    return pytest.importorskip("sb3_contrib", reason="needs sb3-contrib: pip install 'pydqn[adapters]'").QRDQN


@pytest.mark.parametrize("kind", [DQN, PrioritizedDQN, qrdqn])
@pytest.mark.parametrize("n_envs", [1, 2])
def test_learning_starts_at_once(kind, n_envs):
    """As with their own buffer, which has one transition after one step."""
    kind = kind() if kind is qrdqn else kind
    settings = {"n_steps": 3, "gamma": 0.9} if kind is PrioritizedDQN else {}
    if kind is not PrioritizedDQN:
        settings = {"gamma": 0.9, "replay_buffer_class": ReplayBuffer}
        settings["replay_buffer_kwargs"] = {"n_steps": 3, "gamma": 0.9}
    env = make_vec_env("CartPole-v1", n_envs=n_envs)
    model = model_of(kind, env, learning_starts=0, train_freq=1, **settings).learn(20 * n_envs)
    theirs = model_of(DQN if kind is PrioritizedDQN else kind, env, learning_starts=0, train_freq=1, n_steps=3)
    assert model._n_updates == theirs.learn(20 * n_envs)._n_updates == 20


@pytest.mark.parametrize("settings", [{"n_steps": 3}, {"replay_buffer_kwargs": {"n_steps": 3}}])
@pytest.mark.parametrize("loaded", [False, True])
def test_the_prioritized_buffer_has_the_models_settings(settings, loaded, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # SB3 would warn that n_steps is ignored
        model = model_of(PrioritizedDQN, gamma=0.9, learning_starts=10, **settings).learn(60)
        if loaded:
            model.save(tmp_path / "model")
            model = PrioritizedDQN.load(tmp_path / "model", env=model.get_env(), device="cpu")
            model.learn(60, reset_num_timesteps=False)
    buffer = model.replay_buffer
    assert (buffer.n_steps, buffer.gamma, buffer.transitions.frame_replay.gamma) == (3, 0.9, 0.9)
    assert buffer.transitions.frame_replay.n_step == 3
    assert model.n_steps == settings.get("n_steps", 1)
    samples = buffer.sample(200)
    windows = {round(float(value), 4) for value in samples.discounts}
    assert windows <= {0.9, 0.81, 0.729}
    assert 0.729 in windows
    for reward, discount in zip(samples.rewards.ravel(), samples.discounts.ravel(), strict=True):  # of one each
        steps = round(np.log(float(discount)) / np.log(0.9))
        assert float(reward) == pytest.approx(sum(0.9**k for k in range(steps)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"replay_buffer_kwargs": {"gamma": 0.9}},
            "replay_buffer_kwargs: expected gamma=0.99, as in the model, got 0.9",
        ),
        ({"n_steps": 3, "replay_buffer_kwargs": {"n_steps": 5}}, "expected n_steps=3, as in the model, got 5"),
        ({"replay_buffer_kwargs": {"prioritized": False}}, "expected prioritized=True, .* use SB3's DQN"),
        (
            {"replay_buffer_class": TheirBuffer},
            "replay_buffer_class: expected pydqn's ReplayBuffer, got ReplayBuffer of",
        ),
    ],
)
def test_contradictions_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        model_of(PrioritizedDQN, **settings)


def test_a_loaded_model_may_be_given_another_discount(tmp_path):
    model_of(PrioritizedDQN, n_steps=3).save(tmp_path / "model")
    model = PrioritizedDQN.load(tmp_path / "model", device="cpu", gamma=0.5)
    assert model.replay_buffer.gamma == model.gamma == 0.5


def test_returns_of_several_steps_need_a_discount():
    for make in (
        lambda: ReplayBuffer(10, spaces.Box(0, 1, (2,)), TWO, n_steps=3),
        lambda: model_of(DQN, replay_buffer_class=ReplayBuffer, replay_buffer_kwargs={"n_steps": 3}),
    ):
        with pytest.raises(ValueError, match="gamma: expected the model's discount, since n_steps is 3, got None"):
            make()


@pytest.mark.parametrize("kind", [DQN, PrioritizedDQN])
def test_a_saved_buffer_is_taken_over(kind, tmp_path):
    settings = {"learning_starts": 20, "gamma": 0.9}
    if kind is DQN:
        settings |= {"replay_buffer_class": ReplayBuffer, "replay_buffer_kwargs": {"n_steps": 2, "gamma": 0.9}}
    model = model_of(kind, **settings).learn(200)
    model.save(tmp_path / "model")
    model.replay_buffer.save(tmp_path / "buffer")
    other = kind.load(tmp_path / "model", env=make_vec_env("CartPole-v1"))
    other.replay_buffer.restore(tmp_path / "buffer")
    for one, two in zip(model.replay_buffer.sample(30), other.replay_buffer.sample(30), strict=True):
        assert one is two is None or torch.equal(one, two)
    held = len(other.replay_buffer)
    assert other.replay_buffer.size() == held
    other.learn(50, reset_num_timesteps=False)
    assert len(other.replay_buffer) > held
    with pytest.raises(ValueError, match="the replay buffer has max_transitions 500, expected 20"):
        model_of(kind, **{**settings, "buffer_size": 20}).replay_buffer.restore(tmp_path / "buffer")


@pytest.mark.parametrize("shape", [(1, 2), (4, 8, 8), (2, 8, 8, 4)])
def test_observations_are_not_reshaped(shape):
    """The numbers of two environments' images in another order would be other images."""
    buffer = ReplayBuffer(10, spaces.Box(0, 255, (4, 8, 8), np.uint8), TWO, n_envs=2)
    row = (np.zeros(2, int), np.zeros(2), np.zeros(2, bool), [{}, {}])
    with pytest.raises(ValueError, match=r"obs: expected shape \(2, 4, 8, 8\), got shape"):
        buffer.add(np.zeros(shape, np.uint8), np.zeros((2, 4, 8, 8), np.uint8), *row)


def test_actions_are_of_the_space():
    buffer = ReplayBuffer(10, spaces.Box(0, 1, (2,)), TWO)
    with pytest.raises(ValueError, match=r"action: expected integers of Discrete\(2\), got \[2\]"):
        buffer.add(np.zeros((1, 2)), np.zeros((1, 2)), np.array([2]), np.zeros(1), np.zeros(1), [{}])

"""Gymnasium's environments, against plain ones, step by step."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest

from pydqn import preset
from pydqn.envs.discrete import StateEnv
from pydqn.envs.make import make_envs
from pydqn.plotting.values import outline
from tests.helpers.stepping import reset_envs, step


def test_actions_are_discrete():
    with pytest.raises(ValueError, match="env_id.*Discrete"):
        make_envs(preset("pong", env_id="Pendulum-v1"), 1, 0)


def test_lockstep_with_a_plain_cartpole():
    envs, frames = reset_envs(1, 11, env_id="CartPole-v1")
    plain = gymnasium.make("CartPole-v1")
    seed = int(np.random.SeedSequence(11).generate_state(1)[0])
    expected, _ = plain.reset(seed=seed)
    generator = np.random.default_rng(0)
    episodes = []
    for _ in range(500):
        np.testing.assert_array_equal(frames[0], expected)
        action = int(generator.integers(2))
        result = step(envs, frames, [action])
        expected, reward, terminated, truncated, _ = plain.step(action)
        assert (result.reward[0], result.terminated[0], result.truncated[0]) == (reward, terminated, truncated)
        if terminated or truncated:
            np.testing.assert_array_equal(frames[0], expected)
            episodes += result.episodes
            assert result.episodes[0].total == result.episodes[0].steps
            result = step(envs, frames, [action])
            expected, _ = plain.reset()
            assert result.first[0]
            assert result.reward[0] == 0
    assert len(episodes) > 10


def test_a_time_limit_is_a_truncation():
    envs, frames = reset_envs(2, env_id="MountainCar-v0")
    for count in range(1, 201):
        result = step(envs, frames, [1, 1])
        assert result.truncated.all() == (count == 200)
    assert not result.terminated.any()
    assert [episode.total for episode in result.episodes] == [-200.0, -200.0]


def test_images_need_no_display(monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    envs = make_envs(preset("pong", env_id="CartPole-v1"), 1, 0, render=True)
    frames = np.zeros((1, 4), np.float32)
    envs.reset(frames)
    first = envs.image()
    assert (first.shape, first.dtype) == ((400, 600, 3), np.uint8)
    for _ in range(5):
        step(envs, frames, [1])
    assert not np.array_equal(envs.image(), first)


def test_a_missing_extra_names_the_pip_command(monkeypatch):
    envs = make_envs(preset("pong", env_id="CartPole-v1"), 1, 0, render=True)
    envs.reset(np.zeros((1, 4), np.float32))

    def render():
        raise gymnasium.error.DependencyNotInstalled('no pygame: run `pip install "gymnasium[classic-control]"`')

    monkeypatch.setattr(envs._envs[0].unwrapped, "render", render)
    with pytest.raises(RuntimeError, match="pip install"):
        envs.image()


def test_discrete_observations_are_one_hot():
    _, frames = reset_envs(3, env_id="FrozenLake-v1")
    np.testing.assert_array_equal(frames, np.eye(16)[[0, 0, 0]])


def test_tuples_of_discrete_observations_are_one_number():
    """In lockstep with a plain Blackjack: the last part of an observation changes the number fastest."""
    envs, frames = reset_envs(2, 5, env_id="Blackjack-v1")
    assert frames.shape == (2, 704)
    plain = [gymnasium.make("Blackjack-v1") for _ in range(2)]
    seeds = np.random.SeedSequence(5).generate_state(2)
    observed = [env.reset(seed=int(seed))[0] for env, seed in zip(plain, seeds, strict=True)]
    generator, done = np.random.default_rng(0), [False, False]
    for _ in range(200):
        assert (frames.sum(axis=1) == 1).all()
        states = [np.ravel_multi_index(tuple(map(int, parts)), (32, 11, 2)) for parts in observed]
        assert frames.argmax(axis=1).tolist() == states
        action = generator.integers(2, size=2)
        result = step(envs, frames, action)
        for env_index, env in enumerate(plain):
            if done[env_index]:
                observed[env_index], done[env_index] = env.reset()[0], False
            else:
                observed[env_index], reward, terminated, truncated, _ = env.step(int(action[env_index]))
                done[env_index] = terminated or truncated
                assert result.reward[env_index] == reward


def test_limits_of_steps():
    envs, frames = reset_envs(env_id="CliffWalking-v1", max_episode_steps=7)
    assert [bool(step(envs, frames, [0]).truncated[0]) for _ in range(7)] == [False] * 6 + [True]
    assert StateEnv(preset("frozenlake"), 0).most_steps == 100
    assert StateEnv(preset("frozenlake", env_id="CliffWalking-v1"), 0).most_steps is None


def test_outlines_of_small_tasks():
    assert outline(preset("pong", env_id="FrozenLake-v1")).letters == ["SFFF", "FHFH", "FFFH", "HFFG"]
    cliff = outline(preset("pong", env_id="CliffWalking-v1"))
    assert cliff.letters == ["FFFFFFFFFFFF"] * 3 + ["SCCCCCCCCCCG"]
    low, high = outline(preset("pong", env_id="MountainCar-v0")).bounds
    np.testing.assert_allclose([low, high], [[-1.2, -0.07], [0.6, 0.07]], rtol=1e-6)
    assert outline(preset("pong", env_id="Blackjack-v1")).sizes == (32, 11, 2)
    # Each arrow of the map leads where the environment's own transition probabilities do.
    for env_id, columns in (("FrozenLake8x8-v1", 8), ("CliffWalking-v1", 12)):
        task = outline(preset("frozenlake", env_id=env_id))
        published = gymnasium.make(env_id).unwrapped.P
        for action, (right, up) in enumerate(task.directions):
            state = columns + 3 if env_id.startswith("Cliff") else 3 * columns + 1
            led_to = {outcome[1] for outcome in published[state][action]}
            assert state + right - up * columns in led_to
            assert state - right + up * columns not in led_to

"""The environments against plain emulators, step by step."""

from __future__ import annotations

import ale_py
import gymnasium
import numpy as np
import pytest
from ale_py import roms
from gymnasium.wrappers import AtariPreprocessing

from pydqn import preset
from pydqn.envs.atari import AtariEnvs
from pydqn.envs.discrete import StateEnv
from pydqn.envs.make import make_envs
from pydqn.plotting.values import outline
from pydqn.preprocess import resize_area


def open_lanes(num_envs=1, seed=0, **overrides):
    settings = {"noop_max_frames": 0, "clip_rewards": False, **overrides}
    envs = make_envs(preset("pong", **settings), num_envs, seed)
    frames = np.zeros((num_envs, *envs.frame_shape), envs.dtype)
    envs.reset(frames)
    return envs, frames


def step(envs, frames, action):
    envs.send(np.asarray(action))
    return envs.recv(frames)


@pytest.mark.parametrize("game", ["pong", "breakout", "space_invaders", "seaquest", "qbert"])
@pytest.mark.parametrize("terminal_on_life_loss", [False, True])
def test_lockstep_with_gymnasium(game, terminal_on_life_loss):
    """The same actions give the frames, rewards and ends of gymnasium's AtariPreprocessing (without its no-ops)."""
    gymnasium.register_envs(ale_py)
    name = game.title().replace("_", "")
    plain = gymnasium.make(f"ALE/{name}-v5", frameskip=1, repeat_action_probability=0.0, full_action_space=False)
    twin = AtariPreprocessing(plain, noop_max=0, frame_skip=4, terminal_on_life_loss=False)
    envs, frames = open_lanes(env_id=game, terminal_on_life_loss=terminal_on_life_loss)
    expected, info = twin.reset(seed=0)
    np.testing.assert_array_equal(frames[0], expected)
    generator = np.random.default_rng(0)
    lives, total, games = info["lives"], 0.0, 0
    for _ in range(2500):
        action = int(generator.integers(envs.num_actions))
        ours = step(envs, frames, [action])
        expected, reward, terminated, truncated, info = twin.step(action)
        total += reward
        assert ours.reward[0] == reward
        assert not ours.first[0]
        assert not truncated
        assert not ours.truncated[0]
        assert ours.terminated[0] == (terminated or (terminal_on_life_loss and info["lives"] < lives))
        lives = info["lives"]
        if not terminated:  # in the middle of a skip the two keep different images of an episode that is over
            np.testing.assert_array_equal(frames[0], expected)
            assert not ours.episodes
            continue
        assert [episode.total for episode in ours.episodes] == [total]
        games, total = games + 1, 0.0
        opening = step(envs, frames, [action])
        expected, info = twin.reset()
        lives = info["lives"]
        assert opening.first[0]
        assert not opening.episodes
        assert not opening.terminated[0]
        np.testing.assert_array_equal(frames[0], expected)
    assert games >= 1
    envs.close()
    twin.close()


def test_a_capped_game_shows_its_true_last_frame():
    """ALE alone returns a stale image at the cap; the bootstrap needs the frame that followed the last action."""
    envs, frames = open_lanes(max_episode_frames=200)
    free, free_frames = open_lanes()
    generator = np.random.default_rng(0)
    opening = frames.copy()
    for count in range(1, 51):
        action = generator.integers(6, size=1)
        ours, theirs = step(envs, frames, action), step(free, free_frames, action)
        np.testing.assert_array_equal(frames, free_frames)
        assert ours.reward[0] == theirs.reward[0]
        assert ours.truncated[0] == (count == 50)
        assert not ours.terminated[0]
    assert ours.episodes[0].steps == 50
    between = step(envs, frames, action)  # the frame that ALE ran on for: an episode of one frame
    assert between.first[0]
    assert not between.episodes
    again = step(envs, frames, action)
    assert again.first[0]
    np.testing.assert_array_equal(frames, opening)
    after = step(envs, frames, action)
    assert not after.first[0]


@pytest.mark.parametrize("frame_skip", [1, 2, 3, 4])
def test_frame_skip_pools_the_last_two_frames_and_no_stale_one(frame_skip):
    envs, frames = open_lanes(frame_skip=frame_skip)
    ale = ale_py.ALEInterface()
    ale.setFloat("repeat_action_probability", 0.0)
    ale.loadROM(roms.get_rom_path("pong"))
    ale.reset_game()
    actions = ale.getMinimalActionSet()
    generator = np.random.default_rng(1)
    for _ in range(200):
        action = int(generator.integers(6))
        step(envs, frames, [action])
        screens = []
        for _ in range(frame_skip):
            ale.act(actions[action])
            screens.append(ale.getScreenGrayscale())
        np.testing.assert_array_equal(frames[0], resize_area(screens[-1], screens[-2] if frame_skip > 1 else None))


def test_clipping_changes_what_the_learner_sees_and_not_the_return():
    envs, frames = open_lanes(env_id="space_invaders", clip_rewards=True, num_envs=2)
    generator = np.random.default_rng(0)
    seen, totals = set(), []
    while len(totals) < 3:
        result = step(envs, frames, generator.integers(envs.num_actions, size=2))
        seen |= set(result.reward.tolist())
        totals += [episode.total for episode in result.episodes]
    assert seen == {0.0, 1.0}
    assert max(totals) > 20
    assert all(total % 5 == 0 for total in totals)


def test_a_lost_life_does_not_end_the_game():
    envs, frames = open_lanes(env_id="breakout", terminal_on_life_loss=True)
    generator = np.random.default_rng(0)
    deaths = 0
    for _ in range(3000):
        result = step(envs, frames, generator.integers(4, size=1))
        deaths += int(result.terminated[0])
        if result.episodes:
            break
    assert deaths == 5


def test_sticky_actions_and_seeds():
    def trace(**options):
        envs, frames = open_lanes(num_envs=3, noop_max_frames=30, **options)
        seen = [frames.copy()]
        for time_step in range(40):
            step(envs, frames, np.full(3, time_step // 3 % 6))
            seen.append(frames.copy())
        return np.stack(seen)

    for sticky in (0.0, 0.25):
        same, again = trace(seed=5, sticky_actions=sticky), trace(seed=5, sticky_actions=sticky)
        np.testing.assert_array_equal(same, again)
        assert not np.array_equal(same, trace(seed=6, sticky_actions=sticky))
        assert not np.array_equal(same[:, 0], same[:, 1])
    assert not np.array_equal(trace(seed=5, sticky_actions=0.0), trace(seed=5, sticky_actions=0.25))
    np.testing.assert_array_equal(trace(seed=0), trace(seed=0))


def test_noops_fire_and_action_sets():
    starts = {open_lanes(env_id="ms_pacman", seed=seed, noop_max_frames=30)[1].tobytes() for seed in range(12)}
    assert len(starts) > 3
    assert open_lanes(full_action_space=True)[0].num_actions == 18
    assert open_lanes()[0].num_actions == 6


def test_fire_puts_the_ball_in_play():
    moved = []
    for fire in (True, False):
        envs, frames = open_lanes(env_id="breakout", fire_reset=fire)
        seen = []
        for _ in range(20):
            step(envs, frames, [0])
            seen.append(frames.copy())
        moved.append(np.ptp(np.stack(seen), axis=0)[0, 40:80].any())  # between wall and paddle
    assert moved == [True, False]


@pytest.mark.parametrize("preprocess", ["crop_nearest", "crop_area"])
def test_colour_kernels(preprocess):
    envs, frames = open_lanes(preprocess=preprocess)
    step(envs, frames, [0])
    assert frames.any()
    assert not np.array_equal(frames, open_lanes()[1])


def test_tall_screens():
    envs, frames = open_lanes(env_id="pacman")
    step(envs, frames, [0])
    assert frames.any()


def test_the_camera_follows_the_game():
    """Sticky actions and no-ops drawn at random: the image is still that of the frame."""
    envs = AtariEnvs("pong", preset("pong", sticky_actions=0.25), 1, 3, render=True)
    frames = np.zeros((1, 84, 84), np.uint8)
    envs.reset(frames)
    assert envs.image().shape == (210, 160, 3)
    generator = np.random.default_rng(0)
    for _ in range(300):
        step(envs, frames, generator.integers(6, size=1))
        gray = (envs.image() @ np.array([0.2989, 0.587, 0.114])).round().astype(np.uint8)
        # ALE rounds its greys itself and takes the maximum of greys, not of colours: nearly the same image.
        assert np.abs(resize_area(gray).astype(int) - frames[0]).mean() < 1


def test_actions_are_discrete():
    with pytest.raises(ValueError, match="env_id.*Discrete"):
        make_envs(preset("pong", env_id="Pendulum-v1"), 1, 0)


# --- Gymnasium's environments ---


def test_lockstep_with_a_plain_cartpole():
    envs = make_envs(preset("pong", env_id="CartPole-v1"), 1, 11)
    frames = np.zeros((1, 4), np.float32)
    envs.reset(frames)
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
    envs = make_envs(preset("pong", env_id="MountainCar-v0"), 2, 0)
    frames = np.zeros((2, 2), np.float32)
    envs.reset(frames)
    for count in range(1, 201):
        result = step(envs, frames, [1, 1])
        assert result.truncated.all() == (count == 200)
    assert not result.terminated.any()
    assert [episode.total for episode in result.episodes] == [-200.0, -200.0]


def test_clipping_in_gymnasium():
    envs = make_envs(preset("pong", env_id="CliffWalking-v1", clip_rewards=True), 1, 0)
    frames = np.zeros((1, 48), np.float32)
    envs.reset(frames)
    result = step(envs, frames, [1])  # to the right, off the cliff: -100
    assert result.reward[0] == -1
    envs = make_envs(preset("pong", env_id="CliffWalking-v1", clip_rewards=False), 1, 0)
    envs.reset(frames)
    assert step(envs, frames, [1]).reward[0] == -100


def test_pictures_need_no_display(monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    envs = make_envs(preset("pong", env_id="CartPole-v1"), 1, 0, render=True)
    frames = np.zeros((1, 4), np.float32)
    envs.reset(frames)
    opening = envs.image()
    assert (opening.shape, opening.dtype) == ((400, 600, 3), np.uint8)
    for _ in range(5):
        step(envs, frames, [1])
    assert not np.array_equal(envs.image(), opening)


def test_a_missing_extra_names_the_pip_command(monkeypatch):
    envs = make_envs(preset("pong", env_id="CartPole-v1"), 1, 0, render=True)
    envs.reset(np.zeros((1, 4), np.float32))

    def render():
        raise gymnasium.error.DependencyNotInstalled('no pygame: run `pip install "gymnasium[classic-control]"`')

    monkeypatch.setattr(envs._envs[0].unwrapped, "render", render)
    with pytest.raises(RuntimeError, match="pip install"):
        envs.image()


def test_discrete_observations_are_one_hot():
    envs = make_envs(preset("pong", env_id="FrozenLake-v1"), 3, 0)
    frames = np.zeros((3, 16), np.float32)
    envs.reset(frames)
    np.testing.assert_array_equal(frames, np.eye(16)[[0, 0, 0]])


def test_tuples_of_discrete_observations_are_one_number():
    """In lockstep with a plain Blackjack: each observation has its own place, the last part counting fastest."""
    envs = make_envs(preset("pong", env_id="Blackjack-v1"), 2, 5)
    frames = np.zeros((2, 704), np.float32)
    envs.reset(frames)
    plain = [gymnasium.make("Blackjack-v1") for _ in range(2)]
    seeds = np.random.SeedSequence(5).generate_state(2)
    seen = [env.reset(seed=int(seed))[0] for env, seed in zip(plain, seeds, strict=True)]
    generator, done = np.random.default_rng(0), [False, False]
    for _ in range(200):
        assert (frames.sum(axis=1) == 1).all()
        places = [np.ravel_multi_index(tuple(map(int, parts)), (32, 11, 2)) for parts in seen]
        assert frames.argmax(axis=1).tolist() == places
        action = generator.integers(2, size=2)
        result = step(envs, frames, action)
        for env_index, env in enumerate(plain):
            if done[env_index]:
                seen[env_index], done[env_index] = env.reset()[0], False
            else:
                seen[env_index], reward, terminated, truncated, _ = env.step(int(action[env_index]))
                done[env_index] = terminated or truncated
                assert result.reward[env_index] == np.sign(reward)


def test_limits_of_steps():
    envs = make_envs(preset("pong", env_id="CliffWalking-v1", max_episode_steps=7), 1, 0)
    frames = np.zeros((1, 48), np.float32)
    envs.reset(frames)
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
    # Where each arrow of the map leads, by the environment's own transition probabilities.
    for env_id, columns in (("FrozenLake8x8-v1", 8), ("CliffWalking-v1", 12)):
        task = outline(preset("frozenlake", env_id=env_id))
        published = gymnasium.make(env_id).unwrapped.P
        for action, (right, up) in enumerate(task.directions):
            state = columns + 3 if env_id.startswith("Cliff") else 3 * columns + 1
            led_to = {outcome[1] for outcome in published[state][action]}
            assert state + right - up * columns in led_to
            assert state - right + up * columns not in led_to

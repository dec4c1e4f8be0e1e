"""Atari environments, against a bare console and Gymnasium's wrapper."""

from __future__ import annotations

import ale_py
import gymnasium
import numpy as np
import pytest
from ale_py import roms
from gymnasium.wrappers import AtariPreprocessing

from pydqn import preset
from pydqn.envs.atari import AtariEnvs
from pydqn.preprocess import crop_nearest, resize_area
from tests.helpers.stepping import reset_envs, step


def bare_console(game):
    ale = ale_py.ALEInterface()
    ale.setFloat("repeat_action_probability", 0.0)
    ale.loadROM(roms.get_rom_path(game))
    ale.reset_game()
    return ale, ale.getMinimalActionSet()


@pytest.mark.parametrize("game", ["pong", "breakout", "space_invaders", "seaquest", "qbert"])
@pytest.mark.parametrize("terminal_on_life_loss", [False, True])
def test_lockstep_with_gymnasium(game, terminal_on_life_loss):
    """The same actions give the frames, rewards and ends of Gymnasium's AtariPreprocessing (without its no-ops)."""
    gymnasium.register_envs(ale_py)
    name = game.title().replace("_", "")
    plain = gymnasium.make(f"ALE/{name}-v5", frameskip=1, repeat_action_probability=0.0, full_action_space=False)
    reference = AtariPreprocessing(plain, noop_max=0, frame_skip=4, terminal_on_life_loss=False)
    envs, frames = reset_envs(env_id=game, terminal_on_life_loss=terminal_on_life_loss)
    expected, info = reference.reset(seed=0)
    np.testing.assert_array_equal(frames[0], expected)
    generator = np.random.default_rng(0)
    lives, total, ended = info["lives"], 0.0, 0
    for _ in range(2500):
        action = int(generator.integers(envs.num_actions))
        ours = step(envs, frames, [action])
        expected, reward, terminated, truncated, info = reference.step(action)
        total += reward
        assert ours.reward[0] == reward
        assert not ours.first[0]
        assert not truncated
        assert not ours.truncated[0]
        assert ours.terminated[0] == (terminated or (terminal_on_life_loss and info["lives"] < lives))
        lives = info["lives"]
        if not terminated:  # within a frame skip, the two keep different frames of an episode that has ended
            np.testing.assert_array_equal(frames[0], expected)
            assert not ours.episodes
            continue
        assert [episode.total for episode in ours.episodes] == [total]
        ended, total = ended + 1, 0.0
        after = step(envs, frames, [action])
        expected, info = reference.reset()
        lives = info["lives"]
        assert after.first[0]
        assert not after.episodes
        assert not after.terminated[0]
        np.testing.assert_array_equal(frames[0], expected)
    assert ended >= 1
    envs.close()
    reference.close()


def test_a_truncated_episode_has_its_last_frame():
    """ALE alone would return an older frame; bootstrapping needs the frame that followed the last action."""
    envs, frames = reset_envs(max_episode_frames=200)
    free, free_frames = reset_envs()
    generator = np.random.default_rng(0)
    first_frames = frames.copy()
    for count in range(1, 51):
        action = generator.integers(6, size=1)
        ours, theirs = step(envs, frames, action), step(free, free_frames, action)
        np.testing.assert_array_equal(frames, free_frames)
        assert ours.reward[0] == theirs.reward[0]
        assert ours.truncated[0] == (count == 50)
        assert not ours.terminated[0]
    assert ours.episodes[0].steps == 50
    between = step(envs, frames, action)  # the one frame that ALE still plays
    assert between.first[0]
    assert not between.episodes
    again = step(envs, frames, action)
    assert again.first[0]
    np.testing.assert_array_equal(frames, first_frames)
    after = step(envs, frames, action)
    assert not after.first[0]


@pytest.mark.parametrize("frame_skip", [1, 2, 3, 4])
def test_frame_skip_pools_the_last_two_frames_and_no_older_one(frame_skip):
    envs, frames = reset_envs(frame_skip=frame_skip)
    ale, actions = bare_console("pong")
    generator = np.random.default_rng(1)
    for _ in range(200):
        action = int(generator.integers(6))
        step(envs, frames, [action])
        screens = []
        for _ in range(frame_skip):
            ale.act(actions[action])
            screens.append(ale.getScreenGrayscale())
        np.testing.assert_array_equal(frames[0], resize_area(screens[-1], screens[-2] if frame_skip > 1 else None))


def test_a_lost_life_does_not_end_the_episode():
    envs, frames = reset_envs(env_id="breakout", terminal_on_life_loss=True)
    generator = np.random.default_rng(0)
    lost = 0
    for _ in range(3000):
        result = step(envs, frames, generator.integers(4, size=1))
        lost += int(result.terminated[0])
        if result.episodes:
            break
    assert lost == 5


def test_sticky_actions_and_seeds():
    def trace(**options):
        envs, frames = reset_envs(num_envs=3, noop_max_frames=30, **options)
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
    starts = {reset_envs(env_id="ms_pacman", seed=seed, noop_max_frames=30)[1].tobytes() for seed in range(12)}
    assert len(starts) > 3
    assert reset_envs(full_action_space=True)[0].num_actions == 18
    assert reset_envs()[0].num_actions == 6


def test_fire_puts_the_ball_in_play():
    moved = []
    for fire in (True, False):
        envs, frames = reset_envs(env_id="breakout", fire_reset=fire)
        seen = []
        for _ in range(20):
            step(envs, frames, [0])
            seen.append(frames.copy())
        moved.append(np.ptp(np.stack(seen), axis=0)[0, 40:80].any())  # between wall and paddle
    assert moved == [True, False]


@pytest.mark.parametrize("preprocess", ["crop_nearest", "crop_area"])
def test_colour_kernels(preprocess):
    envs, frames = reset_envs(preprocess=preprocess)
    step(envs, frames, [0])
    assert frames.any()
    assert not np.array_equal(frames, reset_envs()[1])


def test_tall_screens():
    envs, frames = reset_envs(env_id="pacman")
    step(envs, frames, [0])
    assert frames.any()


def test_the_image_is_that_of_the_frame():
    """Also with random sticky actions and no-ops."""
    envs = AtariEnvs("pong", preset("pong", sticky_actions=0.25), 1, 3, render=True)
    frames = np.zeros((1, 84, 84), np.uint8)
    envs.reset(frames)
    assert envs.image().shape == (210, 160, 3)
    generator = np.random.default_rng(0)
    for _ in range(300):
        step(envs, frames, generator.integers(6, size=1))
        gray = (envs.image() @ np.array([0.2989, 0.587, 0.114])).round().astype(np.uint8)
        # ALE rounds its greys itself and takes the maximum of greys, not of colours: the images are nearly the same.
        assert np.abs(resize_area(gray).astype(int) - frames[0]).mean() < 1


@pytest.mark.parametrize("max_pool", [False, True])
@pytest.mark.parametrize("preprocess", ["resize_area", "crop_nearest"])
def test_a_random_skip_against_a_bare_console(max_pool, preprocess):
    options = {"env_id": "space_invaders", "frame_skip": 2, "frame_skip_max": 4}
    envs, frames = reset_envs(max_pool=max_pool, preprocess=preprocess, **options)
    ale, actions = bare_console("space_invaders")
    image = ale.getScreenGrayscale if preprocess == "resize_area" else ale.getScreenRGB
    shrink = resize_area if preprocess == "resize_area" else crop_nearest
    np.testing.assert_array_equal(frames[0], shrink(image()))
    generator = np.random.default_rng(0)
    counts, rewards = [], 0
    while True:
        action = int(generator.integers(6))
        ours = step(envs, frames, [action])
        screens, reward = [], 0
        for _ in range(ours.frames):
            reward += ale.act(actions[action])
            screens.append(image())
        assert ours.reward[0] == reward
        assert ours.terminated[0] == ale.game_over()
        if ale.game_over():
            break
        counts.append(ours.frames)
        rewards += reward
        pooled = np.maximum(*screens[-2:]) if max_pool else screens[-1]
        np.testing.assert_array_equal(frames[0], shrink(pooled))
    assert ours.episodes[0].total == rewards + reward
    assert rewards > 0
    shares = np.bincount(counts, minlength=5)[2:] / len(counts)
    assert len(counts) > 100
    np.testing.assert_allclose(shares, 1 / 3, atol=0.15)
    after = step(envs, frames, [action])
    assert after.first[0]
    assert after.frames == 0
    ale.reset_game()
    np.testing.assert_array_equal(frames[0], shrink(image()))


def test_random_skips_differ_between_environments():
    envs, frames = reset_envs(num_envs=3, env_id="breakout", frame_skip=2, frame_skip_max=4)
    ends, firsts = [], 0
    for time_step in range(1500):
        result = step(envs, frames, np.full(3, time_step % 4))
        ends += [episode.env_index for episode in result.episodes]
        firsts += int(result.first.sum())
        assert 2 * (3 - result.first.sum() - result.terminated.sum()) <= result.frames <= 12
    assert set(ends) == {0, 1, 2}
    assert firsts == len(ends) or firsts == len(ends) - len(result.episodes)


@pytest.mark.parametrize("random_skip", [False, True])
def test_episodes_start_with_fire_and_then_action_2(random_skip):
    """The frames up to then are `first` ones; the episode is that of a console with the same actions."""
    skips = {"frame_skip": 2, "frame_skip_max": 3} if random_skip else {"frame_skip": 4}
    options = {"env_id": "breakout", "fire_reset": True, "max_episode_steps": 30, **skips}
    envs, frames = reset_envs(**options, max_pool=False)
    ale, actions = bare_console("breakout")
    if not random_skip:
        for action in (1, 2):
            for _ in range(4):
                ale.act(actions[action])
        np.testing.assert_array_equal(frames[0], resize_area(ale.getScreenGrayscale()))
        for _ in range(29):
            assert not step(envs, frames, [3]).first[0]
            for _ in range(4):
                ale.act(actions[3])
            np.testing.assert_array_equal(frames[0], resize_area(ale.getScreenGrayscale()))
    else:
        for _ in range(29):
            assert not step(envs, frames, [3]).first[0]
    truncated = step(envs, frames, [3])
    assert truncated.truncated[0]
    assert truncated.episodes[0].steps == 30
    firsts = 0
    while (result := step(envs, frames, [3])).first[0]:
        assert result.frames == 0
        firsts += 1
        first_frames = frames.copy()
    # Under a fixed skip, ALE still plays one frame. Then come the reset, FIRE and action 2.
    assert firsts == (3 if random_skip else 4)
    assert not np.array_equal(first_frames, frames)
    for _ in range(28):
        assert not step(envs, frames, [3]).truncated[0]
    assert step(envs, frames, [3]).truncated[0]


def test_games_without_fire_start_without_it():
    assert len(reset_envs(env_id="ms_pacman", fire_reset=True)[0]._start_actions) == 0


@pytest.mark.parametrize("skips", [{"frame_skip": 4}, {"frame_skip": 2, "frame_skip_max": 4}])
def test_limits_in_steps_and_in_frames(skips):
    envs, frames = reset_envs(num_envs=2, max_episode_steps=25, **skips)
    for count in range(1, 26):
        result = step(envs, frames, [0, 0])
        assert result.truncated.all() == (count == 25)
    for most in (80, 81):
        envs, frames = reset_envs(max_episode_frames=most, **skips)
        total = 0
        while not (result := step(envs, frames, [0])).truncated[0]:
            total += result.frames
        assert most - 4 < total + result.frames <= most


@pytest.mark.parametrize("options", [{"frame_skip": 2, "frame_skip_max": 4}, {"fire_reset": True}])
def test_the_image_is_that_of_the_frame_after_skips_and_start_actions(options):
    config = preset("pong", env_id="breakout", sticky_actions=0.25, max_episode_steps=60, **options)
    envs = AtariEnvs("breakout", config, 2, 3, render=True)
    frames = np.zeros((2, 84, 84), np.uint8)
    envs.reset(frames)
    generator = np.random.default_rng(0)
    for _ in range(300):
        step(envs, frames, generator.integers(4, size=2))
        gray = (envs.image() @ np.array([0.2989, 0.587, 0.114])).round().astype(np.uint8)
        assert np.abs(resize_area(gray).astype(int) - frames[0]).mean() < 1


def test_colour_frames_need_no_second_emulator():
    config = preset("pong", preprocess="crop_nearest")
    envs = AtariEnvs("pong", config, 1, 3, render=True)
    frames = np.zeros((1, 84, 84), np.uint8)
    envs.reset(frames)
    assert envs._colour_env is None
    for _ in range(20):
        step(envs, frames, [2])
        np.testing.assert_array_equal(crop_nearest(envs.image()), frames[0])


def test_pooling_can_be_switched_off():
    envs, frames = reset_envs(max_pool=False)
    ale, actions = bare_console("pong")
    for _ in range(50):
        step(envs, frames, [2])
        for _ in range(4):
            ale.act(actions[2])
        np.testing.assert_array_equal(frames[0], resize_area(ale.getScreenGrayscale()))


def test_threads_of_the_emulators_change_nothing():
    frames = []
    for threads in (1, 3):
        envs, out = reset_envs(5, sticky_actions=0.25, noop_max_frames=30, emulator_threads=threads)
        random, seen = np.random.default_rng(0), [out.copy()]
        for _ in range(100):
            step(envs, out, random.integers(0, envs.num_actions, 5))
            seen.append(out.copy())
        frames.append(np.stack(seen))
    assert not np.array_equal(frames[0][50, 0], frames[0][50, 1])
    np.testing.assert_array_equal(*frames)


@pytest.mark.parametrize("max_pool", [False, True])
@pytest.mark.parametrize("game", ["pong", "breakout", "montezuma_revenge", "air_raid", "carnival", "pooyan"])
def test_frames_that_ale_resizes_are_those_of_our_kernel(game, max_pool):
    """Screens of 210, 214, 220 and 250 rows; no-ops, sticky actions, ends and starts of episodes."""
    options = {"sticky_actions": 0.25, "noop_max_frames": 30, "max_episode_steps": 60, "max_pool": max_pool}
    config = preset("pong", env_id=game, terminal_on_life_loss=False, **options)
    ale, ours = AtariEnvs(game, config, 2, 3), AtariEnvs(game, config, 2, 3)
    assert ale._resized_by_ale
    ours._resized_by_ale = False
    ours._make(3)
    frames = np.zeros((2, 2, 84, 84), np.uint8)
    for out, envs in zip(frames, (ale, ours), strict=True):
        envs.reset(out)
    generator, ends = np.random.default_rng(0), 0
    for _ in range(150):
        np.testing.assert_array_equal(*frames)
        action = generator.integers(ale.num_actions, size=2)
        result, expected = (step(envs, out, action) for out, envs in zip(frames, (ale, ours), strict=True))
        assert result.reward.tolist() == expected.reward.tolist()
        assert result.first.tolist() == expected.first.tolist()
        ends += len(result.episodes)
    assert ends >= 4


def test_names_of_actions():
    assert reset_envs()[0].action_names == ("NOOP", "FIRE", "RIGHT", "LEFT", "RIGHTFIRE", "LEFTFIRE")

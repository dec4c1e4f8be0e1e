"""Openings, random frame-skips and caps of Atari environments, against a bare console."""

from __future__ import annotations

import ale_py
import numpy as np
import pytest
from ale_py import roms

from pydqn import preset
from pydqn.envs.atari import AtariEnvs
from pydqn.preprocess import crop_nearest, resize_area
from tests.envs.test_gym import open_lanes, step


def console(game):
    ale = ale_py.ALEInterface()
    ale.setFloat("repeat_action_probability", 0.0)
    ale.loadROM(roms.get_rom_path(game))
    ale.reset_game()
    return ale, ale.getMinimalActionSet()


@pytest.mark.parametrize("max_pool", [False, True])
@pytest.mark.parametrize("preprocess", ["resize_area", "crop_nearest"])
def test_a_random_skip_against_a_bare_console(max_pool, preprocess):
    options = {"env_id": "space_invaders", "frame_skip": 2, "frame_skip_max": 4}
    envs, frames = open_lanes(max_pool=max_pool, preprocess=preprocess, **options)
    ale, actions = console("space_invaders")
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
    opening = step(envs, frames, [action])
    assert opening.first[0]
    assert opening.frames == 0
    ale.reset_game()
    np.testing.assert_array_equal(frames[0], shrink(image()))


def test_lanes_of_random_skips_go_their_own_ways():
    envs, frames = open_lanes(num_envs=3, env_id="breakout", frame_skip=2, frame_skip_max=4)
    ends, firsts = [], 0
    for time_step in range(1500):
        result = step(envs, frames, np.full(3, time_step % 4))
        ends += [episode.env_index for episode in result.episodes]
        firsts += int(result.first.sum())
        assert 2 * (3 - result.first.sum() - result.terminated.sum()) <= result.frames <= 12
    assert set(ends) == {0, 1, 2}
    assert firsts == len(ends) or firsts == len(ends) - len(result.episodes)


@pytest.mark.parametrize("random_skip", [False, True])
def test_fire_and_then_action_2_open_a_game(random_skip):
    """Every opening frame is a `first` one; the game that is then played is that of a console told the same."""
    skips = {"frame_skip": 2, "frame_skip_max": 3} if random_skip else {"frame_skip": 4}
    options = {"env_id": "breakout", "fire_reset": True, "max_episode_steps": 30, **skips}
    envs, frames = open_lanes(**options, max_pool=False)
    ale, actions = console("breakout")
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
    opening = frames.copy()
    capped = step(envs, frames, [3])
    assert capped.truncated[0]
    assert capped.episodes[0].steps == 30
    firsts = 0
    while (result := step(envs, frames, [3])).first[0]:
        assert result.frames == 0
        firsts += 1
        opening = frames.copy()
    # A fixed skip lets ALE run on for one frame, then the game opens, FIRE and action 2 are pressed.
    assert firsts == (3 if random_skip else 4)
    assert not np.array_equal(opening, frames)
    for _ in range(28):
        assert not step(envs, frames, [3]).truncated[0]
    assert step(envs, frames, [3]).truncated[0]


def test_games_without_fire_open_as_they_are():
    assert len(open_lanes(env_id="ms_pacman", fire_reset=True)[0]._opening) == 0


@pytest.mark.parametrize("skips", [{"frame_skip": 4}, {"frame_skip": 2, "frame_skip_max": 4}])
def test_caps_in_steps_and_in_frames(skips):
    envs, frames = open_lanes(num_envs=2, max_episode_steps=25, **skips)
    for count in range(1, 26):
        result = step(envs, frames, [0, 0])
        assert result.truncated.all() == (count == 25)
    for most in (80, 81):
        envs, frames = open_lanes(max_episode_frames=most, **skips)
        total = 0
        while not (result := step(envs, frames, [0])).truncated[0]:
            total += result.frames
        assert most - 4 < total + result.frames <= most


@pytest.mark.parametrize("options", [{"frame_skip": 2, "frame_skip_max": 4}, {"fire_reset": True}])
def test_the_camera_follows_skips_and_openings(options):
    config = preset("pong", env_id="breakout", sticky_actions=0.25, max_episode_steps=60, **options)
    envs = AtariEnvs("breakout", config, 2, 3, render=True)
    frames = np.zeros((2, 84, 84), np.uint8)
    envs.reset(frames)
    generator = np.random.default_rng(0)
    for _ in range(300):
        step(envs, frames, generator.integers(4, size=2))
        gray = (envs.image() @ np.array([0.2989, 0.587, 0.114])).round().astype(np.uint8)
        assert np.abs(resize_area(gray).astype(int) - frames[0]).mean() < 1


def test_colour_frames_need_no_camera():
    config = preset("pong", preprocess="crop_nearest")
    envs = AtariEnvs("pong", config, 1, 3, render=True)
    frames = np.zeros((1, 84, 84), np.uint8)
    envs.reset(frames)
    assert envs._camera is None
    for _ in range(20):
        step(envs, frames, [2])
        np.testing.assert_array_equal(crop_nearest(envs.image()), frames[0])


def test_pooling_can_be_switched_off():
    envs, frames = open_lanes(max_pool=False)
    ale, actions = console("pong")
    for _ in range(50):
        step(envs, frames, [2])
        for _ in range(4):
            ale.act(actions[2])
        np.testing.assert_array_equal(frames[0], resize_area(ale.getScreenGrayscale()))


def test_threads_of_the_emulators_change_nothing():
    frames = []
    for threads in (1, 3):
        envs, out = open_lanes(5, sticky_actions=0.25, noop_max_frames=30, emulator_threads=threads)
        random, seen = np.random.default_rng(0), [out.copy()]
        for _ in range(100):
            step(envs, out, random.integers(0, envs.num_actions, 5))
            seen.append(out.copy())
        frames.append(np.stack(seen))
    assert not np.array_equal(frames[0][50, 0], frames[0][50, 1])
    np.testing.assert_array_equal(*frames)


def test_names_of_actions():
    assert open_lanes()[0].action_names == ("NOOP", "FIRE", "RIGHT", "LEFT", "RIGHTFIRE", "LEFTFIRE")

"""The wrapper for one environment, compared with Gymnasium's own pair and with a bare emulator."""

from __future__ import annotations

import functools
import itertools
import pickle

import ale_py
import gymnasium
import numpy as np
import pytest
from ale_py import roms
from gymnasium.wrappers import AtariPreprocessing as TheirPreprocessing
from gymnasium.wrappers import FrameStackObservation, RecordEpisodeStatistics, TimeLimit

from pydqn.adapters.gymnasium import AtariPreprocessing
from pydqn.preprocess import crop_area, crop_nearest
from tests.helpers.atari_wrappers import make, same, shrink


def their_pair(env, stack=4, padding="reset", **options):
    return FrameStackObservation(TheirPreprocessing(env, **options), stack, padding_type=padding)


CASES = {  # with screens of 210, 220, 230 and 250 rows
    "breakout, lives, ram": ("Breakout", {"obs_type": "ram"}, {"terminal_on_life_loss": True}),
    "pong, limit of steps": ("Pong", {"max_episode_steps": 203}, {"padding": "zero"}),
    "space invaders, not sticky": ("SpaceInvaders", {"repeat_action_probability": 0.0}, {"noop_max": 0}),
    "pooyan, cap of frames": ("Pooyan", {"max_num_frames_per_episode": 222}, {"padding": "zero", "frame_skip": 3}),
    "journey escape, no skip": ("JourneyEscape", {"max_episode_steps": 91}, {"frame_skip": 1}),
    "pacman, gray": ("Pacman", {"obs_type": "grayscale", "max_episode_steps": 300}, {"frame_skip": 2, "stack": 3}),
    "qbert, skips itself": ("Qbert", {"frameskip": (2, 5), "max_episode_steps": 99}, {"frame_skip": 1, "stack": 1}),
    "seaquest, no-ops past the limit": ("Seaquest", {"max_episode_steps": 20}, {"terminal_on_life_loss": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_pair_of_gymnasium(case):
    """Bit for bit, except for the last frame of an episode: Gymnasium's is an old one."""
    game, made, options = CASES[case]
    options = {"stack": 4, **options}
    ours = AtariPreprocessing(make(game, **made), **options)
    made = {**made, "obs_type": made.get("obs_type", "rgb").replace("ram", "rgb")}  # theirs cannot wrap the other
    theirs = their_pair(make(game, **made), **options)
    assert ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space
    same(ours.reset(seed=0), theirs.reset(seed=0))
    generator, ends = np.random.default_rng(0), 0
    for step in range(600 if "no-ops" not in case else 30):
        action = int(generator.integers(ours.action_space.n))
        mine, other = ours.step(action), theirs.step(action)
        same(mine[1:], other[1:])
        over = mine[2] or mine[3]
        same(mine[0][: -1 if over else None], other[0][: -1 if over else None])
        if over:
            ends += 1
            seed = step if ends % 5 == 0 else None
            same(ours.reset(seed=seed), theirs.reset(seed=seed))
            assert ours.game_over is False
        assert (ours.lives, ours.frame_skip) == (theirs.env.lives, theirs.env.frame_skip)
    assert ends > 2 or "invaders" in case


def test_without_a_stack_it_is_the_wrapper_of_that_name():
    options = {"noop_max": 10, "frame_skip": 4, "screen_size": (84, 84)}
    ours, theirs = AtariPreprocessing(make(), **options), TheirPreprocessing(make(), **options)
    assert ours.observation_space == theirs.observation_space
    same(ours.reset(seed=3), theirs.reset(seed=3))
    for _ in range(40):
        same(ours.step(1), theirs.step(1))
    stacked = FrameStackObservation(AtariPreprocessing(make(), 10), 4)
    one = AtariPreprocessing(make(), 10, stack=4)
    same(stacked.reset(seed=3), one.reset(seed=3))
    same(stacked.step(1), one.step(1))


class Console:
    """A bare emulator without sticky actions, frame by frame."""

    def __init__(self, game):
        self.ale = ale_py.ALEInterface()
        self.ale.setFloat("repeat_action_probability", 0.0)
        self.ale.loadROM(roms.get_rom_path(game))
        self.ale.reset_game()
        self._actions = self.ale.getMinimalActionSet()
        self.screens = [self.ale.getScreenGrayscale()]

    def act(self, action):
        self.ale.act(self._actions[action])
        self.screens.append(self.ale.getScreenGrayscale())


def last_of_an_episode(env, actions):
    """Play to the end of an episode; return the last observation, the one before and the number of frames."""
    observation, _ = env.reset()
    truncated = False
    while not truncated:
        before = observation
        observation, _, _, truncated, info = env.step(actions[env.ale.getEpisodeFrameNumber()])
    return observation, before, info["episode_frame_number"]


@pytest.mark.parametrize("frames", [1, 45, 46, 47, 48])
@pytest.mark.parametrize("limit", ["max_episode_steps", "max_num_frames_per_episode"])
def test_the_last_frame_of_a_truncated_episode_is_new(limit, frames):
    """Ours shows the last frame, where Gymnasium's observation is the one before."""
    console = Console("breakout")
    actions = np.repeat([1, 2, 3, 2], 12)  # every skip divides 12
    for action in actions:
        console.act(action)
    base = make(repeat_action_probability=0.0, **{limit: frames})
    newest, earlier = console.screens[frames], console.screens[frames - 1]
    for skip in (1, 2, 3, 4):
        options = {"noop_max": 0, "frame_skip": skip}
        last, before, count = last_of_an_episode(AtariPreprocessing(base, **options), actions)
        old = last_of_an_episode(TheirPreprocessing(base, **options), actions)
        assert count == old[2] == frames
        np.testing.assert_array_equal(last, shrink(np.maximum(newest, earlier) if skip > 1 else newest))
        np.testing.assert_array_equal(before, old[1])
        if frames % skip or skip == 1:
            np.testing.assert_array_equal(old[0], before)
            assert frames == 1 or not np.array_equal(last, old[0])


def test_the_frame_of_a_lost_life_is_new():
    """It is pooled with the frame before where that was read: at the first frame of a skip and at the last."""
    env = AtariPreprocessing(make(repeat_action_probability=0.0), noop_max=0, terminal_on_life_loss=True)
    seen, differ = set(), 0
    for offset in range(4):  # of the skip to the frame of the loss
        console, start = Console("breakout"), [1] * (12 + offset)
        env.reset()
        for action in start:
            console.act(action)
            env.env.step(action)
        terminated, step = False, 0
        while not terminated:
            action, step = 2 + step // 5 % 2, step + 1  # the paddle moves to and fro
            lives, count, lost = console.ale.lives(), 0, False
            while count < 4 and not lost:
                console.act(action)
                count += 1
                lost = console.ale.lives() < lives
            observation, _, terminated, _, _ = env.step(action)
            assert terminated == lost
        pooled, alone = shrink(np.maximum(*console.screens[-2:])), shrink(console.screens[-1])
        np.testing.assert_array_equal(observation, alone if count in (2, 3) else pooled)
        seen.add(count)
        differ += not np.array_equal(pooled, alone)
        assert not env.step(0)[2]  # goes on without a reset
    assert seen == {1, 2, 3, 4}
    assert differ > 2


def test_without_images_all_else_works():
    """`obs_type="ram"` leaves infos, time limits, statistics and rendering as they are."""
    results = []
    for obs_type in ("rgb", "ram"):
        inner = make(obs_type=obs_type, render_mode="rgb_array", max_episode_steps=100)
        env = AtariPreprocessing(RecordEpisodeStatistics(inner), stack=2)
        steps = [env.reset(seed=0)]
        while len(steps) == 1 or not steps[-1][3]:
            steps.append(env.step(len(steps) % 4))
        assert steps[-1][4]["episode"].pop("t") > 0
        assert steps[-1][4]["episode"]["l"] == 100
        results.append((*steps, env.render()))
    same(*results)


@pytest.mark.parametrize("kernel", [crop_nearest, crop_area])
def test_kernels_that_take_colours(kernel):
    env = AtariPreprocessing(make(), stack=2, kernel=kernel.__name__)
    console = make()
    seen = AtariPreprocessing(console)
    first, _ = env.reset(seed=0)
    seen.reset(seed=0)
    np.testing.assert_array_equal(first[1], kernel(console.unwrapped.ale.getScreenRGB()))
    for _ in range(20):
        screens = []
        for _ in range(4):
            console.step(1)
            screens.append(console.unwrapped.ale.getScreenRGB())
        np.testing.assert_array_equal(env.step(1)[0][1], kernel(np.maximum(*screens[2:])))


def test_observations_belong_to_the_user():
    """The wrapper does not write to an observation again, and the user may."""
    env, other = (AtariPreprocessing(make(), stack=4) for _ in range(2))
    kept, copies = [], []
    for one in (env, other):
        one.reset(seed=0)
    for step in range(60):
        observation, spoiled = env.step(1)[0], other.step(1)[0]
        same(observation, spoiled)
        kept.append(observation)
        copies.append(observation.copy())
        spoiled[:] = step
    np.testing.assert_array_equal(kept, copies)
    assert all(not np.shares_memory(*pair) for pair in itertools.pairwise(kept))


def test_space_spec_and_pickle():
    for stack, shape in ((None, (84, 84)), (1, (1, 84, 84)), (4, (4, 84, 84))):
        env = AtariPreprocessing(plain(), stack=stack, padding="zero", noop_max=3)
        assert env.observation_space == gymnasium.spaces.Box(0, 255, shape, np.uint8)
        assert env.reset()[0] in env.observation_space
        assert env.reset()[0].any()
    results = [
        (one.reset(seed=1), one.step(1)) for one in (env, gymnasium.make(env.spec), pickle.loads(pickle.dumps(env)))
    ]
    same(results[1], results[0])
    same(results[2], results[0])


@functools.cache
def plain():
    return make()


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("noop_max", lambda: AtariPreprocessing(plain(), noop_max=-1)),
        ("frame_skip", lambda: AtariPreprocessing(plain(), frame_skip=0)),
        ("screen_size", lambda: AtariPreprocessing(plain(), screen_size=96)),
        ("screen_size", lambda: AtariPreprocessing(plain(), screen_size=(84, 96))),
        ("grayscale_obs", lambda: AtariPreprocessing(plain(), grayscale_obs=False)),
        ("grayscale_newaxis", lambda: AtariPreprocessing(plain(), grayscale_newaxis=True)),
        ("scale_obs", lambda: AtariPreprocessing(plain(), scale_obs=True)),
        ("stack", lambda: AtariPreprocessing(plain(), stack=0)),
        ("padding", lambda: AtariPreprocessing(plain(), padding="first")),
        ("kernel", lambda: AtariPreprocessing(plain(), kernel="resize")),
        ("env", lambda: AtariPreprocessing(make(frameskip=4))),
        ("env", lambda: AtariPreprocessing(gymnasium.make("CartPole-v1"))),
    ],
)
def test_misuse_names_the_argument(name, call):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        call()


def test_a_time_limit_around_the_wrapper_counts_steps():
    """A time limit inside counts frames, as with Gymnasium."""
    env = TimeLimit(AtariPreprocessing(make(), stack=4), 7)
    env.reset(seed=0)
    results = [env.step(0) for _ in range(7)]
    assert [result[3] for result in results] == [False] * 6 + [True]

"""The wrapper for many environments, compared with vectors of single wrappers and with a naive stack."""

from __future__ import annotations

import runpy
from collections import deque
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from pydqn.adapters.gymnasium import AtariPreprocessing, AtariVectorFrames
from pydqn.preprocess import crop_area, crop_nearest
from tests.helpers.atari_wrappers import make, same, shrink

MODES = [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP, AutoresetMode.DISABLED]


def envs(game="breakout", num_envs=2, height=210, mode=AutoresetMode.NEXT_STEP, **options):
    """ALE's own vector environment, told to return frames as they are."""
    options = {"img_height": height, "img_width": 160, "stack_num": 1, "noop_max": 0, **options}
    return AtariVectorEnv(
        game, num_envs, autoreset_mode=mode, use_fire_reset=False, reward_clipping=False, num_threads=2, **options
    )


@pytest.mark.parametrize(("mode", "padding"), [*zip(MODES, ("reset", "zero", "reset"), strict=True)])
def test_equals_a_vector_of_single_wrappers(mode, padding):
    """In all that is returned, through every kind of end and reset."""
    limits = (13, 21, 34)

    def inner(limit):
        return make(frameskip=4, obs_type="grayscale", repeat_action_probability=0.0, max_episode_steps=limit)

    def single(limit):
        return AtariPreprocessing(inner(limit), noop_max=0, frame_skip=1, stack=3, padding=padding)

    ours = SyncVectorEnv([lambda limit=limit: inner(limit) for limit in limits], autoreset_mode=mode)
    ours = AtariVectorFrames(ours, stack=3, padding=padding)
    theirs = SyncVectorEnv([lambda limit=limit: single(limit) for limit in limits], autoreset_mode=mode)
    assert ours.observation_space == theirs.observation_space
    assert ours.single_observation_space == theirs.single_observation_space
    assert ours.metadata["autoreset_mode"] == mode
    same(ours.reset(), theirs.reset())
    generator, kept, ends, resets = np.random.default_rng(0), [], np.zeros(3, int), set()
    for _ in range(200):
        actions = generator.integers(4, size=3)
        mine = ours.step(actions)
        same(mine, theirs.step(actions))
        assert ours.observation_space.contains(mine[0])
        kept.append((mine[0], mine[0].copy()))
        over = mine[2] | mine[3]
        ends += over
        if not over.any():
            continue
        # Reset the environments whose episodes ended, or the others, or all, or none; once with a seed, which is slow.
        which = generator.integers(5) if mode is not AutoresetMode.DISABLED else generator.integers(2) * 2
        mask = {0: over, 1: ~over, 2: ~np.zeros(3, bool)}.get(which)
        if mask is not None and mask.any():
            options = [{"reset_mask": mask.copy()} if which < 2 else None for _ in range(2)]
            seed = None if resets else 5
            same(ours.reset(seed=seed, options=options[0]), theirs.reset(seed=seed, options=options[1]))
            resets.add(int(which))
    assert (ends >= (6, 3, 1)).all()
    assert resets == ({0, 2} if mode is AutoresetMode.DISABLED else {0, 1, 2})
    for observation, copy in kept:
        np.testing.assert_array_equal(observation, copy)


def ale_seeds(count):
    """Return seeds of `AtariEnv`, and what it seeds ALE with: those that are not negative, which ALE would ignore."""
    pairs = [(seed, int(np.random.SeedSequence(seed).generate_state(2)[1])) for seed in range(50)]
    pairs = [pair for pair in pairs if pair[1] < 2**31]
    return [[pair[part] for pair in pairs[:count]] for part in (0, 1)]


@pytest.mark.parametrize(
    ("game", "rom", "height", "sticky"),
    [("SpaceInvaders", "space_invaders", 210, 0.25), ("Pooyan", "pooyan", 220, 0.0)],
)
@pytest.mark.parametrize("mode", MODES[:2], ids=lambda mode: mode.value)
def test_over_ales_vector_it_equals_a_vector_of_single_wrappers(mode, game, rom, height, sticky):
    """From the same seeds, with sticky actions, except for the last frame of an episode, which is an old one in ALE.

    (Under a cap, ALE's vector plays one frame more of Pooyan, which starts with a key press: with sticky actions the
    two would diverge there.)
    """
    seeds, own = ale_seeds(2)
    options = {"repeat_action_probability": sticky, "max_num_frames_per_episode": 202}
    ours = AtariVectorFrames(envs(rom, 2, height, mode, **options), stack=4)
    single = [lambda: AtariPreprocessing(make(game, **options), noop_max=0, stack=4)] * 2
    theirs = SyncVectorEnv(single, autoreset_mode=mode)
    assert ours.observation_space == theirs.observation_space
    same(ours.reset(seed=np.array(own))[0], theirs.reset(seed=seeds)[0])
    generator, ends = np.random.default_rng(0), 0
    for _ in range(130):
        actions = generator.integers(6, size=2)
        mine, other = ours.step(actions), theirs.step(actions)
        over = mine[2] | mine[3]
        ends += over.sum()
        for part in (1, 2, 3):
            np.testing.assert_array_equal(mine[part], other[part])
        if mode is AutoresetMode.SAME_STEP:
            same(mine[0], other[0])
            for env_index in np.flatnonzero(over):
                same(mine[4]["final_obs"][env_index][:3], other[4]["final_obs"][env_index][:3])
        else:
            same(mine[0][~over], other[0][~over])
            same(mine[0][over, :3], other[0][over, :3])
    assert ends >= 4


COLOURS = {"resize_area": shrink, "crop_nearest": crop_nearest, "crop_area": crop_area}


@pytest.mark.parametrize(
    ("mode", "kernel", "stack"),
    [
        (MODES[0], "resize_area", 4),
        (MODES[1], "resize_area", None),
        (MODES[1], "crop_nearest", 3),
        (MODES[0], "crop_area", 1),
    ],
)
def test_over_ales_vector_it_equals_a_naive_stack(mode, kernel, stack):
    """With last frames, infos and partial resets, all from a second emulator with one deque per environment."""
    options = {"grayscale": kernel == "resize_area", "noop_max": 20, "max_num_frames_per_episode": 700}
    count = 3
    ours = AtariVectorFrames(envs("breakout", count, 210, mode, **options), stack=stack, padding="zero", kernel=kernel)
    bare = envs("breakout", count, 210, mode, **options)
    depth = stack or 1
    stacks = [deque(maxlen=depth) for _ in range(count)]

    def see(env_index, frame, first=False):
        if first:
            stacks[env_index].extend([np.zeros((84, 84), np.uint8)] * depth)
        stacks[env_index].append(COLOURS[kernel](frame))
        return np.stack(stacks[env_index]) if stack else stacks[env_index][-1]

    seeds = np.arange(count) + 9
    mine, (frames, infos) = ours.reset(seed=seeds), bare.reset(seed=seeds)
    same(mine, (np.stack([see(env_index, frames[env_index, 0], True) for env_index in range(count)]), infos))
    generator, first, ends = np.random.default_rng(0), np.zeros(count, bool), np.zeros((2, count), int)
    for step in range(400):
        actions = generator.integers(4, size=count)
        mine = ours.step(actions)
        frames, *others, infos = bare.step(actions)
        over = others[1] | others[2]
        ends += others[1:]
        if mode is AutoresetMode.SAME_STEP:
            first = over
            if over.any():
                last = np.zeros((count, *ours.single_observation_space.shape), np.uint8)
                for env_index in np.flatnonzero(over):
                    last[env_index] = see(env_index, infos["final_obs"][env_index, 0])
                infos["final_obs"] = last
        expected = np.stack([see(env_index, frames[env_index, 0], first[env_index]) for env_index in range(count)])
        same(mine, (expected, *others, infos))
        first = over
        if step % 120 == 100:
            mask = np.arange(count) % 3 == step // 120 % 3
            mine = ours.reset(options={"reset_mask": mask})
            frames, infos = bare.reset(options={"reset_mask": mask})
            for env_index in np.flatnonzero(mask):
                expected[env_index] = see(env_index, frames[env_index, 0], True)
            same(mine, (expected, infos))
            first = over & ~mask
    assert (ends.sum(axis=0) >= 1).all()
    assert (ends.sum(axis=1) >= 2).all()  # terminated and truncated


def test_autoreset_modes_of_other_instances_do_not_matter():
    """AtariVectorEnv keeps its metadata with the class: the latest instance's mode would be that of all."""
    first = envs(mode=AutoresetMode.SAME_STEP)
    envs(mode=AutoresetMode.NEXT_STEP)
    assert AtariVectorFrames(first).metadata["autoreset_mode"] is AutoresetMode.SAME_STEP


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("stack", lambda: AtariVectorFrames(envs(), stack=1.5)),
        ("padding", lambda: AtariVectorFrames(envs(), padding=0)),
        ("kernel", lambda: AtariVectorFrames(envs(), kernel=None)),
        ("env", lambda: AtariVectorFrames(envs(stack_num=4))),
        ("env", lambda: AtariVectorFrames(envs(grayscale=False))),
        ("env", lambda: AtariVectorFrames(envs(), kernel="crop_area")),
        ("env", lambda: AtariVectorFrames(envs(batch_size=1))),
        ("env", lambda: AtariVectorFrames(gymnasium.make_vec("CartPole-v1", 2))),
    ],
)
def test_misuse_names_the_argument(name, call):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        call()


def test_the_example_runs(capsys):
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "atari_wrapper.py"), run_name="__main__")
    assert "(8, 4, 84, 84)" in capsys.readouterr().out

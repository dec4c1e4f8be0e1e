"""The buffer for whole transitions returns what was appended, bit for bit, whatever observations are stacks of."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pydqn import TransitionReplay
from pydqn.replay.stacks import Stacks

IMAGE = np.zeros((1, 4, 8, 8), np.uint8)
RESETS = ("zero", "first", "history", "go on", "one zero")


class Stacker:
    """An environment of random frames in random stacks, along an axis."""

    def __init__(self, stacks, shape, dtype, random, resets):
        self.stacks, self.shape, self.dtype, self.random, self.resets = stacks, shape, dtype, random, resets
        self.frames = [np.zeros(stacks.frame_shape, dtype)] * stacks.stack

    def _frame(self):
        return self.random.integers(0, 3, self.stacks.frame_shape).astype(self.dtype)

    def obs(self):
        return self.stacks.join(np.stack(self.frames)[None], self.shape)[0].copy()

    def reset(self):
        count = self.stacks.stack - 1
        kind = self.random.choice(self.resets)
        frame = self._frame()
        before = {
            "zero": [np.zeros_like(frame)] * count,
            "first": [frame] * count,
            "history": [self._frame() for _ in range(count)],
            "go on": self.frames[1:],
            "one zero": [np.zeros_like(frame) for _ in range(count // 2)] + [self._frame()] * (count - count // 2),
        }[kind]
        self.frames = [*before, frame]
        return self.obs()

    def step(self):
        self.frames = [*self.frames[1:], self._frame()]
        return self.obs()


def play(buffer, envs, random, steps, uneven):
    """Append transitions; return, for each environment, all that were appended, with their indices."""
    appended = [[] for _ in envs]
    now = [env.reset() for env in envs]
    for _ in range(steps):
        env_indices = [env_index for env_index in random.permutation(len(envs)) if not uneven or random.random() < 0.7]
        if not env_indices:
            continue
        env_indices = env_indices if uneven else sorted(env_indices)
        rows = []
        for env_index in env_indices:
            terminated, truncated = random.random(2) < 0.08
            obs, next_obs = now[env_index], envs[env_index].step()
            rows.append((obs, next_obs, int(random.integers(5)), float(random.normal()), terminated, truncated))
            now[env_index] = next_obs
            if terminated or truncated or random.random() < 0.03:  # the last: an end that is not reported
                now[env_index] = envs[env_index].reset()
        columns = [np.array(column) for column in zip(*rows, strict=True)]
        indices = buffer.append(*columns, env_indices=np.array(env_indices) if uneven else None)
        for env_index, row, index in zip(env_indices, rows, indices.tolist(), strict=True):
            appended[env_index].append((index, row))
    return appended


def windows(appended, n_step, gamma):
    """Return, by index, every transition whose window is closed: what an n-step buffer has to return."""
    found = {}
    for position, (index, (obs, _, action, *_)) in enumerate(appended):
        total, discount = 0.0, 1.0
        for k, (_, (_, next_obs, _, reward, terminated, truncated)) in enumerate(appended[position:], 1):
            total += discount * np.float64(np.float32(reward))
            discount *= gamma
            broken = position + k < len(appended) and not np.array_equal(appended[position + k][1][0], next_obs)
            if k == n_step or terminated or truncated or broken:
                cut = truncated or (k < n_step and not terminated)
                found[index] = (obs, action, total, 0.0 if terminated else discount, next_obs, k, terminated, cut)
                break
    return found


SHAPES = [
    ((4, 6, 5), "uint8", None, Stacks(4, 0, (6, 5), False)),
    ((6, 5, 4), "uint8", None, Stacks(4, 2, (6, 5), False)),
    ((14, 13, 12), "uint8", None, Stacks(4, 2, (14, 13, 3), True)),
    ((12, 13, 14), "uint8", None, Stacks(4, 0, (3, 13, 14), True)),
    ((3, 6, 5), "uint8", None, Stacks(1, 0, (3, 6, 5), False)),
    ((3, 6, 5), "uint8", 3, Stacks(3, 0, (6, 5), False)),
    ((6, 5, 1), "uint8", None, Stacks(1, 0, (6, 5, 1), False)),
    ((4, 3), "float32", 4, Stacks(4, 0, (3,), False)),
    ((4,), "float32", None, Stacks(1, 0, (4,), False)),
    ((4,), "float64", 4, Stacks(4, 0, (1,), False)),
    ((3, 4, 5, 3), "uint8", 3, Stacks(3, 0, (4, 5, 3), False)),
    ((), "int64", None, Stacks(1, 0, (1,), False)),
]


@pytest.mark.parametrize(("shape", "dtype", "stack", "expected"), SHAPES)
def test_stacks_are_found_by_their_shape(shape, dtype, stack, expected):
    stacks = Stacks.of(shape, np.dtype(dtype), stack)
    assert stacks == expected
    observations = np.arange(2 * int(np.prod(shape))).reshape(2, *shape)
    frames = stacks.split(observations)
    assert frames.shape == (2, stacks.stack, *stacks.frame_shape)
    np.testing.assert_array_equal(stacks.join(frames, shape), observations)
    if stacks.stack > 1:
        part = np.moveaxis(observations, 1 + stacks.axis, 0)
        width = len(part) // stacks.stack
        np.testing.assert_array_equal(frames[:, 0].ravel(), np.moveaxis(part[:width], 0, 1 + stacks.axis).ravel())


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(SHAPES),
    st.integers(1, 3),
    st.sampled_from([1, 1, 3]),
    st.sampled_from([1.0, 0.5]),
    st.booleans(),
    st.lists(st.sampled_from(RESETS), min_size=1, max_size=3),
    st.integers(0, 2**32),
    st.integers(3, 200),
)
def test_what_comes_out_is_what_went_in(kind, num_envs, n_step, gamma, uneven, resets, seed, capacity):
    shape, dtype, stack, stacks = kind
    random = np.random.default_rng(seed)
    buffer = TransitionReplay(
        capacity, shape, dtype, stack=stack, num_envs=num_envs, n_step=n_step, gamma=gamma, seed=seed
    )
    envs = [Stacker(stacks, shape, dtype, random, resets) for _ in range(num_envs)]
    appended = play(buffer, envs, random, 60, uneven)
    indices = buffer.frame_replay.valid_indices()
    assert len(buffer) == len(indices)
    expected = {}
    for env_index, steps in enumerate(appended):
        expected |= (of_env := windows(steps, n_step, gamma))
        kept = [index for index in indices.tolist() if index % num_envs == env_index]
        assert kept == [*of_env][len(of_env) - len(kept) :]  # the newest
        if stacks.stack == 1 or resets == ["zero"]:  # other resets may take more frames than are set aside
            assert len(kept) == min(len(of_env), capacity // num_envs)
    if not len(buffer):
        return
    for batch in (buffer.gather(indices), buffer.sample(20), copy.deepcopy(buffer).sample(20)):
        ends = buffer.windows(batch.index)
        for row, index in enumerate(batch.index.tolist()):
            obs, action, reward, discount, next_obs, k, terminated, truncated = expected[index]
            np.testing.assert_array_equal(batch.obs[row], obs)
            np.testing.assert_array_equal(batch.next_obs[row], next_obs)
            assert batch.action[row] == action
            assert batch.reward[row] == np.float32(reward)
            assert batch.discount[row] == np.float32(discount)
            assert (ends.steps[row], ends.terminated[row], ends.truncated[row]) == (k, terminated, truncated)


@pytest.mark.parametrize(("reset", "padding"), [("zero", "zero"), ("first", "first")])
def test_each_frame_is_stored_once(reset, padding):
    random = np.random.default_rng(0)
    buffer = TransitionReplay(1000, (4, 84, 84))
    env = Stacker(buffer.stacks, (4, 84, 84), np.uint8, random, [reset])
    (appended,) = play(buffer, [env], random, 300, False)
    assert buffer.frame_replay.padding == padding
    breaks = sum(not np.array_equal(one[1][1], two[1][0]) for one, two in itertools.pairwise(appended))
    assert buffer.frame_replay.env_time_steps == [300 + 1 + breaks]
    assert buffer.nbytes < 1.1 * 1000 * (84 * 84 + 12)


def test_images_that_are_no_stacks_are_stored_whole():
    images = np.random.default_rng(0).integers(0, 255, (6, 4, 8, 8)).astype(np.uint8)
    buffer = TransitionReplay(10, (4, 8, 8))
    assert buffer.stacks.stack == 4
    for step in range(5):
        buffer.append(images[step : step + 1], images[step + 1 : step + 2], [step], [0.0], [False], [False])
    assert buffer.stacks.stack == 1
    batch = buffer.gather(buffer.frame_replay.valid_indices())
    np.testing.assert_array_equal(batch.obs, images[:5])
    np.testing.assert_array_equal(batch.next_obs, images[1:])


def gray_stacks(depth, axis, steps, padding, dtype="uint8"):
    """Observations of a stack of random gray images, (steps + 1, *shape)."""
    frames = np.random.default_rng(0).integers(1, 255, (steps + depth, 16, 17)).astype(dtype)
    frames[:depth] = frames[depth - 1] if padding == "first" else frames[:depth]
    frames[: depth - 1] *= padding != "zero"
    return np.stack([np.moveaxis(frames[step : step + depth], 0, axis) for step in range(steps + 1)])


@pytest.mark.parametrize("padding", ["zero", "first", "history"])
@pytest.mark.parametrize(
    ("depth", "axis", "dtype", "share"),
    [(3, 0, "uint8", 3), (3, 2, "uint8", 3), (6, 0, "uint8", 6), (6, 2, "uint8", 6), (4, 0, "float32", 4)],
)
def test_gray_stacks_that_are_stored_whole_give_a_warning(depth, axis, dtype, share, padding):
    obs = gray_stacks(depth, axis, 12, padding, dtype)
    whole = TransitionReplay(1000, obs.shape[1:], dtype)
    stacked = TransitionReplay(1000, obs.shape[1:], dtype, stack=depth)

    def append(buffer):
        for step in range(12):
            buffer.append(obs[[step]], obs[[step + 1]], [0], [0.0], [False], [False])

    with pytest.warns(UserWarning, match=f"pass stack={depth} to store each frame once, .* about 1/{share} of the mem"):
        append(whole)
    append(stacked)
    for one, other in zip(whole.gather(range(12)), stacked.gather(stacked.frame_replay.valid_indices()), strict=True):
        if one.dtype != np.int64:  # (indices may count frames that stood before)
            np.testing.assert_array_equal(one, other)


def test_gray_stacks_that_begin_like_colours_are_refused_with_advice():
    """Nothing moves at first, so that they may be two images in colour."""
    obs = np.repeat(gray_stacks(6, 0, 3, "first"), [3, 1, 1, 1], axis=0)
    buffer = TransitionReplay(100, obs.shape[1:])
    buffer.append(obs[[0]], obs[[1]], [0], [0.0], [False], [False])
    buffer.append(obs[[2]], obs[[3]], [0], [0.0], [False], [False])
    with pytest.raises(ValueError, match="next_obs: .*pass stack=6 for gray frames, or stack=1 for"):
        buffer.append(obs[[3]], obs[[4]], [0], [0.0], [False], [False])


def test_other_images_are_not_taken_for_gray_stacks():
    """Colours, black at first and then one colour after the other; and stacks that are stored as such."""
    random = np.random.default_rng(0)
    colours = random.integers(0, 255, (20, 3, 16, 17)).astype(np.uint8)
    colours[:8] = 0
    colours[8, :2] = 0  # blue only: as of (0, 0, 0) moved on
    for obs, stack in [
        (colours, None),
        (gray_stacks(4, 0, 19, "zero"), None),
        (gray_stacks(3, 0, 19, "zero"), 1),
        (np.repeat(colours[:, :1], 3, axis=1), None),
        (np.zeros_like(colours), None),
        (random.normal(size=(20, 3, 6)), None),
        (random.normal(size=(20, 3)), None),
    ]:
        buffer = TransitionReplay(100, obs.shape[1:], obs.dtype, stack=stack)
        for step in range(len(obs) - 1):
            buffer.append(obs[[step]], obs[[step + 1]], [0], [0.0], [False], [False])
        assert len(buffer) == len(obs) - 1


@pytest.mark.parametrize("padding", ["zero", "first"])
@pytest.mark.parametrize("num_envs", [1, 2])
def test_saved_and_restored(tmp_path, padding, num_envs):
    random = np.random.default_rng(0)

    def make(capacity=60, **settings):
        settings = {"num_envs": num_envs, "n_step": 3, "gamma": 0.9, "prioritized": True, "seed": 3} | settings
        return TransitionReplay(capacity, (4, 8, 8), **settings)

    saved, restored = make(), make()
    envs = [Stacker(saved.stacks, (4, 8, 8), np.uint8, random, [padding]) for _ in range(num_envs)]
    play(saved, envs, random, 50, False)
    saved.update_priorities(saved.frame_replay.valid_indices()[:5], np.arange(1, 6))
    saved.save(tmp_path)
    restored.restore(tmp_path)
    assert restored.frame_replay.padding == padding
    loaded = TransitionReplay.load(tmp_path, (4, 8, 8))
    assert (loaded.max_transitions, loaded.num_envs) == (60 // num_envs * num_envs, num_envs)
    for one, *others in zip(*(each.sample(20) for each in (saved, restored, loaded)), strict=True):
        for other in others:
            np.testing.assert_array_equal(one, other)
    with pytest.raises(ValueError, match="frames of shape"):
        TransitionReplay.load(tmp_path, (4, 6, 6))
    more = play(restored, envs, random, 20, False)  # other episodes begin
    held = restored.frame_replay.valid_indices()
    for steps in more:
        expected = windows(steps, 3, 0.9)
        newest = [index for index in expected if index in held]
        assert newest
        batch = restored.gather(newest)
        np.testing.assert_array_equal(batch.obs, [expected[index][0] for index in newest])
        np.testing.assert_allclose(batch.reward, [expected[index][2] for index in newest], rtol=1e-6)
    for other, message in [
        (make(n_step=1), "n_step 3, expected 1"),
        (make(gamma=0.5), "gamma 0.9, expected 0.5"),
        (make(70), f"max_transitions 60, expected {70 // num_envs * num_envs}"),
        (make(stack=1), "stack 4, expected 1"),
        (
            TransitionReplay(60, (4, 6, 6), num_envs=num_envs, n_step=3, gamma=0.9, prioritized=True),
            "frames of shape",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            other.restore(tmp_path)
        assert len(other) == 0


def test_stacks_that_break_off_later_are_refused():
    buffer = TransitionReplay(10, (4, 8, 8))
    buffer.append(IMAGE, IMAGE, [0], [0.0], [False], [False])
    with pytest.raises(ValueError, match="next_obs: expected obs moved on by one frame"):
        buffer.append(IMAGE, IMAGE + 1, [0], [0.0], [False], [False])
    assert len(buffer) == 1


def test_cleared_it_is_empty():
    buffer = TransitionReplay(10, (2,), "float32", prioritized=True)
    row = np.ones((1, 2)), np.zeros((1, 2)), [0], [1.0], [False], [False]
    buffer.append(*row)
    buffer.frame_replay.beta = 0.7
    buffer.clear()
    assert len(buffer) == 0
    assert buffer.frame_replay.beta == 0.7
    assert buffer.append(row[1], row[0], *row[2:]).tolist() == [0]  # goes on from the last step, but starts an episode
    assert buffer.sample(1).obs.tolist() == [[0.0, 0.0]]


def test_an_environment_may_begin_with_zeros():
    buffer = TransitionReplay(10, (2,), "float32", num_envs=2)
    for env_index in (0, 1):
        buffer.append(np.zeros((1, 2)), np.ones((1, 2)), [0], [1.0], [False], [False], env_indices=[env_index])
    assert len(buffer) == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((IMAGE[0], IMAGE, [0], [0.0], [False], [False]), "obs: expected shape (1, 4, 8, 8), got shape (4, 8, 8)"),
        ((IMAGE, IMAGE[:, :3], [0], [0.0], [False], [False]), "next_obs: expected shape (1, 4, 8, 8)"),
        ((IMAGE, IMAGE + 1, [0], [0.0], [False], [False]), "next_obs: expected obs moved on by one frame"),
        ((IMAGE, IMAGE, [-1], [0.0], [False], [False]), "action: expected integers from 0"),
        ((IMAGE, IMAGE, [0], [np.nan], [False], [False]), "reward: expected finite"),
        ((IMAGE, IMAGE, [0], [0.0], [0.0], [False]), "terminated: expected booleans"),
    ],
)
def test_bad_transitions(row, message):
    buffer = TransitionReplay(10, (4, 8, 8), stack=4)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        buffer.append(*row)
    assert str(caught.value).startswith(message)
    assert len(buffer) == 0
    buffer.append(IMAGE, IMAGE, [0], [0.0], [False], [False])
    assert len(buffer) == 1


GOOD = {"action": [0, 0], "reward": [0.0, 0.0], "terminated": [False, False], "truncated": [False, False]}


@pytest.mark.parametrize(
    "bad",
    [
        {"action": [0, -1]},
        {"action": [0.5, 0]},
        {"action": [0]},
        {"reward": [0.0, np.nan]},
        {"reward": ["1", "1"]},
        {"terminated": [2, 0]},
        {"truncated": [False]},
        {"env_indices": [1, 1]},
    ],
)
@pytest.mark.parametrize("shape", [(2,), (4, 8, 8)])
def test_refused_transitions_overwrite_nothing(shape, bad):
    def full():
        made = TransitionReplay(8, shape, num_envs=2, stack=shape[0] if len(shape) > 1 else 1, seed=1)
        random = np.random.default_rng(0)
        obs = np.zeros((2, *shape), np.uint8)
        for _ in range(4):
            newest = random.integers(1, 200, (2, 1, *shape[1:]), dtype=np.uint8)
            next_obs = np.concatenate([obs[:, 1:], newest], axis=1)
            made.append(obs, next_obs if made.stacks.stack > 1 else newest.repeat(2, 1), **GOOD)
            obs = next_obs if made.stacks.stack > 1 else newest.repeat(2, 1)
        return made

    buffer, expected = full(), full()
    start = np.full((2, *shape), 250, np.uint8)  # of other episodes
    for _ in range(40):
        with pytest.raises(ValueError, match=f"^{next(iter(bad))}: expected"):
            buffer.append(start, start, **{**GOOD, **bad})
    assert len(buffer) == 8
    assert buffer.frame_replay.env_time_steps == expected.frame_replay.env_time_steps
    for one, other in zip(buffer.sample(20), expected.sample(20), strict=True):
        np.testing.assert_array_equal(one, other)


def test_alpha_may_have_changed_before_it_is_restored(tmp_path):
    saved, restored = (TransitionReplay(10, (2,), prioritized=True, alpha=0.6, seed=1) for _ in range(2))
    obs = np.arange(22, dtype=np.uint8).reshape(11, 1, 2)
    for step in range(10):
        index = saved.append(obs[step], obs[step + 1], [0], [0.0], [False], [False])
        saved.update_priorities(index, [1.0 + step])
    saved.frame_replay.alpha = 0.3
    saved.save(tmp_path)
    restored.restore(tmp_path)
    assert restored.frame_replay.alpha == 0.3
    for one, other in zip(saved.sample(20), restored.sample(20), strict=True):
        np.testing.assert_array_equal(one, other)


def test_bad_arguments():
    with pytest.raises(ValueError, match="stack: expected a divisor of axis 0 of observations of shape"):
        TransitionReplay(10, (4, 8, 8), stack=3)
    with pytest.raises(ValueError, match="max_transitions: expected an integer of at least 2"):
        TransitionReplay(1, (4,), num_envs=2)

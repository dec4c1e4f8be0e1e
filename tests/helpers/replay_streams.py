"""Random streams of episodes, played into a replay buffer and into its reference, and compared."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from pydqn import FrameReplay
from tests.helpers.reference import Entry, EpisodeReplay

ENDS = st.sampled_from(["", "", "", "", "terminated", "truncated", "both", "life", "cut"])


@st.composite
def streams(draw):
    """Settings of a buffer, a number of environments, and how each time step ends in each of them.

    life: terminated, but the episode goes on; cut: the next frame starts an episode without a flag.
    """
    num_envs = draw(st.integers(1, 4))
    stack, n_step = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    settings = {
        "capacity": draw(st.integers(num_envs * (stack + n_step), 60)),
        "stack": stack,
        "n_step": n_step,
        "gamma": draw(st.sampled_from([0.0, 0.5, 0.99, 1.0])),
        "padding": draw(st.sampled_from(["zero", "first"])),
    }
    ends = draw(st.lists(st.lists(ENDS, min_size=num_envs, max_size=num_envs), min_size=1, max_size=70))
    return settings, num_envs, ends


def play(stream, frame_shape=(2,), dtype="uint8", seed=0, kind=FrameReplay):
    """Yield (replay, reference) after every time step of a stream."""
    settings, num_envs, ends = stream
    generator = np.random.default_rng(seed)
    replay = kind(frame_shape=frame_shape, num_envs=num_envs, dtype=dtype, seed=seed, **settings)
    names = ("stack", "n_step", "gamma", "padding")
    reference = EpisodeReplay(settings["capacity"] // num_envs, num_envs, *(settings[name] for name in names))
    first = [True] * num_envs
    for row in ends:
        entries = []
        for env_index, end in enumerate(row):
            frame = generator.integers(1, 200, frame_shape).astype(dtype)
            fresh = first[env_index]
            terminated = end in ("terminated", "both", "life") and not fresh
            truncated = end in ("truncated", "both") and not fresh
            reward = float(generator.normal())
            entries.append(Entry(frame, int(generator.integers(18)), reward, terminated, truncated, fresh))
            first[env_index] = end in ("terminated", "truncated", "both", "cut")
        frames, *columns = zip(*entries, strict=True)
        replay.append(np.stack(frames).astype(replay.dtype), *map(np.array, columns))
        reference.append(entries)
        yield replay, reference


def assert_equals_reference(replay, reference):
    """Assert that the same transitions can be sampled, and that they hold the same."""
    expected = reference.transitions()
    indices = replay.valid_indices()
    assert sorted(indices.tolist()) == sorted(expected)
    assert len(replay) == len(expected)
    if expected:
        batch = replay.gather(indices)
        for row, index in enumerate(indices.tolist()):
            transition = expected[index]
            np.testing.assert_array_equal(batch.obs[row], transition.obs)
            np.testing.assert_array_equal(batch.next_obs[row], transition.next_obs)
            assert batch.action[row] == transition.action
            assert batch.reward[row] == np.float32(transition.reward)
            assert batch.discount[row] == np.float32(transition.discount)
        np.testing.assert_array_equal(batch.index, indices)
        assert replay.prioritized or (batch.weight == 1).all()
        sampled = replay.sample(16)
        for row, index in enumerate(sampled.index.tolist()):
            np.testing.assert_array_equal(sampled.next_obs[row], expected[index].next_obs)
    np.testing.assert_array_equal(replay.latest(), reference.latest())

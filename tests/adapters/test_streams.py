"""Batches of steps in any order: what was stored comes out, and windows stay within their environment."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pydqn import TransitionReplay
from pydqn._util.files import Damaged
from pydqn._util.weights import save_weights
from pydqn.adapters._torchrl.orders import episode_starts
from pydqn.adapters._torchrl.streams import EpisodeStreams

SHAPE, STACK = (3, 4, 5), 3


class Rows:
    """Steps of several environments of random frames; every row has a number."""

    def __init__(self, envs, random, ends=0.1):
        self.ends, self.random, self.rows, self.envs = ends, random, [], [[] for _ in range(envs)]
        self.now, self.ids = [self._reset() for _ in range(envs)], list(range(envs))

    def _frame(self):
        return self.random.integers(1, 256, SHAPE[1:]).astype(np.uint8)

    def _reset(self):
        return np.stack([self._frame()] * STACK)

    def step(self, env):
        """Return the number of a new row."""
        obs = self.now[env]
        after = np.concatenate([obs[1:], self._frame()[None]])
        ends, cut = self.random.random(2) < self.ends
        self.rows.append((obs, after, float(self.random.normal()), ends, ends or cut, self.ids[env]))
        self.envs[env].append(len(self.rows) - 1)
        self.now[env] = after
        if ends or cut:
            self.now[env] = self._reset()
            self.ids[env] = max(self.ids) + 1
        return len(self.rows) - 1

    def batch(self, numbers):
        obs, after, reward, ends, done, ids = (np.array(x) for x in zip(*[self.rows[n] for n in numbers], strict=True))
        return obs, after, reward, ends, done, ids

    def windows(self, n_step, gamma):
        """Return last row, discounted rewards and length of each complete window, by its first row."""
        found = {}
        for numbers in self.envs:
            for start in range(len(numbers)):
                total = 0.0
                for k, number in enumerate(numbers[start : start + n_step], 1):
                    _, _, reward, _, done, _ = self.rows[number]
                    total += gamma ** (k - 1) * np.float64(np.float32(reward))
                    if done or k == n_step:
                        found[numbers[start]] = (number, total, k)
                        break
        return found


def feed(streams, rows, numbers, with_ids, steps=None):
    obs, after, reward, ends, done, ids = rows.batch(numbers)
    if not with_ids:
        ids = None if steps is None else np.repeat(np.arange(len(obs) // steps), steps)
    starts = episode_starts(obs, after, ids)
    return streams.extend(obs, after, reward, ends, done, starts, ids, {("number",): torch.tensor(numbers)})


def numbers_of(streams, index, steps=0):
    return streams.columns[("number",)].numpy()[streams.slots_at(index, steps)]


def assert_right(streams, rows, n_step, gamma, whole=True):
    held = streams.transitions.frame_replay.valid_indices()
    batch, k = streams.transitions.gather(held), streams.transitions.windows(held).steps
    first, last = numbers_of(streams, held), numbers_of(streams, held, k - 1)
    wanted = rows.windows(n_step, gamma)
    for row in range(len(held)):
        np.testing.assert_array_equal(batch.obs[row], rows.rows[first[row]][0])
        np.testing.assert_array_equal(batch.next_obs[row], rows.rows[last[row]][1])
        if whole:
            number, total, steps = wanted[first[row]]
            assert (last[row], k[row]) == (number, steps)
            assert batch.reward[row] == np.float32(total)
    return first


@pytest.mark.filterwarnings("ignore:num_envs. the buffer keeps only:UserWarning")  # one at a time, unevenly
@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 4),
    st.sampled_from([1, 3]),
    st.sampled_from(["blocks", "steps", "alone", "marked"]),
    st.booleans(),
    st.sampled_from([40, 10_000]),
    st.integers(0, 2**32),
)
def test_any_order(envs, n_step, layout, with_ids, capacity, seed):
    random = np.random.default_rng(seed)
    rows = Rows(envs, random)
    replay = TransitionReplay(capacity, SHAPE, num_envs=envs, stack=STACK, n_step=n_step, gamma=0.9)
    streams = EpisodeStreams(replay)
    for _ in range(8):
        length = int(random.integers(1, 12))
        if layout == "alone":
            env = int(random.integers(envs))
            numbers = [rows.step(env) for _ in range(length)]
        else:
            numbers = np.array([[rows.step(env) for env in range(envs)] for _ in range(length)])
            numbers = (numbers if layout == "steps" else numbers.T).ravel().tolist()
        index = feed(streams, rows, numbers, with_ids, length if layout == "marked" else None)
        held = np.isin(index, replay.frame_replay.valid_indices())
        np.testing.assert_array_equal(numbers_of(streams, index[held]), np.array(numbers)[held])
    found = assert_right(streams, rows, n_step, 0.9)
    assert len(set(found)) == len(found) == len(replay)
    if capacity > 40:
        assert sorted(found) == sorted(rows.windows(n_step, 0.9))
        done = sum(row[4] for row in rows.rows)
        # one frame per step, and one per start of an episode
        assert sum(replay.frame_replay.env_time_steps) <= len(rows.rows) + done + envs


def test_more_environments_than_expected():
    rows = Rows(3, np.random.default_rng(0))
    streams = EpisodeStreams(TransitionReplay(10_000, SHAPE, stack=STACK, n_step=3, gamma=0.9))
    numbers = [[rows.step(env) for env in range(3) for _ in range(4)] for _ in range(10)]
    feed(streams, rows, numbers[0], True)
    with pytest.warns(UserWarning, match="num_envs: the buffer was made for 1 environments"):
        feed(streams, rows, numbers[1], True)
    for batch in numbers[2:]:
        feed(streams, rows, batch, True)  # warned once
    found = assert_right(streams, rows, 3, 0.9, whole=False)
    assert len(found) > 110


def test_ids_tell_environments_with_equal_observations_apart():
    streams = EpisodeStreams(TransitionReplay(100, (2,), "float32", num_envs=2, n_step=2, gamma=1.0))
    alike, never = np.ones((2, 2), np.float32), np.zeros(2, bool)
    for step, order in enumerate([[0, 1], [1, 0], [0, 1]]):  # rewards show which is which
        reward, ids = 10.0**step * np.array([[1, 5][env] for env in order]), np.array(order)
        streams.extend(alike, alike, reward, never, never, episode_starts(alike, alike, ids), ids, {})
    held = streams.transitions.gather(streams.transitions.frame_replay.valid_indices())
    assert sorted(held.reward.tolist()) == [11, 55, 110, 550]


def test_fewer_environments_than_expected():
    rows = Rows(1, np.random.default_rng(0), ends=0.0)
    streams = EpisodeStreams(TransitionReplay(100, SHAPE, stack=STACK, num_envs=5))
    numbers = [rows.step(0) for _ in range(300)]
    feed(streams, rows, numbers[:199], False)
    message = "keeps only 20 of the newest 100 transitions, as each of its 5 environments keeps 20, and 4 of them"
    with pytest.warns(UserWarning, match=message):
        feed(streams, rows, numbers[199:210], False)
    feed(streams, rows, numbers[210:], False)  # warned once


def test_a_refused_row_leaves_the_others_whole():
    rows = Rows(2, np.random.default_rng(0))
    streams = EpisodeStreams(TransitionReplay(100, SHAPE, stack=STACK, num_envs=2))
    numbers = [rows.step(env) for env in range(2) for _ in range(6)]
    good = rows.rows[9]
    rows.rows[9] = (*good[:2], np.nan, *good[3:])
    with pytest.raises(ValueError, match="reward: expected finite"):
        feed(streams, rows, numbers, False)
    rows.rows[9] = good
    assert sorted(assert_right(streams, rows, 1, 1.0)) == [0, 1, 2, 6, 7, 8]


def test_saved_and_loaded(tmp_path):
    rows = Rows(2, np.random.default_rng(1))
    made = {"num_envs": 2, "n_step": 3, "gamma": 0.9, "stack": STACK}
    streams = EpisodeStreams(TransitionReplay(60, SHAPE, **made))
    for _ in range(5):
        feed(streams, rows, [rows.step(env) for env in range(2) for _ in range(10)], False)
    for path in (tmp_path / "one", tmp_path / "one"):
        streams.save(path, {"about": ["frames", 3]})
    loaded, notes = EpisodeStreams.load(tmp_path / "one", 60, **made)
    assert notes == {"about": ["frames", 3]}
    again, notes = EpisodeStreams.from_state(loaded.state({}), 60, **{**made, "stack": None})
    assert notes == {}
    drawn = streams.transitions.sample(20).index.tolist()
    for one in (loaded, again):
        assert_right(one, rows, 3, 0.9)
        assert one.transitions.sample(20).index.tolist() == drawn
        assert one.nbytes == streams.nbytes
    more = Rows(2, np.random.default_rng(2))
    more.rows, more.envs = rows.rows, rows.envs  # environments start again
    feed(loaded, more, [more.step(env) for env in range(2) for _ in range(10)], False)
    assert_right(loaded, more, 3, 0.9, whole=False)


def test_damage_is_found(tmp_path):
    rows = Rows(1, np.random.default_rng(1))
    streams = EpisodeStreams(TransitionReplay(60, SHAPE, stack=1))
    feed(streams, rows, [rows.step(0) for _ in range(10)], False)
    streams.save(tmp_path, {})
    feed(streams, rows, [rows.step(0) for _ in range(10)], False)
    streams.transitions.frame_replay.save(tmp_path / "replay-1")
    with pytest.raises(Damaged, match="were not saved together"):
        EpisodeStreams.load(tmp_path, 60)
    save_weights(tmp_path / "columns-1.safetensors", {"a": torch.zeros(1)}, {"b": 1})
    with pytest.raises(Damaged, match=r"columns-1.safetensors: expected [0-9]+ bytes"):
        EpisodeStreams.load(tmp_path, 60)
    (tmp_path / "streams.json").unlink()
    with pytest.raises(Damaged, match=r"streams.json: cannot be read"):
        EpisodeStreams.load(tmp_path, 60)

"""Prioritized sampling against closed forms and a list of numbers."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pydqn import FrameReplay, TransitionReplay
from pydqn._core import SumTree
from tests.helpers.reference import Entry, EpisodeReplay, NaiveSumTree


@pytest.mark.parametrize("leaves", [1, 7, 8, 9, 64, 65, 700])
def test_the_tree_finds_what_a_list_would(leaves):
    generator = np.random.default_rng(leaves)
    tree, naive = SumTree(leaves), NaiveSumTree(leaves)
    for _ in range(300):
        leaf = int(generator.integers(leaves))
        # Whole numbers, many of them zero: sums are exact, and so are the borders between shares.
        tree[leaf] = naive.values[leaf] = float(generator.integers(0, 3))
        total = sum(naive.values)
        assert tree.total == total
        assert tree[leaf] == naive.values[leaf]
        if total:
            for mass in {0.0, total - 1, total, float(generator.integers(total)), generator.uniform(0, total)}:
                found = tree.find(mass)
                assert found == naive.find(mass)
                assert naive.values[found] > 0


def test_no_rounding_error_adds_up():
    generator = np.random.default_rng(0)
    tree, values = SumTree(100), np.zeros(100)
    for _ in range(20_000):
        leaf = int(generator.integers(100))
        tree[leaf] = values[leaf] = 10.0 ** generator.uniform(-12, 12)
    fresh = SumTree(100)
    for leaf, value in enumerate(values):
        fresh[leaf] = value
    assert tree.total == fresh.total
    assert tree.total == pytest.approx(math.fsum(values), rel=1e-14)


DRAWN = [8, 12, 20, 23, 28, 30, 35, 37]  # by the release before


def filled(count=40, capacity=64, **settings):
    replay = FrameReplay(capacity, (2,), stack=2, dtype="int64", prioritized=True, **settings)
    for time_step in range(count):
        replay.append([[time_step, 1]], [time_step % 5], [1.0], [False], [False], [time_step == 0])
    return replay


def test_draws_follow_the_priorities_once_to_the_power_of_alpha():
    replay = filled(alpha=0.7)
    index = replay.valid_indices()
    priority = np.linspace(0.1, 9.0, len(index))
    replay.update_priorities(index, priority)
    chance = priority**0.7 / (priority**0.7).sum()
    drawn = np.concatenate([replay.sample(50).index for _ in range(4000)])
    count = np.array([(drawn == one).sum() for one in index])
    assert count.sum() == len(drawn)
    expected = chance * len(drawn)
    # Drawing from equal shares spreads less than independent draws do.
    assert ((count - expected) ** 2 / expected).sum() < len(index) + 4 * math.sqrt(2 * len(index))


def test_each_share_gets_one_draw():
    replay = filled()
    index = replay.valid_indices()
    replay.update_priorities(index, np.ones(len(index)))
    for _ in range(20):
        np.testing.assert_array_equal(np.sort(replay.sample(len(index)).index), index)


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_weights_are_the_closed_form(beta):
    replay = filled(alpha=0.6, beta=beta)
    index = replay.valid_indices()
    priority = np.random.default_rng(0).uniform(0.01, 5, len(index))
    replay.update_priorities(index, priority)
    chance = dict(zip(index.tolist(), priority**0.6 / (priority**0.6).sum(), strict=True))
    batch = replay.sample(16)
    weight = np.array([(len(index) * chance[one]) ** -beta for one in batch.index.tolist()])
    np.testing.assert_allclose(batch.weight, weight / weight.max(), rtol=1e-6)
    replay.beta = 0.5
    assert replay.sample(16).weight.max() == 1
    assert replay.sample(16).weight.min() < 1


def test_a_share_of_the_draws_is_uniform():
    """Draws follow the mixture, and weights are of its probabilities."""
    replay = filled(alpha=0.7, beta=0.8, uniform_share=0.3)
    index = replay.valid_indices()
    priority = np.geomspace(1e-6, 9.0, len(index))
    replay.update_priorities(index, priority)
    chance = 0.7 * priority**0.7 / (priority**0.7).sum() + 0.3 / len(index)
    drawn, weights = (np.concatenate(each) for each in zip(*(replay.sample(50)[5:] for _ in range(4000)), strict=True))
    count = np.array([(drawn == one).sum() for one in index])
    expected = chance * len(drawn)
    assert ((count - expected) ** 2 / expected).sum() < len(index) + 4 * math.sqrt(2 * len(index))
    of = (len(index) * chance[np.searchsorted(index, drawn)]) ** -0.8
    largest = of.reshape(-1, 50).max(axis=1)
    np.testing.assert_allclose(weights.reshape(-1, 50), of.reshape(-1, 50) / largest[:, None], rtol=1e-6)
    replay.uniform_share = 1.0
    assert (replay.sample(50).weight == 1).all()


def test_without_a_uniform_share_draws_are_what_they_were():
    """Runs that were saved before there was one go on as they would have."""
    replay = filled(alpha=0.7, seed=3)
    index = replay.valid_indices()
    replay.update_priorities(index, np.linspace(0.1, 9.0, len(index)))
    assert replay.sample(8).index.tolist() == DRAWN


def test_the_uniform_share_is_saved(tmp_path):
    replay = filled(uniform_share=0.25)
    replay.update_priorities(replay.valid_indices()[:1], [1e-6])
    replay.save(tmp_path / "replay")
    loaded, restored = FrameReplay.load(tmp_path / "replay"), filled(count=5)
    restored.restore(tmp_path / "replay")
    for other in (loaded, restored, copy.deepcopy(replay)):
        assert other.uniform_share == 0.25
    filled().save(tmp_path / "without")  # as files are that older releases wrote
    restored.restore(tmp_path / "without")
    assert restored.uniform_share == 0.0
    again = TransitionReplay(20, (2,), "float32", prioritized=True, uniform_share=0.5)
    again.save(tmp_path / "transitions")
    assert TransitionReplay.load(tmp_path / "transitions", (2,)).frame_replay.uniform_share == 0.5


def test_new_transitions_enter_at_the_largest_priority_so_far():
    replay = filled(alpha=1.0, count=20)
    index = replay.valid_indices()
    replay.update_priorities(index, np.full(len(index), 0.001))
    replay.update_priorities(index[:1], [50.0])
    replay.update_priorities(index[:1], [0.001])  # the largest so far stays
    assert replay.largest_priority == 50
    replay.append([[99, 1]], [0], [1.0], [False], [False], [False])
    (new,) = set(replay.valid_indices().tolist()) - set(index.tolist())
    drawn = np.concatenate([replay.sample(10).index for _ in range(200)])
    assert (drawn == new).mean() == pytest.approx(50 / (50 + 0.001 * len(index)), abs=1e-2)


@pytest.mark.parametrize("alpha", [1.0, 0.6, 0.0])
def test_the_largest_priority_is_as_it_was_given(alpha):
    """Not to the power of alpha, which may change. With alpha 0 all priorities are 1."""
    replay = filled(alpha=alpha)
    assert replay.largest_priority == 1
    replay.update_priorities(replay.valid_indices()[:2], [7.0, 0.5])
    assert replay.largest_priority == pytest.approx(7 if alpha else 1)
    replay.alpha = 0.3
    assert replay.largest_priority == pytest.approx(7)
    replay.clear()
    assert replay.largest_priority == 1


def test_alpha_zero_is_uniform():
    replay = filled(alpha=0.0)
    index = replay.valid_indices()
    replay.update_priorities(index, np.geomspace(1e-6, 1e6, len(index)))
    batch = replay.sample(len(index))
    np.testing.assert_array_equal(np.sort(batch.index), index)
    assert (batch.weight == 1).all()


def test_extreme_priorities_are_still_drawn():
    replay = filled(alpha=1.0)
    index = replay.valid_indices()
    replay.update_priorities(index, np.full(len(index), 5e-324))
    assert set(replay.sample(len(index)).index.tolist()) == set(index.tolist())
    replay.update_priorities(index, np.full(len(index), 3e38))
    assert set(replay.sample(len(index)).index.tolist()) == set(index.tolist())


@st.composite
def streams(draw):
    """Settings, and for each time step how it ends in each environment: t, c or not at all; e starts an episode."""
    num_envs, stack, n_step = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    capacity = num_envs * draw(st.integers(stack + n_step, 9))
    ends = st.lists(st.sampled_from("....tce"), min_size=num_envs, max_size=num_envs)
    return num_envs, stack, n_step, capacity, draw(st.lists(ends, max_size=40)), draw(st.integers(0, 2**32))


@settings(max_examples=80, deadline=None)
@given(streams())
def test_nothing_invalid_is_ever_drawn(stream):
    """Through ends of episodes, wrap-arounds, and updates of transitions that may be overwritten."""
    num_envs, stack, n_step, capacity, ends, seed = stream
    generator = np.random.default_rng(seed)
    replay = FrameReplay(
        capacity, (1,), stack=stack, n_step=n_step, num_envs=num_envs, prioritized=True, seed=seed, dtype="float32"
    )
    reference = EpisodeReplay(capacity // num_envs, num_envs, stack, n_step, 0.99, "zero")
    seen, starts = [], [True] * num_envs
    for time_step, row in enumerate(ends):
        entries = []
        for end, start in zip(row, starts, strict=True):
            first = start or end == "e"
            terminated, truncated = (end == kind and not first for kind in "tc")
            entries.append(Entry(generator.random(1, np.float32), time_step, 1.0, terminated, truncated, first))
        frames, *columns = zip(*entries, strict=True)
        replay.append(np.stack(frames), *columns)
        reference.append(entries)
        starts = [entry.terminated or entry.truncated for entry in entries]
        valid = reference.transitions()
        assert len(replay) == len(valid)
        if valid:
            batch = replay.sample(len(valid) + 3)
            assert set(batch.index.tolist()) <= set(valid)
            for row, one in enumerate(batch.index.tolist()):
                np.testing.assert_array_equal(batch.obs[row], valid[one].obs)
            seen += batch.index.tolist()
            some = generator.choice(seen, 5)
            replay.update_priorities(some, generator.uniform(1e-9, 9, 5))


def test_a_loaded_buffer_goes_on_as_the_saved_one(tmp_path):
    replay = filled(count=150, alpha=0.8, beta=0.3)
    index = replay.valid_indices()
    replay.update_priorities(index, np.geomspace(1e-3, 7, len(index)))
    replay.update_priorities(index[3:4], [1e-3])
    replay.sample(5)
    replay.save(tmp_path / "replay")
    loaded = FrameReplay.load(tmp_path / "replay")
    assert (loaded.prioritized, loaded.alpha, loaded.beta) == (True, 0.8, 0.3)
    for time_step in range(5):
        for ours, theirs in zip(replay.sample(32), loaded.sample(32), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        for each in (replay, loaded):  # the largest priority so far is kept, too
            each.append([[time_step, 2]], [0], [1.0], [False], [False], [False])
            each.update_priorities(each.valid_indices()[:2], [0.5, 0.25])


def test_priorities_of_overwritten_transitions_are_skipped():
    replay = filled(count=40)
    gone = replay.valid_indices()[:5]
    for time_step in range(60):
        replay.append([[time_step, 1]], [0], [1.0], [False], [False], [False])
    replay.update_priorities(gone, np.full(5, 1e30))
    # The transitions in their slots now are as likely as all others: each share gets one draw.
    index = replay.valid_indices()
    np.testing.assert_array_equal(np.sort(replay.sample(len(index)).index), index)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf, 1e39])
def test_bad_priorities_change_nothing(bad):
    replay = filled()
    index = replay.valid_indices()
    with pytest.raises(ValueError, match="^priority: expected positive finite"):
        replay.update_priorities(index[:2], [5.0, bad])
    assert (replay.sample(20).weight == 1).all()


def test_bad_indices_change_nothing():
    replay = filled()
    index = replay.valid_indices()
    for wrong in (-1, 40, 2**62):
        with pytest.raises(ValueError, match=f"^index: {wrong} has never been a transition"):
            replay.update_priorities([index[0], wrong], [5.0, 1.0])
    with pytest.raises(ValueError, match="^priority: expected shape"):
        replay.update_priorities(index[:2], [1.0])
    with pytest.raises(ValueError, match="^index: expected a list of integers"):
        replay.update_priorities([0.5], [1.0])
    with pytest.raises(ValueError, match="^priority: expected real numbers"):
        replay.update_priorities([1], ["a"])
    assert (replay.sample(20).weight == 1).all()


def test_a_uniform_buffer_has_no_priorities():
    replay = FrameReplay(10, (1,))
    with pytest.raises(RuntimeError, match="^update_priorities: this replay buffer samples uniformly"):
        replay.update_priorities([0], [1.0])


@pytest.mark.parametrize(
    ("name", "bad"), [("alpha", 1.5), ("alpha", "a"), ("beta", -0.1), ("prioritized", 1), ("uniform_share", 1.1)]
)
def test_the_constructor_names_what_is_wrong(name, bad):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        FrameReplay(10, (1,), **{"prioritized": True, name: bad})


def test_the_tree_counts_as_memory():
    assert FrameReplay(1000, (1,), prioritized=True).nbytes > FrameReplay(1000, (1,)).nbytes + 8 * 1000


def test_an_empty_tree_takes_no_memory():
    import psutil

    before = psutil.Process().memory_info().rss
    replay = FrameReplay(1 << 28, (1,), prioritized=True)  # the tree alone would be 2.4 GB
    assert replay.nbytes > 1 << 31
    assert psutil.Process().memory_info().rss - before < 64 << 20


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf, 1e39])
def test_a_file_may_not_bring_in_what_update_priorities_refuses(bad):
    source = filled(count=5)._core
    columns, priorities = source.export_run(0, 0, 5, 5), source.export_priorities(0, 5)
    priorities[2] = bad
    loaded = FrameReplay(64, (2,), stack=2, dtype="int64", prioritized=True)._core
    loaded.set_time_steps([5])
    loaded.import_run(0, 0, *columns)
    loaded.import_priorities(0, priorities)
    with pytest.raises(ValueError, match="^priority: .* does not fit its transition"):
        loaded.end_import()

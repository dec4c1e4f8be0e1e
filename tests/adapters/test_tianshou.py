"""Tianshou's buffers and ours on the same streams: the same batches, returns and learning."""

from __future__ import annotations

import copy
import pickle

import gymnasium
import numpy as np
import pytest
import torch

pytest.importorskip("tianshou", reason="Tianshou is not installed: pip install 'pydqn[adapters]'")

from tianshou import data as theirs
from tianshou.algorithm import DQN
from tianshou.algorithm.modelfree.dqn import DiscreteQLearningPolicy
from tianshou.algorithm.optim import AdamOptimizerFactory
from tianshou.data import Collector, CollectStats
from tianshou.env import DummyVectorEnv
from tianshou.trainer import OffPolicyTrainerParams
from tianshou.utils.net.common import Net

from pydqn.adapters import tianshou as ours
from tests.helpers.tianshou_streams import ATARI, KINDS, World, counting, returns, rows, same


@pytest.mark.parametrize("kind", ["vectors", "numbers", "stacks"])
@pytest.mark.parametrize(("name", "options"), [("Vector", {}), ("PrioritizedVector", {"alpha": 0.6, "beta": 0.4})])
def test_everything_equals_tianshous_buffer(kind, name, options):
    world = World(kind, 3, 11, seed=1)
    mine, other = (getattr(module, f"{name}ReplayBuffer")(33, 3, **options) for module in (ours, theirs))

    def check():
        every = other.sample_indices(0)
        same(mine.sample_indices(0), every)
        assert len(mine) == len(other) == len(every)
        forms = [every, every[None, ::2], int(every[0]), slice(None)]
        for index in forms if options else [*forms, every.tolist(), np.isin(np.arange(33), every)]:
            one, two = mine[index], other[index]
            np.testing.assert_allclose(one.pop("weight", 1.0), two.pop("weight", 1.0), rtol=1e-14)
            same(one, two)
        for key in ("obs", "obs_next", "info", "rew"):
            same(mine.get(every, key), other.get(every, key))
        for index in (every, int(every[-1])):
            same(mine.next(index), other.next(index))
            same(mine.prev(index), other.prev(index))
        same(mine.unfinished_index(), other.unfinished_index())
        same(mine.last_index, other.last_index)
        assert mine.hasnull() == other.hasnull()
        for n_step in (1, 2, 5):
            assert torch.equal(returns(mine, every, n_step), returns(other, every, n_step))
        if options:
            priority = world.random.random(len(every)) * 3
            mine.update_weight(every, priority)
            other.update_weight(every, torch.from_numpy(priority))

    world.play([mine, other], 120, check)
    same(mine.subbuffer_edges, other.subbuffer_edges)
    assert set(vars(other)) <= set(vars(mine))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 2])
def test_observations_are_as_they_were(kind, seed):
    buffer = ours.VectorReplayBuffer(40 * (1 + seed), 1 + seed, **KINDS[kind][0])

    def check():
        every = buffer.sample_indices(0)
        assert sorted(every) == sorted(world.expected)
        assert len(buffer[1:].rew) == len(every) - 1
        for batch, indices in ((buffer[every], every), buffer.sample(20)):
            for row, position in enumerate(indices.tolist()):
                expected = world.expected[position]
                same(batch.obs[row], expected["obs"])
                same(batch.obs_next[row], expected["obs_next"])
                assert (batch.act[row], batch.rew[row], batch.done[row]) == tuple(
                    expected[k] for k in ("act", "rew", "done")
                )
        same(buffer.next(every), np.array([world.after.get(position, position) for position in every.tolist()]))
        before = {after: position for position, after in world.after.items()}
        same(buffer.prev(every), np.array([before.get(position, position) for position in every.tolist()]))
        open_ends = [position for position in sorted(every.tolist()) if position not in world.after]
        open_ends = [position for position in open_ends if not world.expected[position]["done"]]
        assert buffer.unfinished_index().tolist() == open_ends
        for n_step in (1, 4):
            expected = [world.returns(position, n_step) for position in every.tolist()]
            np.testing.assert_allclose(returns(buffer, every, n_step), expected, rtol=1e-12)

    for again in range(2):
        world = World(kind, 1 + seed, 40, seed + 6 * again, breaks=0.03)
        world.play([buffer], 110, check, some=bool(seed))
        batch = buffer[:]
        after = batch.obs_next.copy()
        batch.obs[...] = 77
        same(batch.obs_next, after)  # they share no memory
        check()
        buffer.reset()
        assert len(buffer) == len(buffer.transitions) == len(buffer.sample_indices(0)) == 0


@pytest.mark.parametrize("name", ["VectorReplayBuffer", "PrioritizedVectorReplayBuffer"])
def test_images_of_short_episodes_are_overwritten_before_their_positions(name):
    world = World(
        "Atari", 2, 100, seed=0, ends=0.3, frame=(33, 33)
    )  # above 1 KB: no memory is set aside for the worst case
    options = {"alpha": 0.6, "beta": 0.4} if name[0] == "P" else {}
    buffer = getattr(ours, name)(200, 2, **options, **ATARI)
    seen = []

    def check():
        every = buffer.sample_indices(0)
        assert len(buffer) == len(every) == len(buffer[1:]) + 1 <= len(world.expected)
        assert set(buffer.sample(300)[1]) <= set(every) == set(buffer.sample_indices(None))
        for row, position in enumerate(every.tolist()):
            same(buffer[every].obs[row], world.expected[position]["obs"])
        same(buffer.next(every), np.array([world.after.get(position, position) for position in every.tolist()]))
        before = {after: position for position, after in world.after.items() if position in every}
        same(buffer.prev(every), np.array([before.get(position, position) for position in every.tolist()]))
        for position in set(range(200)) - set(every.tolist()):
            with pytest.raises(ValueError, match="index: expected positions at which transitions are held"):
                buffer[[position]]
        seen.append(len(world.expected) - len(every))

    world.play([buffer], 230, check)
    assert seen[0] == 0
    assert max(seen) > 20
    every, counts = np.unique(buffer.sample_indices(40_000), return_counts=True)
    assert len(every) == len(buffer)
    assert np.abs(counts / 40_000 * len(every) - 1).max() < 0.3


def test_draws_are_uniform_or_in_proportion():
    buffer = ours.VectorReplayBuffer(30, 3)
    for step, env_indices in enumerate([[0], [0, 2], [2], [2, 1]] * 3):  # unequal, none full
        buffer.add(rows([[step]] * len(env_indices), [[step + 1]] * len(env_indices)), env_indices)
    at, counts = np.unique(buffer.sample_indices(60_000), return_counts=True)
    assert sorted(at) == sorted(buffer.sample_indices(0)) == [*range(6), *range(10, 13), *range(20, 29)]
    np.testing.assert_allclose(counts / 60_000, 1 / len(at), rtol=0.08)
    buffer = counting(ours.PrioritizedVectorReplayBuffer, 2, 5, alpha=0.5, beta=1.0)
    priority = np.array([1.0, 4, 9, 16, 25] * 2)
    buffer.update_weight(buffer.sample_indices(0), priority)
    at, counts = np.unique(buffer.sample_indices(60_000), return_counts=True)
    assert at.tolist() == [0, 1, 2, 3, 4, 10, 11, 12, 13, 14]
    np.testing.assert_allclose(counts / 60_000, np.sqrt(priority) / 30, rtol=0.08)
    np.testing.assert_allclose(buffer[at].weight, priority**-0.5, rtol=1e-6)


@pytest.mark.parametrize("kind", ["vectors", "Atari", "frames"])
@pytest.mark.parametrize("way", ["pickle", "deepcopy", "hdf5"])
def test_a_copy_behaves_as_the_buffer_would(kind, way, tmp_path):
    world = World(kind, 2, 20, seed=3, breaks=0.05)
    buffer = ours.PrioritizedVectorReplayBuffer(40, 2, alpha=0.6, beta=0.4, **world.options)

    def copied():
        if way == "hdf5":
            buffer.save_hdf5(str(tmp_path / "x"), compression="gzip")
            return type(buffer).load_hdf5(str(tmp_path / "x"))
        return pickle.loads(pickle.dumps(buffer)) if way == "pickle" else copy.deepcopy(buffer)

    assert len(copied()) == 0
    world.play([buffer], 33)
    buffer.update_weight(np.arange(40), world.random.random(40))
    both = [buffer, copied()]
    for _ in range(3):
        world.play(both, 9)
        same(both[0].unfinished_index(), both[1].unfinished_index())
        for one, other in zip(*(buffer.sample(16) for buffer in both), strict=True):
            same(one, other)
    np.testing.assert_array_equal(both[0].buffers[1].rew, both[0].rew[20:])


@pytest.mark.parametrize(("kind", "options"), [("ReplayBuffer", (5,)), ("PrioritizedReplayBuffer", (5, 0.6, 0.4))])
def test_one_environment(kind, options):
    mine, other = (getattr(module, kind)(*options) for module in (ours, theirs))
    assert isinstance(mine, getattr(theirs, kind))
    for i in range(8):
        batch = rows([[i]], [[i + 1]], truncated=i == 4)
        for one, two in zip(*(buffer.add(batch[0]) for buffer in (mine, other)), strict=True):
            np.testing.assert_array_equal(one, two)
    same(mine[:], other[:])
    same(mine.add(batch, [0])[0], np.array([3]))


def cartpoles(count, seed):
    envs = DummyVectorEnv([lambda: gymnasium.make("CartPole-v1") for _ in range(count)])
    envs.seed(seed)
    return envs


def q_learning(buffer, seed, n_step=1):
    """Tianshou's DQN, and its collectors for training and tests."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002  # Tianshou explores with it
    policy = DiscreteQLearningPolicy(
        model=Net(state_shape=4, action_shape=2, hidden_sizes=[64, 64]),
        action_space=gymnasium.spaces.Discrete(2),
        eps_training=0.1,
    )
    optim = AdamOptimizerFactory(lr=1e-3)
    algorithm = DQN(policy=policy, optim=optim, gamma=0.95, n_step_return_horizon=n_step, target_update_freq=100)
    training = Collector[CollectStats](algorithm, cartpoles(10, seed), buffer, exploration_noise=True)
    return algorithm, training, Collector[CollectStats](algorithm, cartpoles(5, seed + 1))


def test_collectors_fill_both_alike():
    buffers, stats = [kind.VectorReplayBuffer(600, 10) for kind in (ours, theirs)], []
    for buffer in buffers:
        _, collector, _ = q_learning(buffer, seed=0)
        collector.reset()
        for lengths in ({"n_step": 300}, {"n_episode": 17}, {"n_step": 20, "reset_before_collect": True}):
            stats.append(collector.collect(**lengths))
    same(buffers[0][:], buffers[1][:])
    for one, other in zip(stats[:3], stats[3:], strict=True):
        np.testing.assert_array_equal(one.returns, other.returns)


@pytest.mark.parametrize(("kind", "n_step"), [("own", 3), ("pydqn", 3), ("pydqn, prioritized", 1)])
def test_tianshous_dqn_learns_cartpole(kind, n_step):
    """Only the buffer is another one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if kind == "pydqn, prioritized":
            buffer = ours.PrioritizedVectorReplayBuffer(5000, 10, alpha=0.6, beta=0.4)
        else:
            buffer = (theirs if kind == "own" else ours).VectorReplayBuffer(5000, 10)
        algorithm, training, test = q_learning(buffer, seed=1, n_step=n_step)
        training.reset()
        training.collect(n_step=640)
        result = algorithm.run_training(
            OffPolicyTrainerParams(
                training_collector=training,
                test_collector=test,
                max_epochs=8,
                epoch_num_steps=1500,
                collection_step_num_env_steps=10,
                update_step_num_gradient_steps_per_sample=0.2,
                batch_size=64,
                test_step_num_episodes=5,
                stop_fn=lambda mean: mean >= 150,
                show_progress=False,
            )
        )
    finally:
        torch.set_num_threads(threads)
    assert result.best_score >= 150  # at random, it is 20

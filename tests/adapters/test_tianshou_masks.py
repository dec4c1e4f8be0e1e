"""Observations with action masks in Tianshou's way: as with Tianshou's buffer, or refused by name."""

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
from tianshou.data import Batch, Collector, CollectStats
from tianshou.env import DummyVectorEnv
from tianshou.trainer import OffPolicyTrainerParams
from tianshou.utils.net.common import Net

from pydqn.adapters import tianshou as ours
from tests.helpers.tianshou_streams import World, rows, same

NAMES = [
    ("ReplayBuffer", (20,), {}),
    ("VectorReplayBuffer", (33, 3), {}),
    ("PrioritizedVectorReplayBuffer", (33, 3), {"alpha": 0.6, "beta": 0.4}),
]


class MaskedWorld(World):
    """Random environments whose observations come with masks of `actions` actions."""

    def __init__(self, *arguments, actions, dtype, **options):
        self.masks = np.random.default_rng(9), actions, dtype
        super().__init__(*arguments, **options)

    def step(self, env_indices):
        batch, (random, actions, dtype) = super().step(env_indices), self.masks
        for name in ("obs", "obs_next"):
            mask = random.integers(2, size=(len(env_indices), actions)).astype(dtype)
            batch[name] = Batch(obs=batch[name], mask=mask)
        return batch


def masked(obs, masks):
    """Return a batch of one transition per row, whose obs_next has the opposite mask."""
    masks = np.asarray(masks)
    batch = rows(obs, np.asarray(obs) + 1)
    batch.obs, batch.obs_next = Batch(obs=batch.obs, mask=masks), Batch(obs=batch.obs_next, mask=1 - masks)
    return batch


@pytest.mark.parametrize(("name", "arguments", "options"), NAMES)
@pytest.mark.parametrize(("actions", "dtype"), [(5, "bool"), (8, "int8"), (19, "float32")])
@pytest.mark.parametrize("kind", ["vectors", "stacks"])
def test_masks_come_back_as_from_tianshous_buffer(kind, actions, dtype, name, arguments, options):
    num_envs = 3 if "Vector" in name else 1
    world = MaskedWorld(kind, num_envs, arguments[0] // num_envs, seed=1, actions=actions, dtype=dtype)
    mine, other = (getattr(module, name)(*arguments, **options) for module in (ours, theirs))

    def check():
        every = other.sample_indices(0)
        same(mine.sample_indices(0), every)
        for index in (every, every[None, ::2], int(every[0]), slice(None)):
            one, two = mine[index], other[index]
            np.testing.assert_allclose(one.pop("weight", 1.0), two.pop("weight", 1.0), rtol=1e-14)
            same(one, two)
        for key in ("obs", "obs_next", "rew"):
            same(mine.get(every, key), other.get(every, key))
        assert not mine.hasnull()

    world.play([mine, other], 40, check)
    for again in (pickle.loads(pickle.dumps(mine)), copy.deepcopy(mine)):
        same(again[:], mine[:])
    before = mine[:]
    before.obs.mask[...] = 1 - before.obs.mask
    check()  # a batch shares no memory with the buffer
    for buffer in (mine, other):
        buffer.reset()
    world.play([mine, other], 15)
    same(mine[:].obs, other[:].obs)


def test_files_and_update_keep_masks(tmp_path):
    mine = ours.ReplayBuffer(6)
    for number in range(9):
        mine.add(masked([[1.0 * number]], [[number % 2, 1, 0]])[0])
    mine.save_hdf5(str(tmp_path / "buffer.hdf5"))
    again = ours.ReplayBuffer.load_hdf5(str(tmp_path / "buffer.hdf5"))
    same(again[:], mine[:])
    taken = ours.ReplayBuffer(6)
    taken.update(mine)
    same(taken[:].obs, mine[:].obs)
    assert taken[:].obs.mask.tolist() == [[number % 2, 1, 0] for number in range(3, 9)]
    assert taken[:].obs_next.mask.tolist() == [[1 - number % 2, 0, 1] for number in range(3, 9)]


@pytest.mark.parametrize("first", [[[1, 0, 1]], None])
def test_masks_are_refused_by_name(first):
    buffer = ours.VectorReplayBuffer(10, 1)

    def refused(batch, message):
        count = len(buffer)
        with pytest.raises(ValueError, match=message):
            buffer.add(batch)
        assert len(buffer) == count

    if first:
        buffer.add(masked([[0.0]], first))
        refused(rows([[1.0]], [[2.0]]), "^mask: expected masks in obs and obs_next, got none with a mask")
        refused(
            masked([[1.0]], [[1, 0]]),
            r"^obs.mask: expected zeros and ones of shape \(1, 3\), got int64 of shape \(1, 2\)",
        )
        refused(masked([[1.0]], [[1, 2, 0]]), "^obs.mask: expected zeros and ones.*with other numbers")
    else:
        buffer.add(rows([[0.0]], [[1.0]]))
        refused(masked([[1.0]], [[1, 0]]), "^mask: expected no masks, as in the first transition, got obs and obs_next")
    half = masked([[1.0]], [[1, 0, 1]])
    half.obs_next = half.obs_next.obs
    refused(half, "^mask: expected .*, got obs with a mask")
    named = masked([[1.0]], [[1, 0, 1]])
    named.obs.agent_id = np.array(["x"])
    named.obs_next.agent_id = np.array(["x"])
    refused(named, "^(mask|obs): expected")


@pytest.mark.parametrize("options", [{"stack_num": 2}, {"save_only_last_obs": True}])
def test_masks_of_stacks_are_refused(options):
    buffer = ours.VectorReplayBuffer(10, 1, **options)
    with pytest.raises(ValueError, match="^mask: expected observations without masks, as stack_num or save_only"):
        buffer.add(masked([[[0.0]]], [[1, 0]]))


class Doors(gymnasium.Env):
    """One of six doors is open, another one at each step; only open ones may be chosen."""

    observation_space = gymnasium.spaces.Dict(
        {"obs": gymnasium.spaces.Box(0, 6, (1,), np.float32), "mask": gymnasium.spaces.MultiBinary(6)}
    )
    action_space = gymnasium.spaces.Discrete(6)

    def _seen(self):
        self.open = self.np_random.permutation(6)[:2]
        return {"obs": np.array([self.time], np.float32), "mask": np.isin(np.arange(6), self.open).astype(np.int8)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self._seen(), {}

    def step(self, action):
        assert action in self.open, f"{action} is not one of {self.open}"
        self.time += 1
        return self._seen(), float(action), self.time == 6, False, {}


def test_a_trainer_uses_masks():
    """The collector's random and greedy actions are allowed ones, and updates see both masks."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - Tianshou draws from it
    net = Net(state_shape=(1,), action_shape=6, hidden_sizes=[16])
    policy = DiscreteQLearningPolicy(model=net, action_space=Doors.action_space, eps_training=0.3)
    algorithm = DQN(policy=policy, optim=AdamOptimizerFactory(lr=1e-2), gamma=0.9, target_update_freq=20)
    buffer = ours.VectorReplayBuffer(200, 2)
    collector = Collector[CollectStats](algorithm, DummyVectorEnv([Doors] * 2), buffer, exploration_noise=True)
    collector.reset()
    algorithm.run_training(
        OffPolicyTrainerParams(
            training_collector=collector,
            max_epochs=1,
            epoch_num_steps=200,
            collection_step_num_env_steps=10,
            update_step_num_gradient_steps_per_sample=0.2,
            batch_size=16,
            show_progress=False,
        )
    )
    batch = buffer[:]
    assert len(batch) == 200
    assert set(batch.act) == set(range(6))
    assert (batch.obs.mask.sum(1) == 2).all()
    assert (np.take_along_axis(batch.obs.mask, batch.act[:, None], 1) == 1).all()
    np.testing.assert_array_equal(batch.obs_next.mask[:5], batch.obs.mask[1:6])

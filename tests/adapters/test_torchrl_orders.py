"""A first batch in any order, without `num_envs`: no transition is lost, or the batch is refused."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # its own, when it is imported
    pytest.importorskip("torchrl", reason="needs TorchRL: pip install 'pydqn[adapters]'")
    from tensordict import TensorDict
    from torchrl.collectors import Collector
    from torchrl.collectors.utils import split_trajectories
    from torchrl.envs import SerialEnv
    from torchrl.modules import RandomPolicy

    from pydqn.adapters.torchrl import ReplayBuffer
    from tests.helpers.torchrl_streams import assert_same, cartpole, stack_of_frames, stream

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning")]
ASKS = "num_envs: expected to be given, as the first batch of [0-9]+ rows does not show"


class World:
    """Environments whose rows are numbered and kept, one by one, as the reference for what a buffer has to hold."""

    def __init__(self, envs, seed, ends):
        self.random, self.ends = torch.Generator().manual_seed(seed), ends
        self.rows, self.of, self.name = [], [[] for _ in range(envs)], list(range(envs))
        self.now = [torch.rand(3, generator=self.random) for _ in range(envs)]

    def reset(self, env):
        self.now[env] = torch.rand(3, generator=self.random)
        self.name[env] = 1 + max(self.name)

    def step(self, env):
        after = torch.rand(3, generator=self.random)
        terminated, truncated = (torch.rand(2, generator=self.random) < self.ends).tolist()
        flags = {"terminated": [terminated], "truncated": [truncated], "done": [terminated or truncated]}
        reward = torch.rand(1, generator=self.random)
        row = {"observation": self.now[env], "number": torch.tensor(len(self.rows))}
        row |= {"collector": {"traj_ids": torch.tensor(self.name[env])}}
        row["next"] = {"observation": after, "reward": reward} | {k: torch.tensor(v) for k, v in flags.items()}
        self.of[env].append(len(self.rows))
        self.rows.append(TensorDict(row))
        self.now[env] = after
        if terminated or truncated:
            self.reset(env)

    def batch(self, steps, order, named):
        """The next steps of all environments, [E, T] or flattened."""
        before = [len(rows) for rows in self.of]
        for _ in range(steps):
            for env in range(len(self.of)):
                self.step(env)
        blocks = torch.stack(
            [torch.stack([self.rows[n] for n in of[b:]]) for of, b in zip(self.of, before, strict=True)]
        )
        if not named:
            del blocks["collector"]
        return {"shaped": blocks, "blocks": blocks.reshape(-1), "steps": blocks.transpose(0, 1).reshape(-1)}[order]

    def windows(self, n_step):
        """Return the last row and the discounted rewards of each complete window, by its first row."""
        found = {}
        for numbers in self.of:
            for start, first in enumerate(numbers):
                total = 0.0
                for k, number in enumerate(numbers[start : start + n_step], 1):
                    total += 0.9 ** (k - 1) * float(self.rows[number]["next", "reward"])
                    if k == n_step or self.rows[number]["next", "done"]:
                        found[first] = (number, total)
                        break
        return found


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5),
    st.sampled_from([1, 2, 7]),
    st.sampled_from(["shaped", "blocks", "steps"]),
    st.booleans(),
    st.sampled_from([0.0, 0.15]),
    st.sampled_from([1, 3]),
    st.integers(0, 2**31),
)
def test_no_transition_is_lost(envs, steps, order, named, ends, n_step, seed):
    world, rb = World(envs, seed, ends), ReplayBuffer(1000, n_step=n_step, gamma=0.9)
    first = world.batch(steps, order, named)
    asked = False
    try:
        rb.extend(first.clone())
    except ValueError as error:
        assert str(error).startswith("num_envs: expected to be given")  # noqa: PT017
        assert order != "shaped"
        assert not named or ends
        asked = True
        assert len(rb) == 0
        rb = ReplayBuffer(1000, num_envs=envs, n_step=n_step, gamma=0.9)
        rb.extend(first.clone())
    assert asked == (steps == 1 < envs and order != "shaped" and not named) or ends
    found = rb.storage.frame_replay.num_envs
    assert found == envs or (ends and found < envs)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for _ in range(6):
            rb.extend(world.batch(steps, order, named))
    held, wanted = rb[:], world.windows(n_step)
    numbers = held["number"].tolist()
    assert len(set(numbers)) == len(numbers)
    if n_step == 1 or found == envs:
        assert sorted(numbers) == sorted(wanted)
    if found == envs:
        assert not warned
    for row, number in zip(held, numbers, strict=True):
        assert row["observation"].equal(world.rows[number]["observation"])
        if found == envs:
            last, total = wanted[number]
            assert row["next", "observation"].equal(world.rows[last]["next", "observation"])
            assert float(row["next", "reward"]) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("order", ["shaped", "blocks", "steps"])
def test_two_environments_of_a_hundred_steps(order, named):
    """They are not taken for 200 environments, each of which would keep five transitions."""
    world, rb = World(2, 0, 0.0), ReplayBuffer(1000)
    for _ in range(10):
        rb.extend(world.batch(100, order, named))
    assert rb.storage.frame_replay.num_envs == 2
    assert sorted(rb[:]["number"].tolist()) == sorted([*world.of[0][-500:], *world.of[1][-500:]])


@pytest.mark.parametrize("make", [cartpole, stack_of_frames])
@pytest.mark.parametrize("envs", [1, 3])
@pytest.mark.parametrize("order", ["shaped", "blocks", "steps"])
@pytest.mark.parametrize("named", [True, False])
def test_batches_of_collectors(make, envs, order, named):
    rb, batches = ReplayBuffer(3000, n_step=2), stream(make, envs)
    for batch in batches:
        if not named:
            del batch["collector"]
        if envs > 1 and order != "shaped":
            batch = (batch if order == "blocks" else batch.transpose(0, 1)).reshape(-1)
        rb.extend(batch.clone())
    assert rb.storage.frame_replay.num_envs == envs
    every = sum(batch.numel() for batch in batches)
    going_on = envs * (1 - batches[-1].reshape(envs, -1)["next", "done"][:, -1].float().mean())
    assert len(rb) == every - round(float(going_on))
    assert rb[:]["number"].unique().numel() == len(rb)


@pytest.mark.parametrize("envs", [1, 3])
def test_collectors_that_reset_in_between(envs):
    env = cartpole(0) if envs == 1 else SerialEnv(envs, [lambda seed=seed: cartpole(seed) for seed in range(envs)])
    settings = {"frames_per_batch": 9 * envs, "total_frames": 180 * envs, "reset_at_each_iter": True}
    collector, rb = Collector(env, RandomPolicy(env.action_spec), **settings), ReplayBuffer(1000, n_step=3)
    last, count = [], 0
    for batch in collector:
        batch["number"] = torch.arange(count, count + batch.numel()).reshape(batch.shape)
        count += batch.numel()
        last += batch["number"].reshape(envs, -1)[:, -2:][~batch.reshape(envs, -1)["next", "done"][:, -2:, 0]].tolist()
        rb.extend(batch.reshape(-1))
    collector.shutdown()
    assert rb.storage.frame_replay.num_envs == envs
    held = set(rb[:]["number"].tolist())
    assert set(range(count)) - held <= set(last)  # windows of an interrupted episode are never complete


def test_fewer_frames_than_environments():
    """A batch is one step of each environment, which ids show; without ids, `num_envs` is asked for."""
    env = SerialEnv(3, [lambda seed=seed: cartpole(seed) for seed in range(3)])
    collector = Collector(env, RandomPolicy(env.action_spec), frames_per_batch=3, total_frames=60)
    rb = ReplayBuffer(100)
    for number, batch in enumerate(collector):
        batch["number"] = torch.arange(3)[:, None] + 3 * number
        rb.extend(batch.reshape(-1))
        without_ids = batch.exclude("collector").reshape(-1)
        if not number:
            with pytest.raises(ValueError, match=ASKS):
                ReplayBuffer(100).extend(without_ids)
        ReplayBuffer(100, num_envs=3).extend(without_ids)
    collector.shutdown()
    assert rb.storage.frame_replay.num_envs == 3
    assert sorted(rb[:]["number"].tolist()) == list(range(60))


def test_a_wrong_guess_is_warned_of():
    """One row says nothing about the environments to come."""
    world, rb = World(3, 0, 0.0), ReplayBuffer(1000)
    flat = [world.batch(4, "blocks", False) for _ in range(5)]
    rb.add(flat[0][0])
    rb.extend(flat[0][1:])
    message = "num_envs: the buffer was made for 1 environments.*Make the buffer with num_envs"
    with pytest.warns(UserWarning, match=message):
        rb.extend(flat[1])
    for batch in flat[2:]:
        rb.extend(batch)
    assert sorted(rb[:]["number"].tolist()) == list(range(60))


def test_time_as_the_first_axis_is_refused():
    batch = stream(cartpole, 3)[0].transpose(0, 1)
    rb = ReplayBuffer(1000)
    with pytest.raises(ValueError, match=r"data: expected the shape \(environments, steps\), got \(21, 3\)"):
        rb.extend(batch)
    assert len(rb) == 0
    assert_same(rb[rb.extend(batch.transpose(0, -1).clone())], batch.transpose(0, 1))


def test_padding_is_refused():
    batch = split_trajectories(stream(cartpole, 3)[0])
    rb = ReplayBuffer(1000, num_envs=3)
    with pytest.raises(ValueError, match=r"\('collector', 'mask'\): expected steps of environments, got padding"):
        rb.extend(batch)
    rb.extend(batch[batch["collector", "mask"]])
    assert sorted(rb[:]["number"].tolist()) == list(range(63))

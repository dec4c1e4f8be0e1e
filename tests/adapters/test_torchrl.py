"""TorchRL with our buffer: the same transitions, entry by entry, n-step returns, priorities and learning."""

from __future__ import annotations

import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # its own, when it is imported
    pytest.importorskip("torchrl", reason="needs TorchRL: pip install 'pydqn[adapters]'")
    from tensordict import TensorDict
    from tensordict.nn import TensorDictSequential
    from torchrl.collectors import Collector
    from torchrl.data.replay_buffers.scheduler import LinearScheduler
    from torchrl.envs import GymWrapper, RewardSum, TransformedEnv
    from torchrl.modules import MLP, EGreedyModule, QValueActor
    from torchrl.objectives import DQNLoss, HardUpdate

    from pydqn.adapters.torchrl import ReplayBuffer
    from tests.helpers.torchrl_streams import assert_same, cartpole, own, stack_of_frames, stream

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Got conflicting batch_sizes:UserWarning"),
    pytest.mark.filterwarnings("ignore:The env passed to:FutureWarning"),
]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


STREAMS = {
    "cartpole": (cartpole, {}),
    "integer actions": (lambda seed: cartpole(seed, one_hot=False), {}),
    "frames": (stack_of_frames, {}),
    "frames, last axis": (lambda seed: stack_of_frames(seed, -1), {}),
    "frames of floats": (lambda seed: stack_of_frames(seed, dtype=np.float32), {"stack": 4}),
}


@pytest.mark.parametrize("layout", ["flat", "blocks", "without ids"])
@pytest.mark.parametrize("envs", [1, 3])
@pytest.mark.parametrize("name", STREAMS)
def test_transitions_equal_theirs(name, envs, layout):
    make, settings = STREAMS[name]
    batches = stream(make, envs)
    ours, theirs = ReplayBuffer(300, batch_size=32, num_envs=envs, **settings), own(300)
    for batch in batches:
        if layout == "without ids":
            del batch["collector"]
        given = batch.clone() if layout == "blocks" else batch.reshape(-1)
        index = ours.extend(given)
        assert index.shape == given.shape
        theirs.extend(batch.reshape(-1))
        assert_same(ours[index.reshape(-1)], batch.reshape(-1))
    every = torch.cat([batch.reshape(-1) for batch in batches])
    held = ours[:]
    assert len(held) == len(ours) == 300
    assert held["number"].unique().numel() == 300
    assert_same(held, every[held["number"]])
    kept = theirs[:]  # the newest of all; ours are the newest of each environment
    common = np.intersect1d(kept["number"], held["number"])
    assert len(common) > 250
    of_ours, of_theirs = (
        rows[torch.argsort(rows["number"])][np.isin(np.sort(rows["number"]), common)] for rows in (held, kept)
    )
    assert_same(of_ours, of_theirs)
    sample = ours.sample()
    assert_same(sample.exclude("index"), every[sample["number"]])
    assert set(sample.keys(True, True)) == set(theirs.sample().keys(True, True))
    ends, cut, done = (every["next", key] for key in ("terminated", "truncated", "done"))
    assert (ends & ~cut).any()
    assert (cut & ~ends).any()
    assert (done == (ends | cut)).all()
    replay = ours.storage.frame_replay
    assert replay.stack == (4 if "frames" in name else 1)
    episodes = int(done.sum()) + envs  # the last ones have not ended
    assert sum(replay.env_time_steps) <= every.numel() + episodes  # one per step, and one per episode


def windows(rows, n_step, gamma):
    """Return first row, last row, reward and length of every complete window in one environment's rows."""
    reward, done = rows["next", "reward"].flatten().double(), rows["next", "done"].flatten()
    found = []
    for first in range(len(rows)):
        for k in range(1, min(n_step, len(rows) - first) + 1):
            if k == n_step or done[first + k - 1]:
                total = sum(gamma**j * float(reward[first + j]) for j in range(k))
                found.append((first, first + k - 1, total, k))
                break
    return [torch.tensor(column) for column in zip(*found, strict=True)]


def expected(rows, n_step, gamma):
    """Return what should be sampled from one environment's rows."""
    first, last, reward, steps = windows(rows, n_step, gamma)
    whole = rows[first].clone()
    whole["next"] = rows[last]["next"].clone()
    whole["next", "reward"] = reward.float()[:, None]
    whole["steps_to_next_obs"] = steps
    return whole


@pytest.mark.parametrize("layout", ["flat", "blocks", "without ids"])
@pytest.mark.parametrize("make", [cartpole, stack_of_frames])
def test_n_step_returns(make, layout):
    batches = stream(make, 3)
    envs = {} if layout == "blocks" else {"num_envs": 3}
    rb = ReplayBuffer(2000, batch_size=32, n_step=3, gamma=0.9, **envs)
    for batch in batches:
        if layout == "without ids":
            del batch["collector"]
        rb.extend(batch.clone() if layout == "blocks" else batch.reshape(-1))
    assert rb.storage.frame_replay.num_envs == 3
    wanted = torch.cat([expected(rows, 3, 0.9) for rows in torch.cat(batches, -1).unbind(0)])
    wanted = wanted[wanted["number"].argsort()]
    held = rb[:]
    assert_same(held[held["number"].argsort()], wanted)
    assert (wanted["next", "terminated"].flatten() & (wanted["steps_to_next_obs"] > 1)).any()
    sample = rb.sample()
    position = torch.searchsorted(wanted["number"], sample["number"])
    assert_same(sample.exclude("index"), wanted[position])


def value_parts(env, gamma):
    net = MLP(in_features=4, out_features=2, num_cells=[64, 64])
    actor = QValueActor(net, spec=env.full_action_spec, in_keys=["observation"])
    loss = DQNLoss(actor, delay_value=True, action_space=env.action_spec)
    loss.make_value_estimator(gamma=gamma)
    return actor, loss, HardUpdate(loss, value_network_update_interval=100)


def test_losses_bootstrap_with_the_right_power():
    rb = ReplayBuffer(2000, batch_size=256, n_step=4, gamma=0.9)
    for batch in stream(cartpole):
        rb.extend(batch)
    actor, loss, _ = value_parts(cartpole(0), 0.9)
    sample = rb.sample()
    loss(sample)
    with torch.no_grad():
        best = actor.module[0](sample["next", "observation"]).max(-1).values
        chosen = (actor.module[0](sample["observation"]) * sample["action"]).sum(-1)
        going_on = ~sample["next", "terminated"].squeeze(-1)
        target = sample["next", "reward"].squeeze(-1) + going_on * 0.9 ** sample["steps_to_next_obs"] * best
    torch.testing.assert_close(sample["td_error"].squeeze(-1), (chosen - target).pow(2), rtol=1e-4, atol=1e-5)
    assert len(set(sample["steps_to_next_obs"].tolist())) == 4


def test_a_missing_entry_is_refused():
    rb = ReplayBuffer(100)
    first, second = stream(cartpole, batches=2)
    rb.extend(first)
    with pytest.raises(ValueError, match="'step_count'.*: expected a tensor in every batch, got None"):
        rb.extend(second.exclude("step_count"))


def test_priorities():
    (batch,) = stream(cartpole, batches=1)
    rb = ReplayBuffer(100, batch_size=21, prioritized=True, alpha=1.0, beta=0.5, seed=3)
    index = rb.extend(batch.clone())
    assert rb.sample()["priority_weight"].eq(1).all()
    priority = torch.arange(1.0, 22.0)
    rb.update_tensordict_priority(TensorDict({"index": index, "td_error": priority[:, None]}, [21]))
    drawn = torch.cat([rb.sample()["number"] for _ in range(500)])
    torch.testing.assert_close(
        torch.bincount(drawn, minlength=21) / len(drawn), priority / priority.sum(), rtol=0.25, atol=2e-3
    )
    sample = rb.sample()
    wanted = (sample["number"] + 1) ** -0.5
    torch.testing.assert_close(sample["priority_weight"], wanted / wanted.max())
    assert rb.sampler.default_priority == pytest.approx(21)
    scheduler = LinearScheduler(rb, "beta", final_value=1.0, num_steps=10)
    for _ in range(10):
        scheduler.step()
    assert rb.sampler.beta == rb.storage.frame_replay.beta == 1.0
    rb.add(batch[0].clone())  # gets the largest so far
    assert rb.storage.frame_replay.largest_priority == pytest.approx(21)
    weight = [float(sample["priority_weight"].min() / sample["priority_weight"].max()) for sample in [rb.sample(2000)]]
    assert weight[0] == pytest.approx(1 / 21)


def test_priorities_that_come_with_the_data():
    (batch,) = stream(cartpole, batches=1)
    batch["td_error"] = torch.zeros(21, 1)
    batch["td_error"][5] = 1.0
    rb = ReplayBuffer(100, batch_size=50, prioritized=True, alpha=1.0)
    rb.extend(batch)
    assert (rb.sample()["number"] == 5).all()


def test_late_priorities_reach_no_other_transition():
    rb = ReplayBuffer(21, batch_size=21, prioritized=True, alpha=1.0, beta=0.5)
    index, _ = (rb.extend(batch) for batch in stream(cartpole, batches=2))  # the second overwrites all of the first
    late = {"index": index[:5], "td_error": torch.full((5, 1), 100.0)}
    rb.update_tensordict_priority(TensorDict(late, [5]))
    assert rb.sample(500)["priority_weight"].eq(1).all()


def test_one_small_priority_does_not_lower_all_weights():
    (batch,) = stream(cartpole, batches=1)
    batch["td_error"] = torch.ones(21, 1)
    batch["td_error"][5] = 0.0
    rb = ReplayBuffer(21, batch_size=21, prioritized=True, alpha=1.0, beta=0.5)
    rb.extend(batch)
    sample = rb.sample()
    assert sample["priority_weight"][sample["number"] != 5].eq(1).all()


def learn(rb, frames=4_000, seed=1):
    """Train TorchRL's DQN as in its sota-implementations; return the mean return of the last episodes."""
    env = TransformedEnv(GymWrapper(gym.make("CartPole-v1")), RewardSum())
    env.set_seed(seed)
    torch.manual_seed(seed)
    actor, loss, updater = value_parts(env, 0.99)
    optimizer = torch.optim.Adam(loss.parameters(), lr=2e-3)
    explore = EGreedyModule(env.action_spec, annealing_num_steps=1_500, eps_init=1.0, eps_end=0.02)
    collector = Collector(env, TensorDictSequential(actor, explore), frames_per_batch=20, total_frames=frames)
    returns = []
    for number, batch in enumerate(collector):
        rb.extend(batch.reshape(-1))
        explore.step(batch.numel())
        returns += batch["next", "episode_reward"][batch["next", "done"]].tolist()
        for _ in range(6 if number >= 20 else 0):
            sample = rb.sample()
            optimizer.zero_grad()
            loss(sample)["loss"].backward()
            optimizer.step()
            updater.step()
            rb.update_tensordict_priority(sample)
    collector.shutdown()
    return float(np.mean(returns[-10:]))


@pytest.mark.parametrize(
    "make",
    [lambda: own(10_000), lambda: ReplayBuffer(10_000, batch_size=32)],
    ids=["own", "ours"],
)
def test_it_learns_as_with_their_buffer(make):
    assert learn(make()) > 80


def test_the_same_draws_teach_the_same(monkeypatch):
    """If both draw the same transitions, a loss sees the same, bit for bit."""

    def draw(storage, batch_size):
        held = storage.frame_replay.valid_indices()
        return torch.from_numpy(held)[torch.randint(0, len(held), (batch_size,))], None

    monkeypatch.setattr("pydqn.adapters.torchrl.FrameStorage.draw", draw)
    ours = learn(ReplayBuffer(10_000, batch_size=32), frames=1_000)
    assert ours == learn(own(10_000), frames=1_000)
    assert ours != learn(own(10_000), frames=1_000, seed=2)

"""Stable-Baselines3 with our buffer: the same transitions, the properties SB3 tests of its own, and learning."""

from __future__ import annotations

import ale_py
import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

pytest.importorskip("stable_baselines3", reason="needs Stable-Baselines3: pip install 'pydqn[adapters]'")

import torch
from stable_baselines3 import DQN
from stable_baselines3.common.buffers import NStepReplayBuffer
from stable_baselines3.common.buffers import ReplayBuffer as TheirBuffer
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize, VecTransposeImage

from pydqn.adapters.sb3 import PrioritizedDQN, ReplayBuffer
from tests.helpers.sb3_models import learner_of, numbered

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The last trajectory in the replay buffer:UserWarning"),
]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def collect(env, buffers, steps, seed=0):
    """Add the same stream to all buffers, as SB3's off-policy algorithms do."""
    random = np.random.default_rng(seed)
    env.seed(seed)
    obs = env.reset()
    for _ in range(steps):
        action = random.integers(env.action_space.n, size=env.num_envs)
        after, reward, done, infos = env.step(action)
        next_obs = after.copy()
        for env_index in np.flatnonzero(done):
            next_obs[env_index] = infos[env_index]["terminal_observation"]
        for buffer in buffers:
            buffer.add(obs, next_obs, action, reward, done, infos)
        obs = after


def assert_same_transitions(ours, theirs):
    """All that their (full) buffer holds, ours holds, and nothing else."""
    indices = ours.transitions.frame_replay.valid_indices()
    assert len(ours) == theirs.size() * theirs.n_envs == len(indices)
    for env_index in range(ours.n_envs):
        held = indices[indices % ours.n_envs == env_index]
        positions = (theirs.pos + np.arange(theirs.size())) % theirs.size() if theirs.full else np.arange(theirs.size())
        samples = ours._get_samples(held)
        np.testing.assert_array_equal(samples.observations.numpy(), theirs.observations[positions, env_index])
        np.testing.assert_array_equal(samples.next_observations.numpy(), theirs.next_observations[positions, env_index])
        np.testing.assert_array_equal(samples.actions.numpy(), theirs.actions[positions, env_index])
        np.testing.assert_array_equal(samples.rewards.numpy()[:, 0], theirs.rewards[positions, env_index])
        dones = theirs.dones[positions, env_index] * (1 - theirs.timeouts[positions, env_index])
        np.testing.assert_array_equal(samples.dones.numpy()[:, 0], dones)
    assert theirs.timeouts.any(), "a stream without truncations proves little"
    assert (theirs.dones > theirs.timeouts).any()


def short_cartpole():
    return gym.make("CartPole-v1", max_episode_steps=25)


@pytest.mark.parametrize("steps", [150, 700])
def test_vectors_equal_their_buffer(steps):
    env = make_vec_env(short_cartpole, n_envs=3)
    arguments = (900, env.observation_space, env.action_space, "cpu", 3)
    ours, theirs = ReplayBuffer(*arguments), TheirBuffer(*arguments)
    collect(env, [ours, theirs], steps)
    assert_same_transitions(ours, theirs)
    assert (ours.pos, ours.full, ours.size(), ours.buffer_size) == (theirs.pos, theirs.full, theirs.size(), 300)


@pytest.mark.parametrize("channels_first", [True, False])
def test_atari_equals_their_buffer(channels_first):
    gym.register_envs(ale_py)
    env = make_atari_env("BreakoutNoFrameskip-v4", 2, seed=1, env_kwargs={"max_num_frames_per_episode": 300})
    env = VecFrameStack(env, 4)
    if channels_first:
        env = VecTransposeImage(env)
    arguments = (300, env.observation_space, env.action_space, "cpu", 2)
    ours, theirs = ReplayBuffer(*arguments), TheirBuffer(*arguments)
    collect(env, [ours, theirs], 400)
    assert_same_transitions(ours, theirs)  # lives lost are terminations
    assert ours.transitions.frame_replay.stack == 4
    assert ours.transitions.nbytes < 0.2 * (theirs.observations.nbytes + theirs.next_observations.nbytes)


@pytest.mark.parametrize("n_steps", [2, 3, 5])
def test_n_step_returns_equal_theirs(n_steps):
    env = make_vec_env(short_cartpole)
    arguments = (400, env.observation_space, env.action_space, "cpu")
    ours = ReplayBuffer(*arguments, n_steps=n_steps, gamma=0.9)
    theirs = NStepReplayBuffer(*arguments, n_steps=n_steps, gamma=0.9)
    collect(env, [ours, theirs], 700)
    positions = (theirs.pos + np.arange(400)) % 400
    expected = theirs._get_samples(positions)
    samples = ours._get_samples(ours.transitions.frame_replay.valid_indices())
    open_windows = 400 - (len(samples.rewards) - (n_steps - 1))  # ours holds some older ones instead
    assert 0 <= open_windows - 1 < 2 * n_steps
    count = min(len(samples.rewards), 400) - n_steps
    newest = slice(len(samples.rewards) - count, None)
    dones_at = expected.rewards.shape[0] - (n_steps - 1)
    for name in ("observations", "actions", "next_observations", "dones", "rewards", "discounts"):
        mine = getattr(samples, name).numpy()[newest]
        their = getattr(expected, name).numpy()[dones_at - count : dones_at]
        np.testing.assert_allclose(mine, their, rtol=1e-6, err_msg=name)
    assert expected.dones.any()


# --- properties that SB3 tests of its own buffers ---


class Counter(gym.Env):
    """Observations and rewards that count from 1 to 5 repeatedly; truncated after 100 steps."""

    observation_space = spaces.Box(1, 5, (1,))
    action_space = spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        self.count = 0
        return np.ones(1, np.float32), {}

    def step(self, action):
        self.count += 1
        value = self.count % 5 + 1
        return np.full(1, value, np.float32), float(value), False, self.count >= 100, {}


def test_samples_are_normalized():
    env = VecNormalize(make_vec_env(Counter))
    buffer = ReplayBuffer(100, env.observation_space, env.action_space, device="cpu")
    env.reset()
    obs = env.get_original_obs()
    for _ in range(100):
        action = np.array([env.action_space.sample()])
        _, _, done, infos = env.step(action)
        next_obs = env.get_original_obs()
        buffer.add(
            obs,
            infos[0]["terminal_observation"] if done[0] else next_obs,
            action,
            env.get_original_reward(),
            done,
            infos,
        )
        obs = next_obs
    raw, normal = buffer._get_samples(np.arange(100)), buffer._get_samples(np.arange(100), env)
    np.testing.assert_array_equal(normal.observations.numpy(), env.normalize_obs(raw.observations.numpy()))
    np.testing.assert_allclose(normal.rewards.numpy(), env.normalize_reward(raw.rewards.numpy()), rtol=1e-6)
    samples = buffer.sample(50, env)
    assert abs(samples.observations.mean()) < 1
    assert abs(samples.next_observations.mean()) < 1
    assert samples.rewards.dtype == torch.float32


@pytest.mark.parametrize("device", ["cpu", "auto", "cuda"])
def test_samples_are_on_the_device(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    env = make_vec_env(Counter)
    buffer = ReplayBuffer(100, env.observation_space, env.action_space, device=device)
    collect(env, [buffer], 100)
    expected = "cuda" if torch.cuda.is_available() and device != "cpu" else "cpu"
    for tensor in buffer.sample(50):
        assert tensor is None or tensor.device.type == expected


@pytest.mark.parametrize(
    "dtype",
    ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16", "float32", "float64"],
)
def test_dtypes_are_those_of_the_spaces(dtype):
    space = spaces.Box(0, 100, dtype=np.dtype(dtype))
    buffer = ReplayBuffer(2, space, spaces.Discrete(10), device="cpu")
    obs = np.full((1, 1), 7, dtype)
    buffer.add(obs, obs + obs, np.array([3]), np.array([1.0]), np.array([False]), [{}])
    samples = buffer.sample(4)
    assert samples.observations.numpy().dtype == dtype
    assert samples.next_observations.numpy().tolist() == [[14]] * 4
    assert samples.actions.dtype == torch.int64
    assert samples.actions.shape == samples.rewards.shape == samples.dones.shape == (4, 1)
    assert samples.discounts is None


@pytest.mark.parametrize("end", [1, 2])
@pytest.mark.parametrize("n_steps", [3, 5])
@pytest.mark.parametrize("how", ["done_at", "truncated_at"])
def test_windows_end_with_the_episode(end, n_steps, how):
    samples = numbered(n_steps, 10, **{how: end})._get_samples(np.array([0]))
    steps = min(end + 1, n_steps)
    np.testing.assert_allclose(samples.rewards.item(), sum(0.98**k for k in range(steps)), rtol=1e-6)
    np.testing.assert_allclose(samples.discounts.item(), 0.98**steps, rtol=1e-6)
    assert samples.dones.item() == float(how == "done_at")
    assert samples.next_observations[0, 0] == steps


@pytest.mark.parametrize("n_steps", [3, 5])
def test_windows_stop_at_the_newest(n_steps):
    buffer = numbered(n_steps, 13)  # positions are used again
    held = buffer.transitions.frame_replay.valid_indices()
    samples = buffer._get_samples(held)
    assert held.max() == 13 - n_steps
    assert (samples.discounts == np.float32(0.98**n_steps)).all()
    assert (samples.next_observations - samples.observations == n_steps).all()


@pytest.mark.parametrize("n_steps", [1, 2])
def test_no_discount_is_no_termination(n_steps):
    samples = numbered(n_steps, 10, done_at=5, gamma=0.0)._get_samples(np.array([0, 5]))
    assert samples.dones.ravel().tolist() == [0.0, 1.0]


def test_extended_and_reset():
    env = make_vec_env(Counter)
    buffer = ReplayBuffer(50, env.observation_space, env.action_space, device="cpu")
    rows = [
        (np.full((1, 1), i), np.full((1, 1), i + 1), np.array([0]), np.array([1.0]), np.array([False]), [{}])
        for i in range(7)
    ]
    buffer.extend(*zip(*rows, strict=True))
    assert (buffer.pos, buffer.size(), len(buffer), buffer.full) == (7, 7, 7, False)
    buffer.reset()
    assert (buffer.pos, buffer.size(), len(buffer), buffer.full) == (0, 0, 0, False)
    with pytest.raises(RuntimeError, match="no transition"):
        buffer.sample(1)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Discrete(5),
        spaces.MultiDiscrete([3, 4]),
        spaces.MultiBinary(3),
        spaces.Box(0, 255, (64, 48, 3), np.uint8),
    ],
)
def test_observation_spaces(space):
    ours, theirs = (kind(60, space, spaces.Discrete(2), "cpu", 2) for kind in (ReplayBuffer, TheirBuffer))
    space.seed(0)
    next_obs = np.stack([space.sample(), space.sample()])
    for _ in range(30):
        obs, next_obs = next_obs, np.stack([space.sample(), space.sample()])
        for buffer in (ours, theirs):
            buffer.add(obs, next_obs, np.array([0, 1]), np.ones(2), np.array([False, True]), [{}, {}])
    indices = ours.transitions.frame_replay.valid_indices()
    samples = ours._get_samples(indices[indices % 2 == 1])
    np.testing.assert_array_equal(samples.observations.numpy(), theirs.observations[:, 1])
    np.testing.assert_array_equal(samples.next_observations.numpy(), theirs.next_observations[:, 1])
    assert samples.observations.dtype == theirs.sample(2).observations.dtype


def test_what_does_not_fit_is_refused():
    box = spaces.Box(0, 1, (2,))
    with pytest.raises(ValueError, match="action_space: expected Discrete"):
        ReplayBuffer(10, box, box)
    with pytest.raises(ValueError, match="observation_space: expected one array, got Dict"):
        ReplayBuffer(10, spaces.Dict({"a": box}), spaces.Discrete(2))
    with pytest.raises(TypeError, match="wrong_keyword"):
        ReplayBuffer(10, box, spaces.Discrete(2), wrong_keyword=1)


# --- whole algorithms ---


@pytest.mark.parametrize("optimize_memory_usage", [True, False])
def test_learning_continues_after_learning(optimize_memory_usage):
    kwargs = {"handle_timeout_termination": True}
    model = learner_of(optimize_memory_usage=optimize_memory_usage, replay_buffer_kwargs=kwargs)
    for reset in (True, True, False):
        model.learn(200, reset_num_timesteps=reset)
    assert model.replay_buffer.full
    assert len(model.replay_buffer) == 500


def test_the_same_seed_is_the_same_run():
    def weights():
        model = learner_of(env=make_vec_env("CartPole-v1", n_envs=2, seed=0)).learn(400)
        return torch.cat([value.ravel() for value in model.q_net.parameters()])

    assert torch.equal(weights(), weights())


def test_saved_and_loaded(tmp_path):
    model = learner_of(PrioritizedDQN, n_steps=3, gamma=0.9).learn(300)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    other = PrioritizedDQN.load(tmp_path / "model", env=make_vec_env("CartPole-v1"))
    other.load_replay_buffer(tmp_path / "buffer")
    assert other.replay_buffer.size() == 300
    for ours, theirs in zip(model.replay_buffer.sample(20), other.replay_buffer.sample(20), strict=True):
        assert torch.equal(ours, theirs)
    other.learn(100, reset_num_timesteps=False)
    assert other.replay_buffer.size() == 400


def test_n_steps_and_many_environments_and_normalization():
    env = VecNormalize(make_vec_env("CartPole-v1", n_envs=4))
    model = learner_of(env=env, train_freq=2, replay_buffer_kwargs={"n_steps": 3, "gamma": 0.99}).learn(600)
    assert model._n_updates > 50


def test_quantile_regression():
    contrib = pytest.importorskip("sb3_contrib", reason="needs sb3-contrib: pip install 'pydqn[adapters]'")
    model = learner_of(contrib.QRDQN).learn(300)
    assert model._n_updates > 20


def test_priorities_follow_errors():
    """Errors become priorities, weights compensate, and beta rises."""
    model = learner_of(PrioritizedDQN, replay_buffer_kwargs={"beta": 0.5}).learn(400)
    replay = model.replay_buffer.transitions.frame_replay
    assert replay.beta > 0.9
    priorities = replay._core.export_priorities(0, replay.env_time_steps[0])
    assert len(np.unique(priorities[priorities > 0])) > 100
    _, weight, index = model.replay_buffer.sample_weighted(64)
    assert weight.shape == (64, 1)
    assert weight.min() < weight.max() == 1
    assert index.shape == (64,)


def test_without_priorities_the_prioritized_algorithm_is_the_plain_one():
    plain = learner_of().learn(400)
    uniform = learner_of(PrioritizedDQN, replay_buffer_kwargs={"prioritized": True, "alpha": 0.0}).learn(400)
    # The same algorithm with other draws: equal if both draw the same batch.
    index = plain.replay_buffer.transitions.frame_replay.valid_indices()[-32:]
    batch = plain.replay_buffer._get_samples(index)
    for model in (plain, uniform):
        model.q_net.load_state_dict(plain.q_net.state_dict())
        model.q_net_target.load_state_dict(plain.q_net_target.state_dict())
        model.policy.optimizer = torch.optim.SGD(model.policy.parameters(), 0.1)
        model._update_learning_rate = lambda optimizer: None
    ones = torch.ones(32, 1)
    plain.replay_buffer.sample = lambda *_, **__: batch
    uniform.replay_buffer.sample_weighted = lambda *_, **__: (
        batch,
        ones,
        uniform.replay_buffer.transitions.sample(32).index,
    )
    uniform.replay_buffer.update_priorities = lambda *_: None  # the batch is from the other buffer
    for model in (plain, uniform):
        model.train(3, 32)
    for one, other in zip(plain.q_net.parameters(), uniform.q_net.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    before = [value.clone() for value in uniform.q_net.parameters()]
    uniform.replay_buffer.sample_weighted = lambda *_, **__: (batch, 0 * ones, index)
    uniform.train(3, 32)
    assert all(map(torch.equal, before, uniform.q_net.parameters()))


CARTPOLE = {"learning_rate": 2.3e-3, "batch_size": 64, "buffer_size": 100_000, "learning_starts": 1000}
CARTPOLE |= {"target_update_interval": 10, "train_freq": 256, "gradient_steps": 128, "exploration_fraction": 0.3}
CARTPOLE |= {"exploration_final_eps": 0.04, "policy_kwargs": {"net_arch": [256, 256]}}


@pytest.mark.parametrize("kind", [DQN, PrioritizedDQN])
def test_cartpole_is_learned(kind):
    """With RL Baselines3 Zoo's settings, but for half as many steps and longer exploration.

    Seeds 1 to 3 of both kinds had 122 to 500 (AVX-512; the digits differ between processors). Random play has 22.
    """
    model = learner_of(kind, seed=1, **CARTPOLE).learn(25_000)
    mean, _ = evaluate_policy(model, model.get_env(), 10, warn=False)
    assert mean > 100

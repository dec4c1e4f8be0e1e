"""With CleanRL's calls, the buffer returns what the environments did, truncations included."""

from __future__ import annotations

import ale_py
import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import nn

from pydqn.adapters.cleanrl import PrioritizedReplayBuffer, ReplayBuffer


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Recorder(gym.Wrapper):
    """Records what an environment did: (obs, action, reward, next_obs, terminated, truncated)."""

    def __init__(self, env):
        super().__init__(env)
        self.steps, self.obs = [], None

    def reset(self, **settings):
        self.obs, info = self.env.reset(**settings)
        return self.obs, info

    def step(self, action):
        after, reward, terminated, truncated, info = self.env.step(action)
        self.steps.append((self.obs, int(action), float(reward), after, terminated, truncated))
        self.obs = after
        return after, reward, terminated, truncated, info


def cartpole():
    return Recorder(gym.make("CartPole-v1", max_episode_steps=25))


def breakout():
    gym.register_envs(ale_py)
    env = gym.make("ALE/Breakout-v5", frameskip=1, max_num_frames_per_episode=120)
    env = gym.wrappers.AtariPreprocessing(env, noop_max=3, terminal_on_life_loss=True)
    return Recorder(gym.wrappers.FrameStackObservation(env, 4))


def play(make, mode, add, steps, num_envs, seed=0):
    """Run the scripts' loop; return the environments."""
    envs = SyncVectorEnv([make for _ in range(num_envs)], autoreset_mode=mode)
    envs.action_space.seed(seed)
    obs, _ = envs.reset(seed=seed)
    for _ in range(steps):
        actions = envs.action_space.sample()
        next_obs, rewards, terminations, truncations, infos = envs.step(actions)
        real_next_obs = next_obs.copy()
        for env_index in np.flatnonzero(truncations):
            if mode == AutoresetMode.SAME_STEP:
                real_next_obs[env_index] = infos["final_obs"][env_index]
        add(obs, real_next_obs, actions, rewards, terminations, truncations, infos)
        obs = next_obs
    return envs


def assert_really_happened(transitions, envs):
    """Assert that the buffer holds the newest steps of each environment, in order, with none missing."""
    indices = transitions.frame_replay.valid_indices()
    for env_index, env in enumerate(envs.envs):
        batch = transitions.gather(indices[indices % len(envs.envs) == env_index])
        real = env.steps[-len(batch.action) :]
        assert len(real) == len(batch.action) > 50
        for row, (obs, action, reward, next_obs, terminated, _) in enumerate(real):
            np.testing.assert_array_equal(batch.obs[row], obs)
            assert batch.action[row] == action
            assert batch.reward[row] == reward
            assert (batch.discount[row] == 0) == terminated
            if not terminated:
                np.testing.assert_array_equal(batch.next_obs[row], next_obs)
        assert any(truncated for *_, truncated in real)
        assert any(terminated for *_, terminated, _ in real)


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP])
@pytest.mark.parametrize(("make", "steps"), [(cartpole, 400), (breakout, 300)])
def test_what_is_held_really_happened(make, steps, mode):
    """Truncations are not passed, except for vectors with next-step autoreset, where nothing else shows a reset."""
    passed = make is cartpole and mode == AutoresetMode.NEXT_STEP
    env = make()
    arguments = {"optimize_memory_usage": True, "handle_timeout_termination": False, "next_step_autoreset": passed}
    buffer = ReplayBuffer(400, env.observation_space, env.action_space, "cpu", 2, **arguments)

    def add(obs, next_obs, actions, rewards, terminations, truncations, infos):
        buffer.add(obs, next_obs, actions, rewards, terminations, infos, *([truncations] if passed else []))

    envs = play(make, mode, add, steps, 2)
    assert_really_happened(buffer.transitions, envs)
    assert buffer.size() == len(buffer) // 2 == 200
    data = buffer.sample(64)
    assert data.observations.shape == data.next_observations.shape == (64, *env.observation_space.shape)
    assert data.observations.numpy().dtype == env.observation_space.dtype
    assert data.actions.shape == data.rewards.shape == data.dones.shape == (64, 1)
    assert (data.actions.dtype, data.rewards.dtype, data.dones.dtype) == (torch.int64, torch.float32, torch.float32)


def test_time_limits_in_a_list_of_infos():
    """As in older scripts: `dones`, and SB3's infos."""
    space = spaces.Box(-1, 1, (1,))
    buffer = ReplayBuffer(10, space, spaces.Discrete(2), "cpu", 2)
    obs = np.zeros((2, 1), np.float32)
    buffer.add(obs, obs + 1, np.zeros(2, int), np.ones(2), np.ones(2, bool), [{"TimeLimit.truncated": True}, {}])
    batch = buffer.transitions.gather([0, 1])
    assert batch.discount.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("shape", [(2,), (2, 1), (1, 2)])
@pytest.mark.parametrize("passed", [False, True])
def test_flags_come_in_any_shape(shape, passed):
    space = spaces.Box(-1, 1, (1,))
    obs, ends = np.zeros((2, 1), np.float32), np.ones(shape, bool)
    infos, cut = [{"TimeLimit.truncated": not passed}, {}], np.array([passed, False]).reshape(shape)
    buffer = ReplayBuffer(10, space, spaces.Discrete(2), "cpu", 2)
    done = ends & ~cut
    buffer.add(obs, obs + 1, np.zeros(shape, int), np.ones(shape), done, infos, cut if passed else None)
    assert buffer.transitions.gather([0, 1]).discount.tolist() == [1.0, 0.0]
    rainbow = PrioritizedReplayBuffer(10, (1,), "cpu", 1, 0.5, num_envs=2, dtype="float32")
    rainbow.add(obs, np.zeros(shape, int), np.ones(shape), obs + 1, done, cut if passed else None)
    assert rainbow.transitions.gather([0, 1]).discount.tolist() == ([0.5, 0.0] if passed else [0.0, 0.0])


def test_each_frame_is_stored_once():
    env = breakout()
    buffer = ReplayBuffer(10_000, env.observation_space, env.action_space)
    assert buffer.transitions.nbytes < 0.14 * 10_000 * 2 * 4 * 84 * 84


@pytest.mark.parametrize("n_step", [1, 3])
def test_rainbow_windows(n_step):
    """Every step starts a window; those at the end of an episode are shorter, and none crosses the end."""
    env = breakout()
    buffer = PrioritizedReplayBuffer(300, env.observation_space.shape, "cpu", n_step, 0.9, 0.5, 0.4, 1e-6)

    def add(obs, next_obs, actions, rewards, terminations, truncations, infos):
        buffer.add(obs, actions, rewards, next_obs, terminations)

    (env,) = play(breakout, AutoresetMode.SAME_STEP, add, 250, 1).envs
    indices = buffer.transitions.frame_replay.valid_indices()
    batch, windows = buffer.transitions.gather(indices), buffer.transitions.windows(indices)
    assert len(indices) > 200
    assert len(set(windows.steps.tolist())) == n_step
    for row in range(len(indices)):
        part = env.steps[row : row + n_step]
        last = next((k for k, step in enumerate(part) if step[4] or step[5]), n_step - 1)
        assert windows.steps[row] == last + 1
        np.testing.assert_array_equal(batch.obs[row], part[0][0])
        assert batch.reward[row] == np.float32(sum(0.9**k * step[2] for k, step in enumerate(part[: last + 1])))
        np.testing.assert_allclose(batch.discount[row], 0 if part[last][4] else 0.9 ** (last + 1), rtol=1e-6)
        if not part[last][4]:
            np.testing.assert_array_equal(batch.next_obs[row], part[last][3])


def test_rainbow_priorities():
    space = spaces.Box(0, 255, (4, 84, 84), np.uint8)
    buffer = PrioritizedReplayBuffer(1000, space.shape, torch.device("cpu"), 3, 0.99, 0.5, 0.4, 1e-6)
    frames = np.random.default_rng(0).integers(0, 255, (104, 84, 84), np.uint8)
    for step in range(100):
        obs, next_obs = frames[None, step : step + 4], frames[None, step + 1 : step + 5]
        buffer.add(obs, np.array([step % 3]), np.array([1.0]), next_obs, np.array([False]))
    buffer.beta = 1.0
    data = buffer.sample(32)
    assert (data.weights == 1).all()
    losses = np.where(data.indices == data.indices[0], 0.0, 100.0).astype(np.float32)
    buffer.update_priorities(buffer.transitions.frame_replay.valid_indices(), np.zeros(98, np.float32))
    buffer.update_priorities(data.indices, losses)
    drawn = buffer.sample(32)
    assert set(drawn.indices.tolist()) <= set(data.indices[losses > 0].tolist())
    assert drawn.weights.shape == drawn.dones.shape == drawn.actions.shape == drawn.discounts.shape == (32, 1)
    assert drawn.dones.dtype == torch.bool
    np.testing.assert_allclose(drawn.discounts, 0.99**3, rtol=1e-6)


def test_what_does_not_fit_is_refused():
    box, two = spaces.Box(0, 1, (2,)), spaces.Discrete(2)
    with pytest.raises(ValueError, match="action_space: expected Discrete"):
        ReplayBuffer(10, box, box)
    with pytest.raises(ValueError, match="observation_space: expected one array"):
        ReplayBuffer(10, spaces.Dict({"a": box}), two)
    images = np.random.default_rng(0).integers(0, 255, (9, 1, 4, 8, 8), np.uint8)
    buffer = ReplayBuffer(10, spaces.Box(0, 255, (4, 8, 8), np.uint8), two, stack=4)
    row = (np.array([0]), np.array([0.0]), np.array([False]))
    buffer.add(images[0], images[1], *row)  # a reset that was taken for a step, so far
    assert len(buffer) == 0
    with pytest.raises(ValueError, match="next_obs: expected obs moved on by one frame"):
        buffer.add(images[1], images[2], *row)


def test_a_script_learns_cartpole():
    """Like CleanRL's dqn.py, with its settings but a shorter run."""
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    random = np.random.default_rng(1)
    envs = SyncVectorEnv([lambda: gym.make("CartPole-v1")], autoreset_mode=AutoresetMode.SAME_STEP)
    buffer = ReplayBuffer(
        10_000, envs.single_observation_space, envs.single_action_space, "cpu", handle_timeout_termination=False
    )
    online, target = (
        nn.Sequential(nn.Linear(4, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 2)) for _ in range(2)
    )
    target.load_state_dict(online.state_dict())
    optimizer = torch.optim.Adam(online.parameters(), 1e-3)
    obs, _ = envs.reset(seed=1)
    total, returns = 0.0, []
    for step in range(22_000):
        epsilon = max(1 - step / 6_000, 0.05)
        actions = random.integers(2, size=1)
        if random.random() > epsilon:
            with torch.no_grad():
                actions = online(torch.as_tensor(obs)).argmax(1).numpy()
        next_obs, rewards, terminations, truncations, infos = envs.step(actions)
        total += rewards[0]
        if terminations[0] or truncations[0]:
            returns, total = [*returns, total], 0.0
        real_next_obs = next_obs.copy()
        for env_index in np.flatnonzero(truncations):
            real_next_obs[env_index] = infos["final_obs"][env_index]
        buffer.add(obs, real_next_obs, actions, rewards, terminations, infos)
        obs = next_obs
        if step > 1_000 and step % 4 == 0:
            data = buffer.sample(128)
            with torch.no_grad():
                best = target(data.next_observations).max(1).values
                expected = data.rewards.flatten() + 0.99 * best * (1 - data.dones.flatten())
            values = online(data.observations).gather(1, data.actions).squeeze()
            optimizer.zero_grad()
            nn.functional.mse_loss(expected, values).backward()
            optimizer.step()
            if step % 500 == 0:
                target.load_state_dict(online.state_dict())
    assert np.mean(returns[-10:]) > 150

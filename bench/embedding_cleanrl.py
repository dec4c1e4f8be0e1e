"""A DQN in one file like CleanRL's, with Stable-Baselines3's buffer (of which CleanRL has a copy) and with ours.

Nothing but the buffer's class differs. Prints one line of JSON.

    python bench/embedding_cleanrl.py --buffer own        # two stacks per transition
    python bench/embedding_cleanrl.py --buffer optimized  # one stack per transition: as dqn_atari.py has it
    python bench/embedding_cleanrl.py --buffer pydqn
"""

from __future__ import annotations

import ale_py
import embedding_common
import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from stable_baselines3.common.atari_wrappers import EpisodicLifeEnv, FireResetEnv, MaxAndSkipEnv, NoopResetEnv
from stable_baselines3.common.buffers import ReplayBuffer as TheirBuffer
from torch import nn
from torch.nn import functional as F

from pydqn.adapters.cleanrl import ReplayBuffer

BUFFERS = {"own": (TheirBuffer, False), "optimized": (TheirBuffer, True), "pydqn": (ReplayBuffer, True)}


def make_cartpole():
    return gym.wrappers.RecordEpisodeStatistics(gym.make("CartPole-v1"))


def make_atari():
    env = gym.wrappers.RecordEpisodeStatistics(gym.make("PongNoFrameskip-v4"))
    env = FireResetEnv(EpisodicLifeEnv(MaxAndSkipEnv(NoopResetEnv(env, noop_max=30), skip=4)))
    env = gym.wrappers.GrayscaleObservation(gym.wrappers.ResizeObservation(env, (84, 84)))
    return gym.wrappers.FrameStackObservation(env, 4)


class Scaled(nn.Module):
    def forward(self, obs):
        return obs / 255.0


def network(task, actions):
    if task == "cartpole":
        return nn.Sequential(nn.Linear(4, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, actions))
    convolutions = (
        nn.Conv2d(4, 32, 8, 4),
        nn.ReLU(),
        nn.Conv2d(32, 64, 4, 2),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3),
        nn.ReLU(),
    )
    return nn.Sequential(
        Scaled(), *convolutions, nn.Flatten(), nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, actions)
    )


def main():
    chosen = embedding_common.arguments(__doc__, tuple(BUFFERS), 2_000, 20_000)
    gym.register_envs(ale_py)
    cartpole = chosen.task == "cartpole"
    torch.manual_seed(chosen.seed)
    np.random.seed(chosen.seed)  # noqa: NPY002
    random = np.random.default_rng(chosen.seed)
    envs = SyncVectorEnv([make_cartpole if cartpole else make_atari], autoreset_mode=AutoresetMode.SAME_STEP)
    meter = embedding_common.Meter()
    capacity, starts, steps = (
        (10_000, 10_000, 100_000) if cartpole else (chosen.capacity, chosen.capacity, chosen.steps)
    )
    kind, optimized = BUFFERS[chosen.buffer]
    buffer = kind(
        capacity,
        envs.single_observation_space,
        envs.single_action_space,
        "cpu",
        optimize_memory_usage=optimized,
        handle_timeout_termination=False,
    )
    actions_in_all = int(envs.single_action_space.n)
    online, target = (network(chosen.task, actions_in_all) for _ in range(2))
    target.load_state_dict(online.state_dict())
    optimizer = torch.optim.Adam(online.parameters(), 2.5e-4 if cartpole else 1e-4)
    batch_size, train_period, target_period = (128, 10, 500) if cartpole else (32, 4, 1000)
    obs, _ = envs.reset(seed=chosen.seed)
    returns = []
    for step in range(starts + steps):
        epsilon = max(1 - step / (0.5 * (starts + steps)), 0.05) if cartpole else float(step < starts)
        actions = random.integers(actions_in_all, size=1)
        if random.random() > epsilon:
            with torch.no_grad():
                actions = online(torch.as_tensor(obs)).argmax(1).numpy()
        next_obs, rewards, terminations, truncations, infos = envs.step(actions)
        if "final_info" in infos and "episode" in infos["final_info"]:
            returns.append(float(infos["final_info"]["episode"]["r"][0]))
        real_next_obs = next_obs.copy()
        for env_index in np.flatnonzero(truncations):
            real_next_obs[env_index] = infos["final_obs"][env_index]
        buffer.add(obs, real_next_obs, actions, np.sign(rewards), terminations, infos)
        obs = next_obs
        if step < starts:
            continue
        meter.learning()
        if step % train_period == 0:
            data = buffer.sample(batch_size)
            with torch.no_grad():
                best = target(data.next_observations).max(1).values
                expected = data.rewards.flatten() + 0.99 * best * (1 - data.dones.flatten())
            values = online(data.observations).gather(1, data.actions).squeeze()
            optimizer.zero_grad()
            F.mse_loss(values, expected).backward()
            optimizer.step()
        if step % target_period == 0:
            target.load_state_dict(online.state_dict())
    if chosen.buffer == "pydqn":
        nbytes = buffer.transitions.nbytes
    else:
        nbytes = sum(value.nbytes for value in vars(buffer).values() if isinstance(value, np.ndarray))
    meter.report(steps, lambda: buffer.sample(batch_size), nbytes, returns[-100:])


if __name__ == "__main__":
    main()

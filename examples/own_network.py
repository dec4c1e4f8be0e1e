"""A custom network and a custom loss: quantile regression (Dabney et al. 2017, https://arxiv.org/abs/1710.10044).

The network computes 16 quantiles of each action's return. It learns CartPole in a few seconds.
"""

import gymnasium
import numpy as np
import torch
from torch import nn

import pydqn


class Quantiles(nn.Sequential):
    """(B, 1, 4) observations to (B, 2 actions, 16 quantiles)."""

    def __init__(self):
        layers = nn.Linear(4, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2 * 16)
        super().__init__(nn.Flatten(), *layers, nn.Unflatten(1, (2, 16)))
        self.register_buffer("shares", (torch.arange(16) + 0.5) / 16)  # moves to the device of the learner


def loss(online, target, batch):
    """Return the (B,) quantile Huber losses."""
    rows = torch.arange(len(batch.action), device=batch.action.device)
    z_tm1, z_t = online(batch.obs)[rows, batch.action], target(batch.next_obs)
    z_t = z_t[rows, z_t.mean(2).argmax(1)]
    error = batch.reward[:, None, None] + batch.discount[:, None, None] * z_t[:, :, None] - z_tm1[:, None]
    huber = nn.functional.smooth_l1_loss(error, torch.zeros_like(error), reduction="none")
    return ((online.shares - (error < 0).float()).abs() * huber).mean(1).sum(1)


torch.manual_seed(0)
torch.set_num_threads(1)  # enough for so small a network
settings = pydqn.LearnerSettings(batch_size=64, learning_rate=1e-3, target_update_period=100)
replay = pydqn.FrameReplay(20_000, (4,), stack=1, n_step=3, num_envs=8, dtype="float32", prioritized=True)
learner = pydqn.Learner(Quantiles(), settings, "auto", replay.empty_batch(64), loss=loss)
envs, random, never = gymnasium.make_vec("CartPole-v1", num_envs=8), np.random.default_rng(0), np.zeros(8, bool)
replay.append(envs.reset(seed=0)[0], np.zeros(8, int), np.zeros(8), never, never, ~never)
first, length, lengths = never, np.zeros(8, int), []
for step in range(3000):
    values = learner.policy.values(replay.latest()).mean(2)  # an action's value is the mean of its returns
    action = learner.policy.choose(values, max(0.02, 1 - step / 400), random)
    frame, reward, terminated, truncated, _ = envs.step(action)
    replay.append(frame, action, reward, terminated, truncated, first)
    length = np.where(first, 0, length + 1)  # the step after an episode only returns the next episode's first frame
    first = terminated | truncated
    lengths += length[first].tolist()
    if step >= 100:
        batch = replay.sample(64)
        learner.update(batch)
        replay.update_priorities(batch.index, learner.td_errors() + 1e-6)
before, after = np.mean(lengths[:30]), np.mean(lengths[-30:])
print(f"{len(lengths)} episodes: {before:.0f} steps in each at first, {after:.0f} at last")

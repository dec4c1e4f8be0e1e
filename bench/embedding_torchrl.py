"""TorchRL's DQN with its own buffer and with ours; nothing else differs. Prints one line of JSON.

python bench/embedding_torchrl.py --buffer own    # two stacks per transition
python bench/embedding_torchrl.py --buffer pydqn

It does what TorchRL's sota-implementations/dqn does, with its settings, except that frames are uint8 (its Atari example
keeps floats, normalized anew in each step) and that exploration takes the same share of fewer steps.
"""

from __future__ import annotations

import logging

import ale_py
import embedding_common
import gymnasium as gym
import torch
from tensordict.nn import TensorDictSequential
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import (
    CatFrames,
    GymEnv,
    GymWrapper,
    RewardSum,
    SignTransform,
    StepCounter,
    TransformedEnv,
    UnsqueezeTransform,
)
from torchrl.modules import MLP, ConvNet, EGreedyModule, QValueActor
from torchrl.objectives import DQNLoss, HardUpdate

from pydqn.adapters.torchrl import ReplayBuffer

BUFFERS = {
    "own": lambda size, batch: TensorDictReplayBuffer(storage=LazyTensorStorage(size), batch_size=batch),
    "pydqn": lambda size, batch: ReplayBuffer(size, batch_size=batch),
}
CARTPOLE = {
    "batch": 128,
    "frames_per_batch": 1000,
    "updates": 100,
    "target_period": 50,
    "eps_end": 0.05,
    "clip": float("inf"),
}
ATARI = {"batch": 32, "frames_per_batch": 400, "updates": 100, "target_period": 10_000, "eps_end": 0.01, "clip": 10.0}


class Nature(nn.Module):
    def __init__(self, actions):
        super().__init__()
        sizes = {"num_cells": [32, 64, 64], "kernel_sizes": [8, 4, 3], "strides": [4, 2, 1]}
        self.torso = ConvNet(in_features=4, activation_class=nn.ReLU, **sizes)
        self.head = MLP(in_features=3136, out_features=actions, num_cells=[512], activation_class=nn.ReLU)

    def forward(self, pixels):
        return self.head(self.torso(pixels.float() / 255))


def cartpole():
    env = TransformedEnv(GymEnv("CartPole-v1"))
    env.append_transform(RewardSum())
    env.append_transform(StepCounter())
    return env, MLP(in_features=4, out_features=2, num_cells=[120, 84], activation_class=nn.ReLU)


def atari():
    gym.register_envs(ale_py)
    game = gym.wrappers.AtariPreprocessing(gym.make("PongNoFrameskip-v4"))
    env = TransformedEnv(GymWrapper(game, categorical_action_encoding=True))
    env.append_transform(RewardSum())  # before rewards are clipped
    env.append_transform(SignTransform(in_keys=["reward"]))
    env.append_transform(UnsqueezeTransform(-3, in_keys=["observation"]))
    env.append_transform(CatFrames(N=4, dim=-3, in_keys=["observation"]))
    env.append_transform(StepCounter(max_steps=4500))
    return env, Nature(int(game.action_space.n))


def main():
    chosen = embedding_common.arguments(__doc__, tuple(BUFFERS), 2_000, 20_000)
    logging.getLogger("torchrl").setLevel(logging.WARNING)  # it would write to standard output
    torch.manual_seed(chosen.seed)
    meter = embedding_common.Meter()
    if chosen.task == "cartpole":
        (env, net), settings, capacity, random, total = cartpole(), CARTPOLE, 10_000, 2_000, chosen.total
    else:
        (env, net), settings, capacity, random = atari(), ATARI, chosen.capacity, chosen.capacity
        total = capacity + chosen.steps
    env.set_seed(chosen.seed)

    actor = QValueActor(net, spec=env.full_action_spec, in_keys=["observation"])
    explore = EGreedyModule(env.action_spec, annealing_num_steps=total // 2, eps_init=1.0, eps_end=settings["eps_end"])
    buffer = BUFFERS[chosen.buffer](capacity, settings["batch"])
    loss = DQNLoss(actor, loss_function="l2", delay_value=True, action_space=env.action_spec)
    loss.make_value_estimator(gamma=0.99)
    target = HardUpdate(loss, value_network_update_interval=settings["target_period"])
    optimizer = torch.optim.Adam(loss.parameters(), lr=2.5e-4)
    collector = Collector(
        env,
        TensorDictSequential(actor, explore),
        frames_per_batch=settings["frames_per_batch"],
        total_frames=total,
        init_random_frames=random,
    )
    collected, returns = 0, []
    for data in collector:
        data = data.reshape(-1)
        buffer.extend(data)
        collected += len(data)
        explore.step(len(data))
        returns += data["next", "episode_reward"][data["next", "done"]].tolist()
        if collected <= random:
            if collected + len(data) > random:
                meter.learning()
            continue
        for _ in range(settings["updates"]):
            sample = buffer.sample()
            optimizer.zero_grad()
            loss(sample)["loss"].backward()
            nn.utils.clip_grad_norm_(loss.parameters(), settings["clip"])
            optimizer.step()
            target.step()
    collector.shutdown()
    if chosen.buffer == "pydqn":
        nbytes = buffer.nbytes
    else:
        nbytes = sum(leaf.nbytes for leaf in buffer.storage._storage.values(True, True))
    meter.report(collected - random, buffer.sample, nbytes, returns[-100:])


if __name__ == "__main__":
    main()

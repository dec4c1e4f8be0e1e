"""Tianshou's DQN, collectors and trainer with its own buffers and with ours; nothing else differs.

Prints one line of JSON. Settings are those of Tianshou's examples, with as many environments as fit two cores.

    python bench/embedding_tianshou.py --buffer own        # two stacks per transition
    python bench/embedding_tianshou.py --buffer optimized  # one frame per transition, as in its Atari examples
    python bench/embedding_tianshou.py --buffer pydqn

The buffer is filled with random actions before the clock starts. Try it with `--steps 40 --capacity 300`.
"""

from __future__ import annotations

import ale_py
import embedding_common
import gymnasium as gym
import numpy as np
import torch
from tianshou import data
from tianshou.algorithm import DQN
from tianshou.algorithm.modelfree.dqn import DiscreteQLearningPolicy
from tianshou.algorithm.optim import AdamOptimizerFactory
from tianshou.data import Batch, Collector, CollectStats
from tianshou.env import DummyVectorEnv
from tianshou.env.atari.atari_network import DQNet, ScaledObsInputActionReprNet
from tianshou.trainer import OffPolicyTrainerParams
from tianshou.utils.net.common import Net

from pydqn.adapters import tianshou as ours

BUFFERS = {
    "own": (data.VectorReplayBuffer, {}),
    "optimized": (
        data.VectorReplayBuffer,
        {"ignore_obs_next": True, "save_only_last_obs": True, "stack_num": 4},
    ),
    "pydqn": (ours.VectorReplayBuffer, {}),
}
CARTPOLE = {"envs": 10, "lr": 1e-3, "gamma": 0.95, "n_step": 3, "target": 100, "batch": 64, "updates": 0.2}
ATARI = {"envs": 4, "lr": 1e-4, "gamma": 0.99, "n_step": 3, "target": 500, "batch": 32, "updates": 0.1}
COLLECT = {"cartpole": 10, "atari": 12}  # steps between updates; the examples have 10


def make(task):
    if task == "cartpole":
        return gym.make("CartPole-v1")
    env = gym.wrappers.AtariPreprocessing(gym.make("PongNoFrameskip-v4"))  # Tianshou's own is for NumPy before 2.4
    return gym.wrappers.FrameStackObservation(env, 4)


def nbytes(columns):
    parts = columns.values() if isinstance(columns, Batch) else []
    return sum(nbytes(part) for part in parts) if isinstance(columns, Batch) else columns.nbytes


def main():
    chosen = embedding_common.arguments(__doc__, tuple(BUFFERS), 2_000, 20_000)
    gym.register_envs(ale_py)
    task, settings = chosen.task, CARTPOLE if chosen.task == "cartpole" else ATARI
    steps, capacity, fill = (20_000, 20_000, 640) if task == "cartpole" else (chosen.steps, *[chosen.capacity] * 2)
    np.random.seed(chosen.seed)  # noqa: NPY002  # Tianshou explores with it
    torch.manual_seed(chosen.seed)
    meter = embedding_common.Meter()
    count = settings["envs"]
    envs = DummyVectorEnv([lambda: make(task) for _ in range(count)])
    envs.seed(chosen.seed)
    actions = envs.action_space[0]
    if task == "cartpole":
        network = Net(state_shape=4, action_shape=int(actions.n), hidden_sizes=[64, 64])
    else:
        network = ScaledObsInputActionReprNet(DQNet(c=4, h=84, w=84, action_shape=int(actions.n)))
    policy = DiscreteQLearningPolicy(model=network, action_space=actions, eps_training=0.1, eps_inference=1.0)
    algorithm = DQN(
        policy=policy,
        optim=AdamOptimizerFactory(lr=settings["lr"]),
        gamma=settings["gamma"],
        n_step_return_horizon=settings["n_step"],
        target_update_freq=settings["target"],
    )
    kind, options = BUFFERS[chosen.buffer]
    buffer = kind(capacity, count, **(options if task == "atari" else {}))
    returns = []
    collector = Collector[CollectStats](
        algorithm,
        envs,
        buffer,
        exploration_noise=True,
        on_episode_done_hook=lambda episode: returns.append(float(episode.rew.sum())),
    )
    collector.reset()
    collector.collect(n_step=fill)
    returns.clear()
    meter.learning()
    algorithm.run_training(
        OffPolicyTrainerParams(
            training_collector=collector,
            test_collector=None,
            max_epochs=1,
            epoch_num_steps=steps,
            collection_step_num_env_steps=COLLECT[task],
            update_step_num_gradient_steps_per_sample=settings["updates"],
            batch_size=settings["batch"],
            show_progress=False,
        )
    )
    held = nbytes(buffer._meta) + (buffer.transitions.nbytes if chosen.buffer == "pydqn" else 0)
    meter.report(steps, lambda: buffer.sample(settings["batch"]), held, returns[-100:])


if __name__ == "__main__":
    main()

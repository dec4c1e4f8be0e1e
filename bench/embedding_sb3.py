"""Stable-Baselines3's DQN with its own buffers and with ours. Nothing else differs. Prints one line of JSON.

python bench/embedding_sb3.py --buffer own        # two stacks per transition
python bench/embedding_sb3.py --buffer optimized  # one stack per transition; no time limits
python bench/embedding_sb3.py --buffer pydqn
"""

from __future__ import annotations

import ale_py
import embedding_common
import gymnasium as gym
import numpy as np
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.vec_env import VecFrameStack

from pydqn.adapters.sb3 import ReplayBuffer

BUFFERS = {
    "own": {},
    "optimized": {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}},
    "pydqn": {"replay_buffer_class": ReplayBuffer},
}
CARTPOLE = {  # RL Baselines3 Zoo's settings
    "learning_rate": 2.3e-3,
    "batch_size": 64,
    "buffer_size": 100_000,
    "learning_starts": 1000,
    "target_update_interval": 10,
    "train_freq": 256,
    "gradient_steps": 128,
    "exploration_fraction": 0.16,
    "exploration_final_eps": 0.04,
    "policy_kwargs": {"net_arch": [256, 256]},
}
ATARI = {"learning_rate": 1e-4, "batch_size": 32, "train_freq": 4, "target_update_interval": 1000}


class Learning(BaseCallback):
    """Starts the clock with the first update."""

    def __init__(self, meter, starts):
        super().__init__()
        self.meter, self.starts = meter, starts

    def _on_step(self):
        if self.num_timesteps > self.starts:
            self.meter.learning()
        return True


def main():
    chosen = embedding_common.arguments(__doc__, tuple(BUFFERS), 2_000, 20_000)
    gym.register_envs(ale_py)
    meter = embedding_common.Meter()
    if chosen.task == "cartpole":
        steps, starts, batch = 50_000, 1_000, 64
        model = DQN("MlpPolicy", make_vec_env("CartPole-v1"), **CARTPOLE, **BUFFERS[chosen.buffer], seed=chosen.seed)
    else:
        steps, starts, batch = chosen.steps, chosen.capacity, 32
        env = VecFrameStack(make_atari_env("PongNoFrameskip-v4", seed=chosen.seed), 4)
        sizes = {"buffer_size": chosen.capacity, "learning_starts": starts}
        model = DQN("CnnPolicy", env, **ATARI, **sizes, **BUFFERS[chosen.buffer], seed=chosen.seed, device="cpu")
    total = steps if chosen.task == "cartpole" else starts + steps
    model.learn(total, callback=Learning(meter, starts))
    buffer = model.replay_buffer
    if chosen.buffer == "pydqn":
        nbytes = buffer.transitions.nbytes
    else:
        nbytes = sum(value.nbytes for value in vars(buffer).values() if isinstance(value, np.ndarray))
    returns = [episode["r"] for episode in model.ep_info_buffer]
    meter.report(total - starts, lambda: buffer.sample(batch), nbytes, returns[-100:])


if __name__ == "__main__":
    main()

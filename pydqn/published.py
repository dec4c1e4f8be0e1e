"""Settings of publications, each with its source. A preset is data, never code."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from pydqn.config import Config


class Preset(NamedTuple):
    """A named `Config` and where its settings come from."""

    config: Config
    summary: str
    source: str


# What the publications share: one environment, one update per step, no clipping of gradients, one-step targets.
_PLAIN = Config(num_envs=1, train_period_steps=1.0, max_grad_norm=0.0, mean_episodes=100, log_every_steps=1_000)

_BREAKOUT = dataclasses.replace(
    _PLAIN,
    env_id="ALE/Breakout-v5",
    total_steps=25_000_000,
    total_episodes=10_000,
    max_episode_steps=10_000,  # of the old Breakout-v0
    frame_skip=2,
    frame_skip_max=4,
    max_pool=False,
    sticky_actions=0.25,
    noop_max_frames=0,
    clip_rewards=False,  # a brick is worth 1, 4 or 7
    preprocess="crop_nearest",
    padding="first",
    replay_capacity_frames=500_000,
    loss="mse",
    optimizer="rmsprop_tf",
    learning_rate=2.5e-4,
    rmsprop_decay=0.99,
    optimizer_epsilon=1e-6,
    learning_starts_steps=50_000,
    target_update_period=10_000,
    epsilon_end=0.1,
    epsilon_decay_steps=500_000,
    log_every_episodes=1,
    checkpoint_every_episodes=1,
    video_every_episodes=50,
)

# DeepMind's own implementations (Quan and Ostrovski 2020, DQN Zoo, https://github.com/google-deepmind/dqn_zoo).
_ZOO = dataclasses.replace(
    _PLAIN,
    env_id="ALE/Breakout-v5",
    total_steps=50_000_000,
    terminal_on_life_loss=True,  # "zero discount on life loss"
    replay_capacity_frames=1_000_000,
    learning_starts_steps=50_000,
    train_period_steps=4.0,
    target_update_period=2_500,  # updates: every 10,000 steps
    epsilon_hold_steps=50_000,
    epsilon_decay_steps=1_000_000,
    evaluation_every_steps=250_000,
    evaluation_episodes=30,
    log_every_episodes=10,
    checkpoint_every_steps=250_000,
)
_ZOO_DOUBLE = dataclasses.replace(
    _ZOO,
    double=True,
    shared_bias=True,
    target_update_period=7_500,  # every 30,000 steps
    optimizer="rmsprop_centered",
    learning_rate=2.5e-4,
    rmsprop_decay=0.95,
    optimizer_epsilon=0.01 / 32**2,
    evaluation_epsilon=0.01,
)

# Castro et al. 2018, Dopamine (https://arxiv.org/abs/1812.06110), by its own configuration files.
_DOPAMINE = dataclasses.replace(
    _PLAIN,
    env_id="ALE/Breakout-v5",
    total_steps=50_000_000,
    sticky_actions=0.25,
    noop_max_frames=0,
    replay_capacity_frames=1_000_000,
    learning_starts_steps=20_000,
    train_period_steps=4.0,
    target_update_period=2_000,  # updates: every 8,000 steps
    epsilon_hold_steps=20_000,
    epsilon_decay_steps=250_000,
    evaluation_every_steps=250_000,
    log_every_episodes=10,
    checkpoint_every_steps=250_000,
)
_DOPAMINE_IQN = dataclasses.replace(
    _DOPAMINE, value="implicit_quantile", learning_rate=5e-5, optimizer_epsilon=3.125e-4
)  # 64 levels each to learn and for the target, 32 to act

PUBLISHED: dict[str, Preset] = {
    "minatar-dqn": Preset(
        dataclasses.replace(
            _PLAIN,
            env_id="MinAtar/Breakout-v0",
            total_steps=10_000_000,
            stack=1,
            network="minatar",
            hidden_units=(128,),
            learning_rate=2.5e-4,
            optimizer_epsilon=3.125e-4,
            learning_starts_steps=1_000,
            train_period_steps=4.0,
            target_update_period=250,  # updates: every 1,000 steps
            epsilon_decay_steps=250_000,
            log_every_steps=10_000,
            checkpoint_every_steps=250_000,
        ),
        "A MinAtar game (--env-id; pip install 'pydqn[minatar]'); Breakout by default",
        "Obando-Ceron and Castro 2021, Revisiting Rainbow: DQN for MinAtar",
    ),
    "frozenlake": Preset(
        Config(
            agent="tabular",
            env_id="FrozenLake-v1",
            num_envs=1,
            total_steps=1_000_000,
            stop_evaluation_return=0.85,  # the lowest mean of 20 episodes above 0.80
            mean_episodes=100,
            stack=1,
            gamma=0.9,
            learning_rate=0.2,
            epsilon_end=1.0,  # all actions are random
            evaluation_every_steps=1,
            evaluation_episodes=20,
            evaluation_epsilon=0.0,
            evaluation_max_episode_steps=10_000,  # a greedy policy may never end an episode (in CliffWalking)
            log_every_steps=1_000,
        ),
        "FrozenLake 4x4, slippery, to a mean test return above 0.80",
        "Tabular Q-learning of Lapan, Deep Reinforcement Learning Hands-On, chapter 5",
    ),
    "cartpole": Preset(
        dataclasses.replace(
            _PLAIN,
            env_id="CartPole-v1",
            total_steps=100_000,
            total_episodes=500,
            max_episode_steps=200,
            stop_successes=5,
            success_steps=190,
            mean_episodes=10,
            stack=1,
            replay_capacity_frames=10_000,
            skip_first_steps=10,
            network="mlp",
            hidden_units=(16, 16, 16),
            learning_rate=1e-3,
            optimizer_epsilon=1e-8,
            learning_starts_steps=32,
            target_update_period=0,
            target_update_period_episodes=1,
            epsilon_schedule="exponential",
            epsilon_end=0.01,
            epsilon_decay_steps=1_000,
            evaluation_epsilon=0.0,
            log_every_episodes=1,
            checkpoint_every_steps=0,
        ),
        "CartPole from its four numbers, to five successes in a row",
        "DQN with a shaped reward and a target network copied at each episode's start",
    ),
    "pong-book": Preset(
        dataclasses.replace(
            _PLAIN,
            env_id="ALE/Pong-v5",
            total_steps=10_000_000,
            stop_return=19.01,  # the lowest mean of 100 episodes above 19
            fire_reset=True,
            clip_rewards=False,
            preprocess="crop_area",
            replay_capacity_frames=10_000,
            loss="mse",
            optimizer_epsilon=1e-8,
            learning_starts_steps=10_000,
            target_update_period=1_000,
            epsilon_decay_steps=148_500,  # max(0.01, 1 - step / 150,000)
            evaluation_epsilon=0.0,
            log_every_episodes=1,
        ),
        "Atari Pong from pixels, to a mean return above 19",
        "DQN of Lapan, Deep Reinforcement Learning Hands-On, chapter 6",
    ),
    "breakout": Preset(
        _BREAKOUT,
        "Atari Breakout from pixels",
        "DQN with TensorFlow's RMSProp and the maximum of the target network",
    ),
    "breakout-double": Preset(
        dataclasses.replace(_BREAKOUT, double=True),
        "Atari Breakout from pixels",
        "The settings of breakout, with double Q-learning (van Hasselt et al. 2016)",
    ),
    "breakout-dueling": Preset(
        dataclasses.replace(
            _BREAKOUT,
            total_episodes=0,
            max_episode_steps=18_000,
            frame_skip=4,
            frame_skip_max=0,
            noop_max_frames=20,
            terminal_on_life_loss=True,
            replay_capacity_frames=1_000_000,
            network="nature_7x7",
            hidden_units=(),
            dueling=True,
            double=True,
            loss="huber",
            optimizer="adam",
            learning_rate=1e-5,
            optimizer_epsilon=1e-8,
            epsilon_schedule="piecewise",
            epsilon_hold_steps=50_000,
            epsilon_decay_steps=1_000_000,
            epsilon_final=0.01,
            evaluation_epsilon=0.01,
            log_every_episodes=10,
            checkpoint_every_episodes=50,
            video_format="gif",
        ),
        "Atari Breakout from pixels",
        "Dueling (Wang et al. 2016) and double Q-learning, without hidden layers or biases, and Adam",
    ),
    "nature": Preset(
        dataclasses.replace(
            _PLAIN,
            env_id="ALE/Breakout-v5",
            total_steps=50_000_000,
            terminal_on_life_loss=True,
            replay_capacity_frames=1_000_000,
            optimizer="rmsprop_centered",
            learning_rate=2.5e-4,
            rmsprop_decay=0.95,
            optimizer_epsilon=0.01 / 32**2,  # theirs is 0.01 for the sum over a batch of 32; ours is for the mean
            learning_starts_steps=50_000,
            train_period_steps=4.0,
            target_update_period=10_000,
            epsilon_end=0.1,
            epsilon_decay_steps=1_000_000,
            evaluation_every_steps=250_000,
            evaluation_episodes=30,
            evaluation_epsilon=0.05,
            evaluation_protocol="nature",
            log_every_episodes=10,
            checkpoint_every_steps=250_000,
        ),
        "Any Atari game (--env-id) from pixels; Breakout by default",
        "Mnih et al. 2015, extended data table 1",
    ),
    "double": Preset(
        _ZOO_DOUBLE,
        "Any Atari game (--env-id) from pixels; Breakout by default",
        "Double DQN (van Hasselt et al. 2016) of DQN Zoo",
    ),
    "prioritized": Preset(
        dataclasses.replace(
            _ZOO_DOUBLE,
            prioritized=True,
            priority_alpha=0.6,
            priority_beta=0.4,
            priority_epsilon=1e-10,
            priority_uniform_share=1e-3,
            learning_rate=2.5e-4 / 4,
            optimizer_epsilon=0.01 / 32**2 / 4**2,
        ),
        "Any Atari game (--env-id) from pixels; Breakout by default",
        "Double DQN with prioritized replay (Schaul et al. 2016) of DQN Zoo",
    ),
    "c51": Preset(
        dataclasses.replace(
            _ZOO, value="categorical", learning_rate=2.5e-4, optimizer_epsilon=0.01 / 32, max_grad_norm=10.0
        ),
        "Any Atari game (--env-id) from pixels; Breakout by default",
        "C51 (Bellemare et al. 2017) of DQN Zoo",
    ),
    "qrdqn": Preset(
        dataclasses.replace(
            _ZOO,
            value="quantile",
            num_quantiles=201,
            learning_rate=5e-5,
            optimizer_epsilon=0.01 / 32,
            max_grad_norm=10.0,
        ),
        "Any Atari game (--env-id) from pixels; Breakout by default",
        "QR-DQN (Dabney et al. 2018) of DQN Zoo",
    ),
    "iqn": Preset(
        dataclasses.replace(
            _ZOO,
            value="implicit_quantile",
            num_action_taus=64,
            learning_rate=5e-5,
            optimizer_epsilon=0.01 / 32,
            learning_starts_steps=20_000,
            epsilon_hold_steps=20_000,
        ),
        "Any Atari game (--env-id) from pixels; Breakout by default",
        "IQN (Dabney et al. 2018) of DQN Zoo",
    ),
    "rainbow": Preset(
        dataclasses.replace(
            _ZOO,
            value="categorical",
            double=True,
            dueling=True,
            noisy_sigma=0.1,
            n_step=3,
            prioritized=True,
            priority_alpha=0.5,
            priority_beta=0.4,
            priority_epsilon=1e-10,
            priority_uniform_share=1e-3,
            learning_rate=2.5e-4 / 4,
            optimizer_epsilon=0.005 / 32,
            max_grad_norm=10.0,
            learning_starts_steps=20_000,
            target_update_period=2_000,  # every 8,000 steps
            epsilon_start=0.0,  # the noise explores
            epsilon_end=0.0,
            evaluation_epsilon=0.0,
            evaluation_noise=True,
        ),
        "Any Atari game (--env-id) from pixels; Breakout by default",
        "Rainbow (Hessel et al. 2018) of DQN Zoo",
    ),
    "dopamine-dqn": Preset(
        dataclasses.replace(_DOPAMINE, loss="mse", learning_rate=6.25e-5, optimizer_epsilon=1.5e-4),
        "Any Atari game (--env-id) from pixels; Breakout by default",
        "DQN of Dopamine (Castro et al. 2018), with Adam and the mean squared error",
    ),
    "dopamine-c51": Preset(
        dataclasses.replace(_DOPAMINE, value="categorical", learning_rate=2.5e-4, optimizer_epsilon=3.125e-4),
        "Any Atari game (--env-id) from pixels; Breakout by default",
        "C51 (Bellemare et al. 2017) of Dopamine",
    ),
    "dopamine-rainbow": Preset(
        dataclasses.replace(
            _DOPAMINE,
            value="categorical",
            n_step=3,
            prioritized=True,
            priority_error="root_loss",
            priority_alpha=1.0,  # of the root, so 0.5 of the loss
            priority_beta=0.5,
            priority_beta_end=0.5,
            priority_epsilon=1e-10,
            learning_rate=6.25e-5,
            optimizer_epsilon=1.5e-4,
        ),
        "Any Atari game (--env-id) from pixels; Breakout by default",
        "The compact Rainbow of Dopamine: C51, three steps, priorities (Hessel et al. 2018 without the rest)",
    ),
    "dopamine-iqn": Preset(
        dataclasses.replace(_DOPAMINE_IQN, n_step=3),
        "Any Atari game (--env-id) from pixels; Breakout by default",
        "IQN (Dabney et al. 2018) of Dopamine",
    ),
    "m-dqn": Preset(
        dataclasses.replace(_DOPAMINE, munchausen=True, learning_rate=5e-5, optimizer_epsilon=3.125e-4),
        "Any Atari game (--env-id) from pixels; Breakout by default",
        "Munchausen DQN (Vieillard et al. 2020)",
    ),
    "m-iqn": Preset(
        dataclasses.replace(_DOPAMINE_IQN, munchausen=True),
        "Any Atari game (--env-id) from pixels; Breakout by default",
        "Munchausen IQN (Vieillard et al. 2020)",
    ),
    "hl-gauss": Preset(
        dataclasses.replace(
            _DOPAMINE, value="hl_gauss", learning_rate=6.25e-5, optimizer_epsilon=1.5e-4
        ),  # 51 bins from -10 to 10, sigma of 0.75 bins
        "Any Atari game (--env-id) from pixels; Breakout by default",
        "Dopamine's DQN with values learned by classification (Farebrother et al. 2024, Stop Regressing)",
    ),
    "btr": Preset(
        dataclasses.replace(
            _PLAIN,
            env_id="ALE/Breakout-v5",
            num_envs=64,
            total_steps=50_000_000,
            sticky_actions=0.25,
            noop_max_frames=0,
            replay_capacity_frames=2**20,
            prioritized=True,
            priority_alpha=0.2,
            priority_beta=0.2,
            priority_beta_end=0.2,
            priority_epsilon=1e-6,
            priority_error="td_error",
            network="impala",
            impala_width=2,
            impala_spectral=True,
            impala_pooled=6,
            dueling=True,
            noisy_sigma=0.5,
            gamma=0.997,
            n_step=3,
            value="implicit_quantile",
            num_taus=8,
            num_target_taus=8,
            num_action_taus=8,
            first_cosine=0,
            munchausen=True,
            munchausen_policy="online",
            learning_rate=1e-4,
            optimizer_epsilon=0.005 / 256,
            max_grad_norm=10.0,
            batch_size=256,
            learning_starts_steps=200_000,
            train_period_steps=64.0,
            target_update_period=500,
            epsilon_schedule="exponential",
            epsilon_decay_steps=2_000_000,
            epsilon_off_steps=25_000_000,
            evaluation_epsilon=0.01,
            evaluation_every_steps=1_000_000,
            log_every_steps=10_000,
            checkpoint_every_steps=1_000_000,
        ),
        "Any Atari game (--env-id) from pixels; Breakout by default",
        "Beyond the Rainbow (Clark et al. 2025): IQN, Munchausen, noisy layers, IMPALA's network",
    ),
}

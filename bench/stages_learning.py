"""The update, the whole loop, and the start."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ale_py
import gymnasium
import numpy as np
import torch
from limits import UpdateLimit
from other_libraries import BATCH, BUFFERS
from timing import Elsewhere, in_turns, missing, ms, rates_in_turns, row
from torch import nn

from pydqn import Learner, LearnerSettings, preset
from pydqn.learning.networks import make_network
from pydqn.learning.policy import resolve_device, resolve_precision
from pydqn.training.loop import Run

# Nature's network and plain Q-learning, as in the other libraries.
NATURE = {
    "prioritized": False,
    "network": "nature",
    "hidden_units": (512,),
    "dueling": False,
    "double": False,
    "n_step": 1,
    "max_grad_norm": 0.0,
    "pixel_mean": 0.0,
    "pixel_std": 1.0,
    "learning_rate": 1e-4,
    "optimizer_epsilon": 1e-8,
}


def default_network():
    torch.manual_seed(0)
    convs = nn.Conv2d(4, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU(), nn.Conv2d(64, 64, 3, 1), nn.ReLU()
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, 4))


def default_update(online):
    """Return a plain PyTorch update: float32, NCHW, `torch.optim.Adam`."""
    target = default_network()
    optimizer = torch.optim.Adam(online.parameters(), lr=1e-4)

    def update(batch):
        obs, next_obs = torch.as_tensor(batch.obs) / 255.0, torch.as_tensor(batch.next_obs) / 255.0
        with torch.no_grad():
            y = torch.as_tensor(batch.reward) + torch.as_tensor(batch.discount) * target(next_obs).max(1).values
        q = online(obs).gather(1, torch.as_tensor(batch.action)[:, None]).squeeze(1)
        loss = nn.functional.smooth_l1_loss(q, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return update


def update(quick):
    """One update of 32, Nature's network. After 20 updates, both have the same loss within a tolerance."""
    buffer = BUFFERS["pydqn"][0](5_000)
    for i in range(5_000):
        buffer.add(i)
    out = buffer.replay.empty_batch(BATCH)
    threads = torch.get_num_threads()
    for precision, tolerance in (("float32", 1e-4), ("auto", 0.05)):
        online, network = default_network(), make_network("nature", 4, (84, 84), 4)
        with torch.no_grad():
            for mine, other in zip(network.parameters(), online.parameters(), strict=True):
                mine.copy_(other)
        config = preset("pong", precision=precision, target_update_period=0, **NATURE)
        settings = LearnerSettings.from_config(config)
        learner, theirs = Learner(network, settings, resolve_device("cpu"), out), default_update(online)
        for _ in range(20):
            batch = buffer.replay.sample(BATCH, out)
            learner.update(batch)
            expected = theirs(batch)
        np.testing.assert_allclose(learner.statistics().loss, expected, rtol=tolerance, atol=tolerance / 10)
        dtype = learner.policy.computing.torso.convs[-1].weight.dtype
        kind = str(dtype).removeprefix("torch.")
        limit = UpdateLimit(default_network(), BATCH, dtype)
        for count in sorted({1, threads}, reverse=True):
            torch.set_num_threads(count)
            both = {
                "pydqn": lambda learner=learner: learner.update(buffer.replay.sample(BATCH, out)),
                "eager": lambda theirs=theirs: theirs(buffer.replay.sample(BATCH, out)),
            }
            times = in_turns(both, 30 if quick else 80, 3)
            mine, value, least = times["pydqn"], times["eager"], limit.seconds()
            target = ("<=", 0.45) if precision == "auto" else None
            stage = f"update of 32, {kind}, {count} thread" + "s" * (count > 1)
            note = f"losses within {tolerance:g}"
            row(stage, ms(mine), f"PyTorch eager, float32: {ms(value)}", mine / value, target, note)
            row(stage, ms(mine), f"its arithmetic alone: {ms(least)}", mine / least)
    torch.set_num_threads(threads)


def our_loop(envs, seconds):
    config = preset(
        "pong",
        **NATURE,
        env_id="breakout",
        num_envs=envs,
        target_update_period=250,
        train_period_steps=4,
        learning_starts_steps=1_000,
        replay_capacity_frames=20_000,
        log_every_steps=1_000,
    )
    folder = tempfile.TemporaryDirectory()
    run = Run(config, Path(folder.name) / "run")
    next(run.reports())

    def rate():
        started, steps, updates = time.perf_counter(), run.steps, run.updates
        while time.perf_counter() - started < seconds:
            run.step()
        taken = time.perf_counter() - started
        assert abs((run.steps - steps) / 4 - (run.updates - updates)) <= envs, folder.name
        return (run.steps - steps) / taken

    return rate


def stable_baselines3(count, seconds):
    from stable_baselines3 import DQN
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_atari_env
    from stable_baselines3.common.vec_env import VecFrameStack

    class Clock(BaseCallback):
        until = 0.0

        def _on_step(self):
            return time.perf_counter() < self.until

    gymnasium.register_envs(ale_py)
    env = VecFrameStack(make_atari_env("BreakoutNoFrameskip-v4", n_envs=count, seed=0), 4)
    model = DQN(
        "CnnPolicy",
        env,
        buffer_size=20_000,
        learning_rate=1e-4,
        batch_size=32,
        learning_starts=1_000,
        target_update_interval=1_000,
        exploration_final_eps=0.01,
        train_freq=4 if count == 1 else 1,
        gradient_steps=1 if count == 1 else count // 4,
    )
    model.learn(1_200)

    def rate():
        clock = Clock()
        steps, started = model.num_timesteps, time.perf_counter()
        clock.until = started + seconds
        model.learn(10**7, callback=clock, reset_num_timesteps=False)
        return (model.num_timesteps - steps) / (time.perf_counter() - started)

    return rate


def arithmetic_alone(train_period_steps):
    """Return a function that measures the steps/s at which the updates' arithmetic alone would take all the time."""
    precision = resolve_precision("auto", resolve_device("cpu"))
    limit = UpdateLimit(default_network(), BATCH, precision)
    return lambda: train_period_steps / limit.seconds()


def loop(quick):
    """Breakout, Nature's network, one update of 32 per 4 steps."""
    seconds = 4 if quick else 8
    players = {f"pydqn, {envs} environments": Elsewhere(our_loop, envs, seconds) for envs in (8, 16)}
    for count in (1, 8):
        name = f"stable-baselines3, {count} env" + "s" * (count > 1)
        try:
            players[name] = Elsewhere(stable_baselines3, count, seconds)
        except Exception as error:
            missing(name, error)
    players["the updates' arithmetic alone"] = Elsewhere(arithmetic_alone, 4)
    rate = rates_in_turns(players, 2 if quick else 7)
    for player in players.values():
        player.close()
    best = max((name for name in rate if name.startswith("pydqn")), key=rate.get)
    mine = rate.pop(best)
    for name, value in rate.items():
        target = (">=", 4.0) if name == "stable-baselines3, 1 env" else None
        row("whole loop, steps/s", f"{mine:.0f}", f"{name}: {value:.0f}", mine / value, target, f"({best})")


def start(quick):
    """Seconds of `pydqn train pong` with 8 steps: the first time, and the median of later times."""
    spent = []
    for _ in range(2 if quick else 4):
        with tempfile.TemporaryDirectory() as folder:
            program = str(Path(sys.executable).parent / "pydqn")
            started = time.perf_counter()
            subprocess.run(
                [program, "train", "pong", "--total-steps", "8", "--logdir", folder + "/run"],
                check=True,
                capture_output=True,
            )
            spent.append(time.perf_counter() - started)
    again = float(np.median(spent[1:]))
    note = "(seconds, not a ratio)"
    row("start, second time", f"{again:.2f} s", f"the first: {spent[0]:.2f} s", again, ("<=", 5.0), note)

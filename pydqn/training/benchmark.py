"""Measuring how fast this machine runs a preset: each stage alone, and the whole loop."""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from pydqn.config import Config
from pydqn.training.loop import Run

_LEAST_CALLS = 5


class Measurement(NamedTuple):
    """The speed of one stage."""

    stage: str
    microseconds: float  # median, per call
    per_second: float
    unit: str  # what `per_second` counts


def measure(config: Config, seconds: float = 3.0) -> Iterator[Measurement]:
    """Yield the stages of `config` one after another, each measured for about `seconds` on an otherwise idle machine.

    The replay buffer holds as much as when learning starts; later in a run, more of the machine's memory is used.

    Raises:
        ValueError: the configuration cannot run on this machine, or has no network.
    """
    if config.agent != "dqn":
        raise ValueError(f"agent: expected dqn, got {config.agent!r}, which has no stages to measure")
    with warm_run(config) as run:
        yield from _stages(run, seconds)


@contextmanager
def warm_run(config: Config) -> Iterator[Run]:
    """Start a run of `config` that has made its first updates, never ends, and saves nothing until it is closed."""
    config = dataclasses.replace(
        config,
        total_steps=2**53,
        total_episodes=0,
        learning_starts_steps=max(2 * config.batch_size, 64 * config.num_envs),
        log_every_steps=max(2 * config.batch_size, 64 * config.num_envs) + math.ceil(8 * config.train_period_steps),
        log_every_episodes=0,
        checkpoint_every_steps=0,
        checkpoint_every_episodes=0,
        evaluation_every_steps=0,
        video_every_episodes=0,
        stop_return=float("inf"),
        stop_successes=0,
    )
    with tempfile.TemporaryDirectory() as folder, Run(config, Path(folder) / "run") as run:
        next(run.reports())  # runs until some updates have been made: compilers and caches are warm then
        yield run


def _stages(run: Run, seconds: float) -> Iterator[Measurement]:
    config, learner, replay = run.config, run.learner, run.replay
    num_envs, size = config.num_envs, config.batch_size
    wait = torch.cuda.synchronize if learner.device.type == "cuda" else lambda: None
    slot = replay.next_slot()
    none = np.zeros(num_envs, np.bool_)
    zeros = np.zeros(num_envs, np.int64)
    generator = np.random.default_rng(config.seed)

    def environments() -> None:
        run.envs.send(generator.integers(run.envs.num_actions, size=num_envs))
        run.envs.recv(slot)

    yield _time("environments, with preprocessing", environments, seconds, num_envs, "steps")
    yield _time("append", lambda: replay.append(slot, zeros, zeros, none, none, none), seconds / 3, num_envs, "frames")
    out = replay.empty_batch(size)
    yield _time(f"sample {size}", lambda: replay.sample(size, out), seconds / 3, size, "transitions")
    yield _time("act", lambda: run.act(0.0), seconds / 3, num_envs, "actions")

    def update() -> None:
        learner.update(out)
        wait()

    yield _time(f"update of {size}", update, seconds, 1, "updates")
    run.count_updates_from(run.steps)  # the loop has not required the updates above
    frames, started = run.frames, time.perf_counter()
    loop = _time("whole loop", run.step, 2 * seconds, num_envs, "steps")
    wait()
    yield loop
    rate = (run.frames - frames) / (time.perf_counter() - started)
    yield Measurement("whole loop", loop.microseconds, rate, "emulator frames")


def _time(stage: str, call: Callable[[], object], seconds: float, count: int, unit: str) -> Measurement:
    """Time repeated calls. The rate is that of all calls together, since some (with a reset) are rare and long."""
    call()
    spent: list[float] = []
    started = time.perf_counter()
    while time.perf_counter() - started < seconds or len(spent) < _LEAST_CALLS:
        before = time.perf_counter()
        call()
        spent.append(time.perf_counter() - before)
    return Measurement(stage, float(np.median(spent)) * 1e6, count * len(spent) / sum(spent), unit)

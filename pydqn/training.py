"""The training loop: send - learn - recv, as a generator of reports."""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from pydqn.checkpoint import save_weights, write_json
from pydqn.config import Config
from pydqn.envs import Episode, Lanes, make_lanes
from pydqn.evaluation import (
    BEST_WEIGHTS,
    CONFIG,
    LAST_WEIGHTS,
    evaluate_policy,
    memory_for,
    network_for,
    open_episodes,
)
from pydqn.learner import Learner, resolve_device
from pydqn.logs import PROGRESS, Report, RunLog, environment
from pydqn.replay import FrameReplay
from pydqn.schedules import linear


class Result(NamedTuple):
    """What a run came to."""

    returns: list[float]  # the true return of every whole game, in the order in which they ended
    steps: int
    frames: int
    updates: int
    seconds: float
    logdir: Path


def train(config: Config, logdir: str | os.PathLike[str]) -> Result:
    """Train from scratch; see `Run` for what `logdir` holds afterwards.

    Raises:
        ValueError: the configuration cannot run on this machine, or `logdir` holds a run already.
    """
    with Run(config, logdir) as run:
        for _ in run.reports():
            pass
    return run.result()


class Run:
    """One training run.

    `logdir` gets config.json, environment.json (versions and machine), progress.csv, episodes.csv, TensorBoard events
    and weights/: best.safetensors, whenever the mean return improves, and last.safetensors, however the run ends.
    """

    def __init__(self, config: Config, logdir: str | os.PathLike[str]) -> None:
        self.logdir = Path(logdir)
        if (self.logdir / PROGRESS).exists():
            raise ValueError(f"logdir: {str(logdir)!r} holds a run already; choose another folder")
        device = resolve_device(config.device)
        if config.torch_threads:
            torch.set_num_threads(config.torch_threads)
        seeds = [int(seed) for seed in np.random.SeedSequence(config.seed).generate_state(5)]
        self.config = config
        self._generator = np.random.default_rng(seeds[0])
        self._evaluation_seed = seeds[1]
        self.lanes: Lanes = make_lanes(config, config.num_envs, seeds[2])
        self.replay: FrameReplay = memory_for(config, self.lanes, config.replay_capacity_frames, seeds[3])
        network = network_for(config, self.lanes, seeds[4])
        self._batch = self.replay.empty_batch(config.batch_size)
        self.learner = Learner(network, config, device, self._batch)
        self.steps = 0
        self.returns: list[float] = []
        self._recent: deque[Episode] = deque(maxlen=config.mean_episodes)
        self._best = -math.inf
        self._evaluation = math.nan
        self._started = self._seconds = 0.0
        self._last: Report | None = None
        (self.logdir / BEST_WEIGHTS).parent.mkdir(parents=True, exist_ok=True)
        write_json(self.logdir / CONFIG, config.to_dict())
        write_json(self.logdir / "environment.json", {**environment(), "device": str(device)})
        self._log = RunLog(self.logdir)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            self._save(LAST_WEIGHTS)
            if self._last is not None and self._last.steps < self.steps:
                self._report()  # the row that an interruption would have cost
        finally:
            self._log.__exit__(kind, None, None)
            self.lanes.close()

    def reports(self) -> Iterator[Report]:
        """Run to the end, yielding a report every `log_every_steps` and at the end."""
        config = self.config
        self._started = time.perf_counter()
        open_episodes(self.lanes, self.replay)
        self._report()
        next_log, next_evaluation = config.log_every_steps, config.evaluation_every_steps or math.inf
        while self.steps < config.total_steps and self.mean_return() < config.stop_return:
            self._step()
            if self.steps >= next_evaluation:
                next_evaluation += config.evaluation_every_steps
                played = evaluate_policy(config, self.learner.policy, config.evaluation_episodes, self._evaluation_seed)
                self._evaluation = float(np.mean(played))
            if self.steps >= next_log:
                next_log += config.log_every_steps
                yield self._report()
        if self._last is not None and self._last.steps < self.steps:
            yield self._report()

    def result(self) -> Result:
        """Return what the run has come to so far."""
        frames = self.steps * self.lanes.frames_per_step
        return Result(self.returns, self.steps, frames, self.learner.updates, self._seconds, self.logdir)

    def mean_return(self) -> float:
        """Mean of the last `mean_episodes` returns; minus infinity until there are that many."""
        if len(self._recent) < self.config.mean_episodes:
            return -math.inf
        return float(np.mean([episode.total for episode in self._recent]))

    def epsilon(self) -> float:
        """Probability of a random action now."""
        config = self.config
        return linear(self.steps, config.epsilon_start, config.epsilon_end, config.epsilon_decay_steps)

    def learning_rate(self) -> float:
        """The optimizer's step size now."""
        config = self.config
        if not config.learning_rate_decay_steps:
            return config.learning_rate
        return linear(self.steps, config.learning_rate, config.learning_rate_end, config.learning_rate_decay_steps)

    def updates_due(self) -> int:
        """How many updates the steps so far call for: counted, so that no rounding adds up."""
        learned = self.steps - self.config.learning_starts_steps
        return max(0, math.floor(learned / self.config.steps_per_update))

    def _step(self) -> None:
        """One step of every lane, and the updates that are due, while the emulators run."""
        action = self.learner.policy.act(self.replay.latest(), self.epsilon(), self._generator)
        self.lanes.send(action)
        self.learner.learning_rate = self.learning_rate()
        while self.learner.updates < self.updates_due() and len(self.replay):
            self.learner.update(self.replay.sample(self.config.batch_size, self._batch))
        slot = self.replay.next_slot()
        step = self.lanes.recv(slot)
        self.replay.append(slot, action, step.reward, step.terminated, step.truncated, step.first)
        self.steps += int(np.count_nonzero(~step.first))
        for episode in step.episodes:
            self.returns.append(episode.total)
            self._recent.append(episode)
            self._log.episode(len(self.returns), self.steps, episode.lane, episode.total, episode.steps)
        if step.episodes and self.mean_return() > self._best:
            self._best = self.mean_return()
            self._save(BEST_WEIGHTS)

    def _save(self, name: Path) -> None:
        metadata = {"steps": self.steps, "updates": self.learner.updates, "mean_return": self._mean_of_recent()}
        save_weights(self.logdir / name, self.learner.online.state_dict(), metadata)

    def _mean_of_recent(self) -> float | None:
        return float(np.mean([episode.total for episode in self._recent])) if self._recent else None

    def _report(self) -> Report:
        before = self._last
        self._seconds = time.perf_counter() - self._started
        metrics = self.learner.metrics() if self.learner.updates else (math.nan,) * 3
        mean = self._mean_of_recent()
        frames = self.steps * self.lanes.frames_per_step
        elapsed = self._seconds - before.seconds if before else math.nan
        report = Report(
            seconds=self._seconds,
            steps=self.steps,
            frames=frames,
            updates=self.learner.updates,
            episodes=len(self.returns),
            epsilon=self.epsilon(),
            mean_return=math.nan if mean is None else mean,
            last_return=self.returns[-1] if self.returns else math.nan,
            mean_length_steps=float(np.mean([e.steps for e in self._recent])) if self._recent else math.nan,
            loss=metrics[0],
            mean_q=metrics[1],
            grad_norm=metrics[2],
            frames_per_second=(frames - before.frames) / elapsed if before else math.nan,
            updates_per_second=(self.learner.updates - before.updates) / elapsed if before else math.nan,
            evaluation_return=self._evaluation,
        )
        if before is not None:
            self._log.report(report)
        self._last = report
        return report

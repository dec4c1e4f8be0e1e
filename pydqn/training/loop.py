"""The training loop: send - learn - recv, as a generator of reports."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pydqn import _core
from pydqn._util.checks import integer
from pydqn._util.machine import Pace
from pydqn.config import Config
from pydqn.envs.base import Envs, Episode, Step
from pydqn.envs.make import beside_learning, make_envs
from pydqn.envs.tasks import inputs_of
from pydqn.evaluation.build import network_for, replay_settings
from pydqn.evaluation.evaluate import evaluate_policy, evaluation_envs
from pydqn.evaluation.play import start_episodes
from pydqn.learning.learner import Learner, Metrics
from pydqn.learning.policy import Actor, Policy, resolve_device, torch_threads
from pydqn.learning.schedules import Due, epsilon, learning_rate, priority_beta
from pydqn.replay.device import DeviceReplay, resolve_storage
from pydqn.replay.frames import FrameReplay
from pydqn.runs.checkpoint import Checkpoint
from pydqn.runs.layout import VIDEOS, load_run, run_of
from pydqn.runs.locks import FolderLock
from pydqn.runs.logs import Report
from pydqn.runs.result import Learned, Result
from pydqn.runs.resuming import named_way_on, require_unchanged
from pydqn.training.base import BaseRun
from pydqn.training.episode_videos import EpisodeVideos
from pydqn.training.seeds import Seeds
from pydqn.training.signals import deferred
from pydqn.training.tabular import TabularRun


def train(config: Config, logdir: str | os.PathLike[str]) -> Result:
    """Train from scratch; see `BaseRun` for what `logdir` holds afterwards.

    Raises:
        ValueError: the configuration cannot run on this machine, or `logdir` holds a run already.
        Taken: that run is going on (a ValueError that says where).
    """
    return _finish(open_run(config, logdir))


def resume(logdir: str | os.PathLike[str], **overrides: Any) -> Result:
    """Go on with a run from its latest checkpoint, with fields of its `Config` replaced by `overrides`.

    `logdir` may be one of the run's checkpoints, too: then all that came later is dropped, and the run goes on there.

    Raises:
        ValueError: `logdir` is not the folder of a run with a checkpoint, or the overrides do not fit it; or the
            checkpoint is damaged (the message names the file, and the one to resume instead).
    """
    run, checkpoint = run_of(logdir)
    return _finish(open_run(load_run(run, **overrides), run, resume=checkpoint or True))


def open_run(config: Config, logdir: str | os.PathLike[str] | FolderLock, *, resume: bool | Path = False) -> BaseRun:
    """Make the kind of run that `config.agent` says."""
    kind = TabularRun if config.agent == "tabular" else Run
    return kind(config, logdir, resume=resume)


def updates_at_once(config: Config, device: torch.device) -> int:
    """How many updates are drawn, sent and launched together: on a GPU, all that a step of the environments calls for.

    On a CPU that would bring nothing, and prioritized sampling would lag behind by as many.
    """
    return max(1, round(config.num_envs / config.train_period_steps)) if device.type == "cuda" else 1


def _finish(run: BaseRun) -> Result:
    """Run to the end. SIGINT and SIGTERM are taken when everything is saved, as whoever called us takes them."""
    with deferred() as signals, run:
        signals.stop = run.stop
        for _ in run.reports():
            pass
    if signals.came is not None:
        signal.raise_signal(signals.came)
    return run.result()


class Run(BaseRun):
    """One training run of a DQN; its folder gets videos/, too, where the config asks for them.

    A run opens new episodes at each checkpoint that is due, and so whatever is resumed from it is on a CPU the very run
    that would have gone on: the same episodes, the same weights, bit for bit. (A checkpoint that an interruption writes
    was not due.) Episodes that are cut off there are in no mean, so checkpoints should be rare beside episodes. Where
    checkpoints do not hold the replay buffer, episodes go on, and a resumed run fills the memory anew before it learns.
    """

    replay: FrameReplay
    envs: Envs
    _evaluation_envs: Envs | None = None
    _videos: EpisodeVideos | None = None
    _pace: Pace | None = None  # of updates, where they are made before the call returns

    def _open(self, seeds: np.random.SeedSequence) -> None:
        config = self.config
        self._device = resolve_device(config.device)
        _core.keep_freed_memory()  # ALE, too, allocates its frames anew at every step
        self._until_closed.enter_context(torch_threads(config))
        seed = Seeds.of(seeds)
        self._generator = np.random.default_rng(seed.own)
        self._evaluation_seed = seed.evaluation
        self.envs = make_envs(config, config.num_envs, seed.envs, render=config.video_every_episodes > 0)
        self._evaluation_envs = self._make_evaluation_envs()
        settings = replay_settings(config, self.envs)
        nbytes = config.replay_capacity_frames * math.prod(self.envs.frame_shape) * self.envs.dtype.itemsize
        self._storage = resolve_storage(config.storage, self._device, nbytes)
        if self._storage.where == "device":
            self.replay = DeviceReplay(config.replay_capacity_frames, device=self._device, seed=seed.replay, **settings)
        else:
            self.replay = FrameReplay(config.replay_capacity_frames, seed=seed.replay, **settings)
        size, most = config.batch_size, updates_at_once(config, self._device)
        self._batch = self.replay.empty_batch(most * size)
        self._parts = [self._batch.part(i * size, (i + 1) * size) for i in range(most)]
        network = network_for(config, self.envs, seed.network)
        self.learner = Learner(network, self._as_before(config), self._device, self._batch)
        self._actor = Actor(self.learner.policy, self.replay.empty_batch(config.num_envs).obs)
        self._share_frames()
        self._pace = Pace(torch.get_num_threads()) if self._device.type == "cpu" else None
        self._evaluated_at = 0  # steps
        self._learned_from: NDArray[np.int64] | None = None  # indices whose errors have not been looked at yet
        # Updates are counted from the step at which learning began, or began again.
        self._learning_since, self._updates_before = config.learning_starts_steps, 0
        self._age = np.zeros(config.num_envs, np.int64)  # steps since each environment's episode opened
        self._uncut = 0  # the same since all episodes were opened together
        self._ended = np.zeros(config.num_envs, np.bool_)  # which environments have ended an episode since then
        self._videos = (
            EpisodeVideos(self.logdir / VIDEOS, config.video_format, self.envs.fps)
            if config.video_every_episodes
            else None
        )

    def reports(self) -> Iterator[Report]:
        """Run to the end, yielding a report whenever one is due, and at the end."""
        config = self.config
        self._started = time.perf_counter()
        start_episodes(self.envs, self.replay)
        self._report()
        log = Due(config.log_every_steps, self.steps)
        log_episode = Due(config.log_every_episodes, self.episodes)
        evaluation = Due(config.evaluation_every_steps, self._evaluated_at)
        checkpoint = Due(config.checkpoint_every_steps, self.steps)
        checkpoint_episode = Due(config.checkpoint_every_episodes, self.episodes)
        video = Due(config.video_every_episodes, self.episodes - 1)  # the first episode, too
        while not (self._stopping or self._finished()):
            if self._videos is not None and not self._age[0] and video(self.episodes):
                self._videos.start(self.envs.image())
            self.step()
            if evaluation(self.steps):
                self._evaluate()
            # Every one is asked each time: it counts from when it was asked last.
            if any([log(self.steps), log_episode(self.episodes)]):
                yield self._report()
            by_steps, by_episodes = checkpoint(self.steps), checkpoint_episode(self.episodes)
            if (by_steps or by_episodes) and not self._stopping:
                self._checkpoint()
                if config.checkpoint_replay and not self._finished():
                    self._reopen("checkpoint_every_steps" if by_steps else "checkpoint_every_episodes")
        self._settle()
        if self._last is not None and self._last.steps < self.steps:
            yield self._report()

    def updates_due(self) -> int:
        """How many updates the steps so far call for: counted, so that no rounding adds up."""
        learned = self.steps - self._learning_since
        return self._updates_before + max(0, math.floor(learned / self.config.train_period_steps))

    def learned(self) -> Learned:
        """Return what the latest update saw."""
        learner = self.learner
        if not learner.updates:
            return Learned(0, math.nan, math.nan, math.nan, math.nan, {})
        metrics = learner.metrics()
        losses, values = learner.samples()
        samples = {"loss_per_sample": losses, "q_values": values}
        return Learned(learner.updates, metrics.loss, metrics.mean_q, metrics.max_q, metrics.grad_norm, samples)

    @property
    def updates(self) -> int:
        """How many updates have been made."""
        return self.learner.updates

    def weights(self) -> dict[str, torch.Tensor]:
        """Return those of the online network."""
        return dict(self.learner.online.state_dict())

    def arithmetic(self) -> dict[str, str | int]:
        """Return the learner's device, precision and threads."""
        return {
            "device": str(self._device),
            "precision": str(self.learner.policy.dtype).removeprefix("torch."),
            "torch_threads": torch.get_num_threads(),
            "storage": f"{self._storage.where} ({self._storage.why})",
        }

    def close(self) -> None:
        """Release the environments; a video that was being made is dropped."""
        if self._videos is not None:
            self._videos.drop()
        for envs in (getattr(self, "envs", None), self._evaluation_envs):
            if envs is not None:
                envs.close()

    def act(self, epsilon: float) -> NDArray[np.int64]:
        """Return (num_envs,) epsilon-greedy actions for what the environments show now."""
        return Policy.choose(self._actor.values(self.replay.latest()), epsilon, self._generator)

    def step(self) -> None:
        """Take one step in every environment, and make the updates that are due while the emulators run."""
        config = self.config
        action = self.act(epsilon(config, self.steps))
        self.envs.send(action)
        self._learn()
        slot = self.replay.next_slot()
        step = self.envs.recv(slot)
        self._age = np.where(step.first, 0, self._age + 1)
        self._uncut += 1
        reward = self._shaped(step) if config.success_steps else step.reward
        # A frame that opens an episode is part of no transition, and neither are those that are not to be stored.
        first = self._age <= config.skip_first_steps
        self.replay.append(slot, action, reward, step.terminated, step.truncated, first)
        self.steps += int(np.count_nonzero(~step.first))
        self.frames += step.frames
        if self._videos is not None and self._videos.filming:
            # Several frames may open an episode: the video begins with the last of them.
            (self._videos.start if step.first[0] else self._videos.add)(self.envs.image())
        for episode in step.episodes:
            self._ended[episode.env_index] = True
            self._end(episode)
        if step.episodes:
            self._keep_if_best(self.mean_return())
        self._best_weights.write(self.steps)

    def _learn(self) -> None:
        """Make the updates that are due."""
        config, learner = self.config, self.learner
        if len(self.replay) < config.batch_size:
            self._learning_since = max(self._learning_since, self.steps)
        learner.learning_rate = learning_rate(config, self.steps)
        self.replay.beta = priority_beta(config, self.steps)
        while learner.updates < self.updates_due():
            self._settle()
            count = min(len(self._parts), self.updates_due() - learner.updates)
            # Drawn one by one: each has its own shares of the priorities.
            for part in self._parts[:count]:
                self.replay.sample(config.batch_size, part)
            batch = self._batch.part(0, count * config.batch_size)
            started = time.perf_counter()
            learner.update(batch)
            if self._pace is not None and (slow := self._pace.add(time.perf_counter() - started)) is not None:
                warnings.warn(slow, RuntimeWarning, stacklevel=2)
            self._learned_from = batch.index.copy()

    def _settle(self) -> None:
        """Look at the errors of what was learned from last: they have to be finite, and become its priorities.

        Just before the next transitions are drawn, when they first matter: on a GPU the errors have arrived by then.
        """
        if self._learned_from is None:
            return
        errors = self.learner.errors()
        if not np.isfinite(errors).all():
            raise self._diverged(self.learner.diagnosis())
        if self.config.prioritized:
            self.replay.update_priorities(self._learned_from, errors + self.config.priority_epsilon)
        self._learned_from = None

    def _evaluate(self) -> None:
        config, policy, seed = self.config, self.learner.policy, self._evaluation_seed
        played = evaluate_policy(
            config, policy, config.evaluation_episodes, seed, lambda: self._stopping, self._evaluation_envs
        )
        if not self._stopping:
            self._evaluation, self._evaluated_at = float(np.mean(played)), self.steps

    def _as_before(self, config: Config) -> Config:
        """Return `config` with the precision that "auto" has found before on such a device, where a run goes on."""
        before = self._resumed or {}
        if config.precision != "auto" or before.get("device") != self._device.type:
            return config
        return dataclasses.replace(config, precision=before["precision"])

    def _make_evaluation_envs(self) -> Envs | None:
        """Make the environments of all evaluations, now: should no more be possible, that is known before any step."""
        config = self.config
        if not 0 < config.evaluation_every_steps <= config.total_steps:
            return None
        with beside_learning():
            return evaluation_envs(config, config.evaluation_episodes, self._evaluation_seed)

    def _reopen(self, setting: str) -> None:
        """Begin new episodes in all environments, those that a run begins which is resumed from the checkpoint just written.

        No environment's inside can be saved, but so both are the same run. The episodes that are cut off here are
        truncated for the learner, and count for nothing else. `setting` is what made the checkpoint due.
        """
        if not self._ended.all():
            way_on = "raise it, or let episodes go on (checkpoint_replay=False, --no-checkpoint-replay)"
            self._warn_of_cut(self._uncut, way_on, setting)
        self._age[:], self._uncut, self._ended[:] = 0, 0, False
        if self._videos is not None:
            self._videos.drop()
        start_episodes(self.envs, self.replay, Seeds.of(self._seeds(self.steps)).envs)

    def _share_frames(self) -> None:
        frames = self.replay.frames if isinstance(self.replay, DeviceReplay) else None
        self.learner.frames = self._actor.frames = frames

    def _checkpoint(self) -> None:
        self._settle()
        super()._checkpoint()

    def _shaped(self, step: Step) -> NDArray[np.float64]:
        """Return 1 at the end of an episode that was long enough, else 0."""
        reward = np.zeros(self.config.num_envs)
        for episode in step.episodes:
            reward[episode.env_index] = episode.steps >= self.config.success_steps
        return reward

    def _end(self, episode: Episode) -> None:
        super()._end(episode)
        every = self.config.target_update_period_episodes
        if every and self.episodes % every == 0:
            self.learner.update_target()
        if self._videos is not None and episode.env_index == 0:
            self._videos.finish(self.frames, episode.total)

    def _inputs(self) -> str:
        return inputs_of(self.config, self.envs)

    def _tensors(self) -> dict[str, torch.Tensor]:
        return self.learner.state()

    def _state(self) -> dict[str, Any]:
        return {
            **super()._state(),
            "updates": self.learner.updates,
            "generator": self._generator.bit_generator.state,
            "evaluation_seed": self._evaluation_seed,
            "evaluated_at": self._evaluated_at,
            "metrics": list(self.learner.metrics()),
            "device": self._device.type,
            "precision": self.arithmetic()["precision"],
            "learning_since": self._learning_since,
            "updates_before": self._updates_before,
        }

    def _restore(self, checkpoint: Checkpoint) -> None:
        super()._restore(checkpoint)
        state = checkpoint.state
        self._generator.bit_generator.state = state["generator"]
        self._evaluation_seed = integer("evaluation_seed", state["evaluation_seed"], 0)
        self._evaluated_at = integer("evaluated_at", state["evaluated_at"], 0)
        updates = integer("updates", state["updates"], 0)
        self.learner.restore(checkpoint.tensors, updates, Metrics(*map(float, state["metrics"])))
        if checkpoint.replay is None or not self.config.checkpoint_replay:  # the memory must fill again
            self._learning_since = self.steps + self.config.learning_starts_steps
            self._updates_before = updates
            news = "".join(f"{name} was {old}, is {new}; " for name, (old, new) in self._changed.items())
            start = f"the replay buffer starts empty, updates go on at step {self._learning_since:,}"
            warnings.warn(f"{news}{start}", stacklevel=2)
            return
        require_unchanged(state, self._changed)
        self._learning_since = integer("learning_since", state["learning_since"], 0)
        self._updates_before = integer("updates_before", state["updates_before"], 0)
        expected = self.replay.settings
        with named_way_on():
            if isinstance(self.replay, DeviceReplay):
                # The empty frames go before the full ones come: there may not be room for both.
                del self.replay, self.learner.frames, self._actor.frames
                self.replay = DeviceReplay.load(checkpoint.replay, expected, device=self._device)
            else:
                self.replay = FrameReplay.load(checkpoint.replay, expected)
        self._share_frames()

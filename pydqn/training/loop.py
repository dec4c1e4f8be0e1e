"""Training a DQN: the learner updates while the environments step."""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pydqn import _core
from pydqn._util.checks import integer
from pydqn._util.machine import Pace
from pydqn.config import Config
from pydqn.envs.base import Envs, Episode
from pydqn.envs.make import advise_evaluating_after_training, make_envs
from pydqn.envs.rewards import learner_rewards
from pydqn.envs.tasks import inputs_of
from pydqn.evaluation.build import network_for, replay_settings, start_from
from pydqn.evaluation.evaluate import evaluate_policy, evaluation_envs
from pydqn.evaluation.play import start_episodes
from pydqn.learning.learner import Learner
from pydqn.learning.policy import Actor, Policy, resolve_device, set_torch_threads
from pydqn.learning.schedules import Due, epsilons, learning_rate, priority_beta
from pydqn.learning.settings import LearnerSettings
from pydqn.learning.statistics import Statistics
from pydqn.replay.device import DeviceReplay, resolve_storage
from pydqn.replay.frames import FrameReplay
from pydqn.runs.checkpoint import Checkpoint
from pydqn.runs.layout import VIDEOS
from pydqn.runs.logs import Report
from pydqn.runs.resuming import require_unchanged, suggest_empty_replay
from pydqn.training.base import NUMBERS, BaseRun
from pydqn.training.episode_videos import EpisodeVideos
from pydqn.training.seeds import Seeds

_NEAR = 0.05  # of the support's width
_NOISE = "noise"  # the generator's state, among the tensors of a checkpoint
_METRICS = ("loss", "mean_q", "grad_norm", "max_q")  # their order in older checkpoints


def updates_at_once(config: Config, device: torch.device) -> int:
    """Return how many updates are sampled, sent and launched together: on a GPU, all updates of one step.

    On a CPU this would gain nothing, and prioritized sampling would use priorities that are that many updates old.
    """
    return max(1, round(config.num_envs / config.train_period_steps)) if device.type == "cuda" else 1


def _card(device: torch.device) -> str:
    """Return what a choice among forms of the update holds for: another card, or another PyTorch, chooses anew."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}, PyTorch {torch.__version__}"


class Run(BaseRun):
    """One training run of a DQN. With `video_every_episodes`, its folder also gets videos/.

    At each scheduled checkpoint the run starts new episodes in all environments. A run resumed from that checkpoint
    starts the same ones, so on a CPU it is the uninterrupted run, bit for bit. (Checkpoints saved at an interruption
    are not scheduled.) Episodes cut off in this way count in no mean, so checkpoints should be rare compared with
    episodes. Where checkpoints do not hold the replay buffer, episodes continue across them, and a resumed run refills
    its buffer before it learns.
    """

    replay: FrameReplay | DeviceReplay
    envs: Envs
    _evaluation_envs: Envs | None = None
    _videos: EpisodeVideos | None = None
    _pace: Pace | None = None  # of updates, on a CPU
    _support_fits = True  # see `_check_support`
    _restored_statistics: Statistics | None = None  # those of the checkpoint, until the first new update

    def _create(self, seeds: np.random.SeedSequence) -> None:
        config = self.config
        self._device = resolve_device(config.device)
        _core.keep_freed_memory()  # ALE also allocates new frames at every step
        seed = Seeds.of(seeds)
        self._generator = np.random.default_rng(seed.exploration)
        self._evaluation_seed = seed.evaluation
        self.envs = make_envs(config, config.num_envs, seed.envs, render=config.video_every_episodes > 0)
        self._evaluation_envs = self._make_evaluation_envs()
        settings = replay_settings(config, self.envs)
        nbytes = config.replay_capacity_frames * math.prod(self.envs.frame_shape) * self.envs.dtype.itemsize
        self._storage = resolve_storage(config.storage, self._device, nbytes)
        frames = None
        if self._storage.where == "device":
            self.replay = DeviceReplay(config.replay_capacity_frames, device=self._device, seed=seed.replay, **settings)
            frames = self.replay.frames
        else:
            self.replay = FrameReplay(config.replay_capacity_frames, seed=seed.replay, **settings)
        size, most = config.batch_size, updates_at_once(config, self._device)
        self._batch = self.replay.empty_batch(most * size)
        self._parts = [self._batch.part(i * size, (i + 1) * size) for i in range(most)]
        network = network_for(config, self.envs, seed.network, self._network)
        if config.init_weights and self._resumed is None:
            start_from(network, config.init_weights)
        # Not `torch_threads`: if a run is dropped without being closed, the garbage collector would end that generator,
        # and so change the number of threads in the middle of another run.
        self._until_closed.callback(torch.set_num_threads, set_torch_threads(config, network))
        self.learner = Learner(
            network, self._learner_settings(), self._device, self._batch, frames=frames, seed=seed.learner
        )
        example = self.replay.empty_batch(config.num_envs).obs
        self._choice = self.learner.choice
        self._actor = Actor(self.learner.policy, example, frames, seed=seed.noise, form=config.update)
        self._pace = Pace(torch.get_num_threads()) if self._device.type == "cpu" else None
        self._evaluated_at = 0  # steps
        self._unchecked: NDArray[np.int64] | None = None  # transitions of the latest updates: see `_take_td_errors`
        self._learning_since, self._updates_before = config.learning_starts_steps, 0
        self._age = np.zeros(config.num_envs, np.int64)  # steps since each environment's episode started
        self._steps_since_restart = 0  # since all episodes were started together
        self._ended = np.zeros(config.num_envs, np.bool_)  # which environments have ended an episode since then
        self._videos = (
            EpisodeVideos(self.logdir / VIDEOS, config.video_format, self.envs.fps)
            if config.video_every_episodes
            else None
        )

    def reports(self) -> Iterator[Report]:
        """Run to the end, yielding a report at each logging period, and at the end."""
        config = self.config
        self._started = time.perf_counter()
        start_episodes(self.envs, self.replay)
        self._report()
        log = Due(config.log_every_steps, self.steps)
        log_episode = Due(config.log_every_episodes, self.episodes)
        evaluation = Due(config.evaluation_every_steps, self._evaluated_at)
        checkpoint = Due(config.checkpoint_every_steps, self.steps)
        checkpoint_episode = Due(config.checkpoint_every_episodes, self.episodes)
        video = Due(config.video_every_episodes, self.episodes - 1)  # also records the first episode
        while not (self._stopping or self._finished()):
            if self._videos is not None and not self._age[0] and video(self.episodes):
                self._videos.start(self.envs.image())
            self.step()
            if evaluation(self.steps):
                self._evaluate()
            # No short circuit: each schedule must be asked at every step.
            if any([log(self.steps), log_episode(self.episodes)]):
                yield self._report()
            by_steps, by_episodes = checkpoint(self.steps), checkpoint_episode(self.episodes)
            if (by_steps or by_episodes) and not self._stopping:
                self._checkpoint()
                if config.checkpoint_replay and not self._finished():
                    self._restart_episodes("checkpoint_every_steps" if by_steps else "checkpoint_every_episodes")
        self._take_td_errors()
        if self._last is not None and self._last.steps < self.steps:
            yield self._report()

    def required_updates(self) -> int:
        """Return how many updates the steps so far require. Counted from one step, so that rounding does not add up."""
        steps, at_once = self.steps - self._learning_since, self.config.updates_in_a_row
        due = max(0, math.floor(steps / self.config.train_period_steps))
        return self._updates_before + due // at_once * at_once

    def count_updates_from(self, steps: int) -> None:
        """Require no further update until the run has made `steps` steps, and from then on one per training period."""
        self._learning_since, self._updates_before = steps, self.learner.updates

    def statistics(self) -> Statistics:
        """Return the statistics of the latest update, also where that was made before the run was resumed."""
        return self.learner.statistics() if self._restored_statistics is None else self._restored_statistics

    @property
    def updates(self) -> int:
        """How many updates have been made."""
        return self.learner.updates

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the weights of the online network."""
        return dict(self.learner.online.state_dict())

    def arithmetic(self) -> dict[str, str | int]:
        """Return the learner's device, precision and threads, and where frames are stored."""
        workers = {"env_workers": self.envs.stepping} if self.envs.stepping else {}
        form = self.learner.choice or self.learner.form
        return {
            "device": str(self._device),
            "precision": str(self.learner.policy.dtype).removeprefix("torch."),
            "torch_threads": torch.get_num_threads(),
            **({"update": form} if form != "plain" else {}),
            "storage": f"{self._storage.where} ({self._storage.why})",
            **workers,
        }

    def task(self) -> dict[str, str]:
        """Return a description of the environment as the run uses it."""
        actions = self.envs.actions_described
        return {**super().task(), **({"actions": actions} if actions else {})}

    def close(self) -> None:
        """Release the environments, and drop an unfinished video."""
        if self._videos is not None:
            self._videos.drop()
        for envs in (getattr(self, "envs", None), self._evaluation_envs):
            if envs is not None:
                envs.close()

    def act(self, epsilon: float | NDArray[np.float64]) -> NDArray[np.int64]:
        """Return (num_envs,) actions for the current observations, random with probability `epsilon`."""
        values = self._actor.values(self.replay.latest())
        return Policy.choose(values, epsilon, self._generator, self.config.boltzmann_temperature)

    def step(self) -> None:
        """Take one step in every environment, and make the required updates while the emulators run."""
        config = self.config
        action = self.act(epsilons(config, self.steps))
        self.envs.send(action)
        self._learn()
        slot = self.replay.next_slot()
        step = self.envs.recv(slot)
        self._age = np.where(step.first, 0, self._age + 1)
        self._steps_since_restart += 1
        # The first frame of an episode is part of no transition; nor are those of the steps that are to be skipped.
        first = self._age <= config.skip_first_steps
        self.replay.append(slot, action, learner_rewards(config, step), step.terminated, step.truncated, first)
        self.steps += int(np.count_nonzero(~step.first))
        self.frames += step.frames
        if self._videos is not None and self._videos.recording:
            # Several frames may be marked `first`: the video begins with the last of them.
            (self._videos.start if step.first[0] else self._videos.add)(self.envs.image())
        for episode in step.episodes:
            self._ended[episode.env_index] = True
            self._record_episode(episode)
        if step.episodes:
            self._keep_if_best(self.mean_return())
        self._best_weights.write(self.steps)

    def _learn(self) -> None:
        """Make the required updates."""
        config, learner = self.config, self.learner
        if len(self.replay) < config.batch_size:
            self._learning_since = max(self._learning_since, self.steps)
        learner.learning_rate = learning_rate(config, self.steps)
        self.replay.beta = priority_beta(config, self.steps)
        while (missing := self.required_updates() - learner.updates) > 0:
            self._take_td_errors()
            count = min(len(self._parts), missing)
            # Sampled one by one: prioritized sampling stratifies each batch.
            for part in self._parts[:count]:
                self.replay.sample(config.batch_size, part)
            batch = self._batch.part(0, count * config.batch_size)
            started = time.perf_counter()
            learner.update(batch)
            if self._pace is not None and (slow := self._pace.add(time.perf_counter() - started)) is not None:
                warnings.warn(slow, RuntimeWarning, stacklevel=2)
            self._unchecked = batch.index.copy()
            self._restored_statistics = None
            if learner.choice != self._choice:
                self._keep_choice()

    def _keep_choice(self) -> None:
        """Write down which form of the update was chosen, and say so."""
        self._choice = self.learner.choice
        self._write_environment()
        if self.note is not None:
            self.note(f"update {self._choice}")

    def _take_td_errors(self) -> None:
        """Check that the TD errors of the latest updates are finite, and make them the transitions' priorities.

        Called just before the next batch is sampled, when they are first needed: by then a GPU has sent them.
        """
        if self._unchecked is None:
            return
        errors = self.learner.td_errors()
        if not np.isfinite(errors).all():
            raise self._diverged(self.learner.diagnosis())
        if self.config.prioritized:
            self.replay.update_priorities(self._unchecked, errors + self.config.priority_epsilon)
        self._unchecked = None

    def _evaluate(self) -> None:
        config, policy, seed = self.config, self.learner.policy, self._evaluation_seed
        returns = evaluate_policy(
            config, policy, config.evaluation_episodes, seed, lambda: self._stopping, self._evaluation_envs
        )
        if not self._stopping:
            self._evaluation, self._evaluated_at = float(np.mean(returns)), self.steps

    def _report(self) -> Report:
        report = super()._report()
        if self._support_fits:
            self._check_support(report)
        return report

    def _check_support(self, report: Report) -> None:
        """Warn, once, if action values come so near to an end of their support that returns are cut off there."""
        low, high = self.config.value_min, self.config.value_max
        margin = max(_NEAR, 1 / self.config.num_atoms) * (high - low)
        for name, end, value, near in (
            ("value_max", high, report.max_q, report.max_q > high - margin),
            ("value_min", low, report.mean_q, report.mean_q < low + margin),
        ):
            if near and self.config.value in ("categorical", "hl_gauss"):
                self._support_fits = False
                extreme = "largest" if name == "value_max" else "mean"
                warnings.warn(
                    f"{name}: the {extreme} action value is {value:.3g}, close to {end:g}, beyond which no return can "
                    f"be represented; start anew with a {name} that fits the returns of this task",
                    RuntimeWarning,
                    stacklevel=3,
                )

    def _learner_settings(self) -> LearnerSettings:
        """Return the learner's settings. A resumed run keeps the precision that "auto" chose on this kind of device.

        On a GPU that is always float32, and "auto" says that its products may be rounded.
        """
        settings, before = LearnerSettings.from_config(self.config), self._resumed or {}
        if settings.precision != "auto" or before.get("device") != self._device.type or self._device.type == "cuda":
            return settings
        return dataclasses.replace(settings, precision=before["precision"])

    def _make_evaluation_envs(self) -> Envs | None:
        """Make the environments of all evaluations at the start, so that a failure shows before the first step."""
        config = self.config
        if not 0 < config.evaluation_every_steps <= config.total_steps:
            return None
        with advise_evaluating_after_training():
            return evaluation_envs(config, config.evaluation_episodes, self._evaluation_seed)

    def _restart_episodes(self, setting: str) -> None:
        """Start new episodes in all environments, the same as a run resumed from the checkpoint just written.

        The state of an environment cannot be saved; this makes both the same run. The episodes that are cut off are
        truncated for the learner and recorded nowhere. `setting` is the one that scheduled the checkpoint.
        """
        if not self._ended.all():
            advice = "raise it, or let episodes continue (checkpoint_replay=False, --no-checkpoint-replay)"
            self._warn_of_cut_episode(self._steps_since_restart, advice, setting)
        self._age[:], self._steps_since_restart, self._ended[:] = 0, 0, False
        if self._videos is not None:
            self._videos.drop()
        start_episodes(self.envs, self.replay, Seeds.of(self._seeds(self.steps)).envs)

    def _checkpoint(self) -> None:
        self._take_td_errors()
        super()._checkpoint()

    def _record_episode(self, episode: Episode) -> None:
        super()._record_episode(episode)
        period = self.config.target_update_period_episodes
        if period and self.episodes % period == 0:
            self.learner.update_target()
        if self._videos is not None and episode.env_index == 0:
            self._videos.finish(self.frames, episode.total)

    def _inputs(self) -> str:
        return inputs_of(self.config, self.envs)

    def _tensors(self) -> dict[str, torch.Tensor]:
        noise = self._actor.state()
        return self.learner.state_dict() | ({} if noise is None else {_NOISE: noise})

    def _state(self) -> dict[str, Any]:
        statistics = self.statistics()
        return {
            **super()._state(),
            "updates": self.learner.updates,
            "generator": self._generator.bit_generator.state,
            "evaluation_seed": self._evaluation_seed,
            "evaluated_at": self._evaluated_at,
            "statistics": {name: getattr(statistics, name) for name in NUMBERS},
            "device": self._device.type,
            "precision": self.arithmetic()["precision"],
            "update": [self.learner.form, self.learner.choice, _card(self._device)] if self.learner.choice else None,
            "learning_since": self._learning_since,
            "updates_before": self._updates_before,
        }

    def _restore(self, checkpoint: Checkpoint) -> None:
        super()._restore(checkpoint)
        state = checkpoint.state
        self._generator.bit_generator.state = state["generator"]
        self._evaluation_seed = integer("evaluation_seed", state["evaluation_seed"], 0)
        self._evaluated_at = integer("evaluated_at", state["evaluated_at"], 0)
        # In older checkpoints, the number of updates is not among the tensors, and the statistics are a list.
        updates = torch.tensor(integer("updates", state["updates"], 0))
        tensors = {"updates": updates, **checkpoint.tensors}
        self._actor.load_state(tensors.pop(_NOISE, None))
        self.learner.load_state_dict(tensors)
        name, choice, card = state.get("update") or ("", "", "")
        if card == _card(self._device):
            self.learner.use_form(name, choice)
            self._choice = self.learner.choice
        numbers = state["statistics"] if "statistics" in state else dict(zip(_METRICS, state["metrics"], strict=True))
        loss, mean_q, max_q, grad_norm = (float(numbers[name]) for name in NUMBERS)
        self._restored_statistics = Statistics(loss, mean_q, max_q, grad_norm, {})
        if checkpoint.replay is None or not self.config.checkpoint_replay:  # the buffer has to be filled again
            self.count_updates_from(self.steps + self.config.learning_starts_steps)
            changed = "".join(f"{name} was {old}, is {new}; " for name, (old, new) in self._changed.items())
            start = f"the replay buffer starts empty, updates resume at step {self._learning_since:,}"
            warnings.warn(f"{changed}{start}", stacklevel=2)
            return
        require_unchanged(state, self._changed)
        self._learning_since = integer("learning_since", state["learning_since"], 0)
        self._updates_before = integer("updates_before", state["updates_before"], 0)
        with suggest_empty_replay():
            self.replay.restore(checkpoint.replay)

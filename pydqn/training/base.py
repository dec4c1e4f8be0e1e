"""The base class of training runs: their folder, logs, checkpoints and end."""

from __future__ import annotations

import math
import os
import time
import warnings
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import torch

from pydqn._util.checks import integer
from pydqn._util.files import Damaged, write_json
from pydqn._util.weights import save_weights
from pydqn.config import Config
from pydqn.envs.base import Episode
from pydqn.envs.ids import package_of, registered_by
from pydqn.envs.tasks import described, resolved
from pydqn.evaluation.build import MakeNetwork, with_network
from pydqn.learning.schedules import epsilon
from pydqn.learning.statistics import Statistics
from pydqn.replay.device import DeviceReplay
from pydqn.replay.frames import FrameReplay
from pydqn.runs.best_weights import BestWeights
from pydqn.runs.checkpoint import Checkpoint, discard_after, latest_checkpoint, load_checkpoint, save_checkpoint
from pydqn.runs.layout import BEST_WEIGHTS, CHECKPOINTS, CONFIG, ENVIRONMENT, EPISODES, LAST_WEIGHTS, PROGRESS, load_run
from pydqn.runs.locks import FolderLock
from pydqn.runs.logs import Report, RunLog, read_returns
from pydqn.runs.provenance import Process, provenance
from pydqn.runs.result import Diverged, Result
from pydqn.runs.resuming import advice_for_damaged, changes, transition_settings, warn_of_renamed
from pydqn.runs.stopping import Progress, end_reason

Self = TypeVar("Self", bound="BaseRun")
_ENVIRONMENT = ("env_id", "env_kwargs")  # the settings that say which environment it is
NUMBERS = Statistics._fields[:-1]  # of an update's statistics: all but the samples, which no checkpoint holds


class BaseRun:
    """One training run. A context manager: when its block ends, for whatever reason, everything is saved and closed.

    Two exceptions: of a run that diverged only the earlier best weights are saved; after a KeyboardInterrupt, which
    may come in the middle of a step, nothing is. (`stop` ends a run after the current step.) Where an error ends a run
    and not everything can be saved, the failure to save is a warning and the first error is raised.

    `logdir` gets config.json, environment.json (versions, machine, precision and threads), progress.csv, episodes.csv,
    TensorBoard events, checkpoints/ and weights/: best.safetensors, when the mean return has improved, and, at the end,
    last.safetensors. The best weights are written at most once per `log_every_steps`, before each checkpoint and at the
    end, so a kill loses at most those of that many steps.

    Args:
        config: what to run.
        logdir: folder of the run, made if it is not there; or a lock on it. No other run can write there until this one
            is closed.
        resume: resume from the folder's latest checkpoint, or from this one; later ones are then removed.
        network: see `pydqn.train`.

    Raises:
        ValueError: the configuration cannot run on this machine; or `logdir` already holds a run, or (to resume) none,
            or a damaged one (the message names the file, and the checkpoint that is whole); or another run is writing
            there (`pydqn.runs.locks.FolderInUse`).
    """

    replay: FrameReplay | DeviceReplay | None = None  # saved in checkpoints if `checkpoint_replay`
    saving: Callable[[float], None] | None = None  # called with the share done while a replay buffer is saved
    note: Callable[[str], None] | None = None  # called with a line for a person, of what the run has decided

    def __init__(
        self,
        config: Config,
        logdir: str | os.PathLike[str] | FolderLock,
        *,
        resume: bool | Path = False,
        network: MakeNetwork | None = None,
    ) -> None:
        self._folder_lock = logdir if isinstance(logdir, FolderLock) else FolderLock(logdir)
        with ExitStack() as refused:  # a kept exception keeps this object, which would keep the folder locked
            refused.callback(self._folder_lock.release)
            self.config = config = with_network(resolved(config), network)
            refused.pop_all()
        self._network = network
        self.logdir = self._folder_lock.folder
        self.steps = self.frames = 0
        self.episodes = 0  # that have ended
        self.returns = array("d")  # of these episodes
        self._recent: deque[Episode] = deque(maxlen=config.mean_episodes)
        self._successes = 0  # in a row
        self._best = -math.inf  # mean return of the best weights since the run began or was resumed
        self._best_weights = BestWeights(self.logdir / BEST_WEIGHTS, config.log_every_steps, self._finite)
        self._evaluation = math.nan
        self._started = self._seconds = self._seconds_before = 0.0
        self._last: Report | None = None
        self._saved_at = -1
        self._stopping = False
        self._resumed: dict[str, Any] | None = None  # state of the checkpoint that the run was resumed from
        self._changed: dict[str, tuple[Any, Any]] = {}  # settings of transitions that differ from the checkpoint's
        self._process = Process()
        self._log: RunLog | None = None
        self._until_closed = ExitStack()  # undoes what a run changes in its process
        with ExitStack() as failed:
            failed.callback(self._release)
            self._set_up(self._checkpoint_to_resume(resume))
            failed.pop_all()

    def _checkpoint_to_resume(self, resume: bool | Path) -> Path | None:
        """Return the checkpoint to resume from; None for a new run, whose folder may not hold a run yet."""
        latest = latest_checkpoint(self.logdir)
        if resume:
            path = latest if resume is True else resume
            if path is None:
                raise ValueError(f"run: {str(self.logdir)!r} has no checkpoint to resume from; train anew elsewhere")
            return path
        if any((self.logdir / name).exists() for name in (CONFIG, PROGRESS, CHECKPOINTS, BEST_WEIGHTS.parent)):
            advice = "resume it" if latest else "remove it: it has no checkpoint"
            raise ValueError(f"logdir: {str(self.logdir)!r} holds a run already; choose another folder, or {advice}")
        return None

    def _set_up(self, checkpoint: Path | None) -> None:
        """Create everything, restore it from the checkpoint if there is one, and then write to the folder."""
        config = self.config
        if checkpoint is None:
            self._create(self._seeds(0))
        else:
            try:
                self._resume(checkpoint)
            except Damaged as error:
                raise Damaged(f"{error}; {advice_for_damaged(checkpoint)}") from None
            # Before the logs are cut: a later checkpoint would count rows that are then missing.
            discard_after(checkpoint)
            warn_of_renamed(self.logdir / CONFIG)
        write_json(self.logdir / CONFIG, config.to_dict())
        if checkpoint is not None:  # keeps better weights from after an older checkpoint
            self._best_weights.resume(self._is_of_same_env)
        for folder in (BEST_WEIGHTS.parent, CHECKPOINTS):
            (self.logdir / folder).mkdir(exist_ok=True)
        self._write_environment()
        self._log = RunLog(self.logdir, self.steps, self.episodes)
        if checkpoint is None:
            self._checkpoint()  # so that there always is one to resume from

    def _write_environment(self) -> None:
        """Write environment.json: versions, machine, arithmetic, and the environment as the run uses it."""
        module = registered_by(self.config.env_id)
        hint = {} if module is None else {"registered_by": module}
        versions = provenance(package_of(self.config.env_id))
        write_json(self.logdir / ENVIRONMENT, {**versions, **self.arithmetic(), **self.task(), **hint})

    # --- what subclasses define ---

    def reports(self) -> Iterator[Report]:
        """Run to the end, yielding a report at each logging period, and at the end."""
        raise NotImplementedError

    def statistics(self) -> Statistics:
        """Return statistics of the latest update."""
        raise NotImplementedError

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the weights of the policy."""
        raise NotImplementedError

    @property
    def updates(self) -> int:
        """How many updates have been made."""
        raise NotImplementedError

    def arithmetic(self) -> dict[str, str | int]:
        """Return the settings of computation that the machine decides."""
        return {"device": "cpu"}

    def task(self) -> dict[str, str]:
        """Return a description of the environment as the run uses it."""
        return described(self.config, self._inputs())

    def _inputs(self) -> str:
        """Describe how observations are used."""
        raise NotImplementedError

    def close(self) -> None:
        """Release what the run holds, even if it was only partly created."""

    def _seeds(self, steps: int) -> np.random.SeedSequence:
        """Return the seeds of episodes that start after so many steps."""
        return np.random.SeedSequence([self.config.seed, steps] if steps else [self.config.seed])

    def _create(self, seeds: np.random.SeedSequence) -> None:
        """Make the environments and the learner."""
        raise NotImplementedError

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors of a checkpoint."""
        raise NotImplementedError

    def _state(self) -> dict[str, Any]:
        """Return the JSON of a checkpoint: everything but tensors and the replay buffer."""
        return {
            "finished": self._finished(),
            "steps": self.steps,
            "frames": self.frames,
            "seconds": self._clock(),
            "episodes": self.episodes,  # their returns are in episodes.csv: there may be millions
            "recent": list(self._recent),
            "successes": self._successes,
            "best": None if self._best == -math.inf else self._best,
            "evaluation": None if math.isnan(self._evaluation) else self._evaluation,
            "transitions": transition_settings(self.config),
        }

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Take over what `_state` and `_tensors` returned, and the replay buffer."""
        state = checkpoint.state
        self.steps, self.frames = integer("steps", state["steps"], 0), integer("frames", state["frames"], 0)
        self._seconds_before = float(state["seconds"])
        if "returns" in state:  # an older checkpoint
            self.returns = array("d", map(float, state["returns"]))
            self.episodes = len(self.returns)
        else:
            self.episodes = integer("episodes", state["episodes"], 0)
            self.returns = read_returns(self.logdir, self.episodes)
            if missing := self.episodes - len(self.returns):
                lost = f"{self.logdir / EPISODES} lacks {missing:,} of the {self.episodes:,} episodes so far"
                warnings.warn(lost, stacklevel=2)
        self._recent.extend(Episode(int(env), float(total), int(steps)) for env, total, steps in state["recent"])
        self._successes = integer("successes", state["successes"], 0)
        best = state.get("best_test", state["best"])  # "best_test" in older checkpoints of tables
        self._best = -math.inf if best is None else float(best)
        self._evaluation = math.nan if state["evaluation"] is None else float(state["evaluation"])
        self._saved_at = self.steps
        before = state.get("transitions")
        if before is None:  # an older checkpoint
            before = transition_settings(resolved(load_run(self.logdir)))
        self._changed = changes(before, self.config)

    # --- what all runs share ---

    def _resume(self, path: Path) -> None:
        """Create everything, and restore it from a checkpoint."""
        checkpoint = load_checkpoint(path)
        self._resumed = checkpoint.state
        try:
            self._create(self._seeds(integer("steps", checkpoint.state["steps"], 0)))
            self._restore(checkpoint)
        except (KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
            raise Damaged(f"{path}: is not the state of a run ({error!r})") from None
        if self._changed.keys() & set(_ENVIRONMENT):  # returns of different environments do not compare
            self._recent.clear()
            self._successes, self._best, self._evaluation = 0, -math.inf, math.nan

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with ExitStack() as last:
                last.callback(self._release)
                if not isinstance(error, KeyboardInterrupt):
                    self._save(diverged=isinstance(error, Diverged))
        except Exception as second:  # must not hide the first error
            if error is None:
                raise
            warnings.warn(f"not everything could be saved: {second}", stacklevel=2)

    def _save(self, *, diverged: bool) -> None:
        """Save weights and a checkpoint at the end; if the run has diverged, only the earlier best weights."""
        if diverged:
            with suppress(Diverged):  # the best weights may also have diverged
                self._best_weights.write()
            return
        self._best_weights.write()
        save_weights(self.logdir / LAST_WEIGHTS, self._finite(self.weights()), self._metadata())
        if self._last is not None:
            if self._last.steps < self.steps:
                self._report()  # the row that an interruption would have cost
            self._checkpoint()

    def _release(self) -> None:
        with ExitStack() as last:
            last.callback(self._folder_lock.release)
            last.callback(self._until_closed.close)
            last.callback(self.close)
            if self._log is not None:
                last.callback(self._log.close)

    def stop(self) -> None:
        """End the run after the current step. May be called by a signal handler, or from another thread."""
        self._stopping = True

    @property
    def stopped(self) -> bool:
        """Whether the run was stopped before its end."""
        return self._stopping and not self._finished()

    def result(self) -> Result:
        """Return the result so far."""
        reason = self._end_reason() or ("interrupted" if self._stopping else "not over")
        return Result(list(self.returns), self.steps, self.frames, self.updates, self._seconds, self.logdir, reason)

    def mean_return(self) -> float:
        """Mean of the last `mean_episodes` returns; minus infinity until there are that many."""
        if len(self._recent) < self.config.mean_episodes:
            return -math.inf
        return float(np.mean([episode.total for episode in self._recent]))

    def _finished(self) -> bool:
        return self._end_reason() is not None

    def _end_reason(self) -> str | None:
        evaluation, mean = self._evaluation, self.mean_return()
        progress = Progress(self.steps, self.episodes, self.updates, self._successes, mean, evaluation)
        return end_reason(self.config, progress)

    def _warn_of_cut_episode(self, steps: int, advice: str, setting: str = "checkpoint_every_steps") -> None:
        """Warn that a checkpoint cut off an episode that was as long as the period between checkpoints, `steps`."""
        warnings.warn(
            f"{setting}: an episode of {self.config.env_id} had lasted for all {steps:,} steps between two "
            f"checkpoints when the second cut it off, so episodes of that length never end; {advice}",
            stacklevel=2,
        )

    def _clock(self) -> float:
        """Return the seconds that the run has taken, including those before it was resumed."""
        return self._seconds_before + (time.perf_counter() - self._started if self._started else 0.0)

    def _record_episode(self, episode: Episode) -> None:
        """Count and log an episode that has ended."""
        assert self._log is not None
        self.episodes += 1
        self.returns.append(episode.total)
        self._recent.append(episode)
        self._successes = self._successes + 1 if episode.steps >= self.config.success_steps else 0
        self._log.episode(self.episodes, self.steps, *episode, epsilon(self.config, self.steps))

    def _metadata(self) -> dict[str, Any]:
        """Return the metadata in files of weights."""
        mean = float(np.mean([episode.total for episode in self._recent])) if self._recent else None
        environment = {name: getattr(self.config, name) for name in _ENVIRONMENT}
        return {**environment, "steps": self.steps, "updates": self.updates, "mean_return": mean}

    def _keep_if_best(self, value: float) -> None:
        """Keep the current weights if `value` is larger than all values before."""
        if value > self._best:
            self._best = value
            self._best_weights.keep(self.weights(), {**self._metadata(), "best": value})

    def _is_of_same_env(self, metadata: dict[str, Any]) -> bool:
        """Whether weights with this metadata were trained in the run's environment."""
        before = {name: self._changed.get(name, (getattr(self.config, name),))[0] for name in _ENVIRONMENT}
        return not changes({name: str(metadata.get(name, before[name])) for name in before}, self.config, _ENVIRONMENT)

    def _checkpoint(self) -> None:
        if self._saved_at == self.steps:
            return
        self._best_weights.write()
        if self._log is not None:
            self._log.sync()
        replay = self.replay if self.config.checkpoint_replay else None
        save_replay = None if replay is None else lambda path: replay.save(path, self.saving)
        save_checkpoint(self.logdir, self.steps, self._finite(self._tensors()), self._state(), save_replay)
        self._saved_at = self.steps

    def _finite(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the tensors if all their numbers are finite; else raise `Diverged`."""
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise self._diverged(f"{name} holds a number that is not finite")
        return tensors

    def _diverged(self, what: str) -> Diverged:
        path = latest_checkpoint(self.logdir)
        good = f"the last good checkpoint is {path}" if path else "there is no checkpoint yet"
        return Diverged(f"diverged at step {self.steps:,}: {what}; {good}")

    def _report(self) -> Report:
        assert self._log is not None
        before, statistics = self._last, self.statistics()
        self._seconds = self._clock()
        elapsed = self._seconds - before.seconds if before else math.nan
        totals, lengths = [episode.total for episode in self._recent], [episode.steps for episode in self._recent]
        report = Report(
            seconds=self._seconds,
            steps=self.steps,
            frames=self.frames,
            updates=self.updates,
            episodes=self.episodes,
            epsilon=epsilon(self.config, self.steps),
            mean_return=float(np.mean(totals)) if totals else math.nan,
            last_return=totals[-1] if totals else math.nan,
            mean_length_steps=float(np.mean(lengths)) if lengths else math.nan,
            last_length_steps=lengths[-1] if lengths else math.nan,
            **{name: getattr(statistics, name) for name in NUMBERS},
            frames_per_second=(self.frames - before.frames) / elapsed if before else math.nan,
            updates_per_second=(self.updates - before.updates) / elapsed if before else math.nan,
            evaluation_return=self._evaluation,
            **self._process.read(),
        )
        if before is not None:
            self._log.report(report, statistics)
        self._last = report
        return report

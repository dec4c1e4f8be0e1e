"""What every run does, whatever learns: its folder, its logs, its checkpoints, its end."""

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
from pydqn.envs.tasks import described, resolved
from pydqn.learning.schedules import epsilon
from pydqn.replay.frames import FrameReplay
from pydqn.runs.best_weights import BestWeights
from pydqn.runs.checkpoint import Checkpoint, discard_after, latest_checkpoint, load_checkpoint, save_checkpoint
from pydqn.runs.layout import BEST_WEIGHTS, CHECKPOINTS, CONFIG, ENVIRONMENT, EPISODES, LAST_WEIGHTS, PROGRESS, load_run
from pydqn.runs.locks import FolderLock
from pydqn.runs.logs import Report, RunLog, read_returns
from pydqn.runs.provenance import Process, provenance
from pydqn.runs.result import Diverged, Learned, Result
from pydqn.runs.resuming import changes, instead_of, transition_settings
from pydqn.runs.stopping import Standing, ending

Self = TypeVar("Self", bound="BaseRun")


class BaseRun:
    """One training run; a context manager that leaves everything saved and closed, however the run ends.

    (But for one that diverged, of which only the best weights from before are saved, or that a KeyboardInterrupt broke
    off in the middle of a step: then what was saved before is left alone. `stop` ends a run after its step.) Where an
    error ends a run and not everything can be saved, that is a warning, and the error comes through.

    `logdir` gets config.json, environment.json (versions, machine, precision and threads), progress.csv, episodes.csv,
    TensorBoard events, checkpoints/ and weights/: best.safetensors, when the mean return has improved, and, at the end,
    last.safetensors. The best weights are on the disk when a run has ended and before each checkpoint; in between they
    are written no more often than every `log_every_steps`, so a kill costs those of so many steps at most.

    Args:
        config: what to run.
        logdir: folder of the run, made if it is not there; or a claim on it. Until this run is closed, no other can
            write there.
        resume: go on from the folder's latest checkpoint, or from this one; later ones are removed then.

    Raises:
        ValueError: the configuration cannot run on this machine, or `logdir` holds a run already (or, to resume, none,
            or a damaged one: the message names the file, and the checkpoint that is whole), or one that is going on
            (`pydqn.runs.locks.FolderInUse`).
    """

    replay: FrameReplay | None = None  # goes into checkpoints, where the config says so
    saving: Callable[[float], None] | None = None  # told, while a memory is saved, which share of it is done

    def __init__(
        self, config: Config, logdir: str | os.PathLike[str] | FolderLock, *, resume: bool | Path = False
    ) -> None:
        self._folder_lock = logdir if isinstance(logdir, FolderLock) else FolderLock(logdir)
        with ExitStack() as refused:  # while the error is referred to, so are we, and with us the claim
            refused.callback(self._folder_lock.release)
            self.config = config = resolved(config)
            refused.pop_all()
        self.logdir = self._folder_lock.folder
        self.steps = self.frames = 0
        self.episodes = 0  # whole ones
        self.returns = array("d")  # theirs
        self._recent: deque[Episode] = deque(maxlen=config.mean_episodes)
        self._successes = 0  # in a row
        self._best = -math.inf  # what this course's best weights came to
        self._best_weights = BestWeights(self.logdir / BEST_WEIGHTS, config.log_every_steps, self._finite)
        self._evaluation = math.nan
        self._started = self._seconds = self._seconds_before = 0.0
        self._last: Report | None = None
        self._saved_at = -1
        self._stopping = False
        self._resumed: dict[str, Any] | None = None  # the state that the run goes on from
        self._changed: dict[str, tuple[Any, Any]] = {}  # what transitions depend on, and was another before
        self._process = Process()
        self._log: RunLog | None = None
        self._until_closed = ExitStack()  # puts back what a run changes in its process
        with ExitStack() as failed:
            failed.callback(self._release)
            self._begin(self._start(resume))
            failed.pop_all()

    def _start(self, resume: bool | Path) -> Path | None:
        """Return the checkpoint to go on from, or None for a run that is to begin, in a folder that holds no other."""
        latest = latest_checkpoint(self.logdir)
        if resume:
            path = latest if resume is True else resume
            if path is None:
                raise ValueError(f"run: {str(self.logdir)!r} has no checkpoint to go on from; train it anew, elsewhere")
            return path
        if any((self.logdir / name).exists() for name in (CONFIG, PROGRESS, CHECKPOINTS, BEST_WEIGHTS.parent)):
            way = "resume it" if latest else "remove that one, which came to no checkpoint"
            raise ValueError(f"logdir: {str(self.logdir)!r} holds a run already; choose another folder, or {way}")
        return None

    def _begin(self, path: Path | None) -> None:
        """Open everything, anew or as a checkpoint says, and the folder last."""
        config = self.config
        if path is None:
            self._open(self._seeds(0))
        else:
            try:
                self._go_on(path)
            except Damaged as error:
                raise Damaged(f"{error}; {instead_of(path)}") from None
            # Before the logs are cut back: whatever is resumed later must not count rows that are not there.
            discard_after(path)
        write_json(self.logdir / CONFIG, config.to_dict())
        if path is not None:  # weights of a course that was given up may be better, and are kept then
            self._best_weights.go_on(self._is_ours)
        for folder in (BEST_WEIGHTS.parent, CHECKPOINTS):
            (self.logdir / folder).mkdir(exist_ok=True)
        write_json(self.logdir / ENVIRONMENT, {**provenance(), **self.arithmetic(), **self.task()})
        self._log = RunLog(self.logdir, self.steps, self.episodes)
        if path is None:
            self._checkpoint()  # so that whatever comes, there is one to go on from

    # --- what a kind of run fills in ---

    def reports(self) -> Iterator[Report]:
        """Run to the end, yielding a report whenever one is due, and at the end."""
        raise NotImplementedError

    def learned(self) -> Learned:
        """Return what the learner has to tell now."""
        raise NotImplementedError

    def weights(self) -> dict[str, torch.Tensor]:
        """Return what a policy needs."""
        raise NotImplementedError

    @property
    def updates(self) -> int:
        """How many updates have been made."""
        raise NotImplementedError

    def arithmetic(self) -> dict[str, str | int]:
        """Return where and how numbers are worked out, as far as the machine decides it."""
        return {"device": "cpu"}

    def task(self) -> dict[str, str]:
        """Return for a person what the run makes of its environment."""
        return described(self.config, self._inputs())

    def _inputs(self) -> str:
        """Say what becomes of observations."""
        raise NotImplementedError

    def close(self) -> None:
        """Release what the run holds, as far as it has been opened."""

    def _seeds(self, steps: int) -> np.random.SeedSequence:
        """Seeds of what begins after so many steps."""
        return np.random.SeedSequence([self.config.seed, steps] if steps else [self.config.seed])

    def _go_on(self, path: Path) -> None:
        checkpoint = load_checkpoint(path)
        self._resumed = checkpoint.state
        try:
            self._open(self._seeds(integer("steps", checkpoint.state["steps"], 0)))
            self._restore(checkpoint)
        except (KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
            raise Damaged(f"{path}: is not the state of a run ({error!r})") from None
        if "env_id" in self._changed:  # what was reached there is nothing to compare with
            self._recent.clear()
            self._successes, self._best, self._evaluation = 0, -math.inf, math.nan

    def _open(self, seeds: np.random.SeedSequence) -> None:
        """Make the environments and the learner."""
        raise NotImplementedError

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors of a checkpoint."""
        raise NotImplementedError

    def _state(self) -> dict[str, Any]:
        """Return what a checkpoint needs beside its tensors, as JSON can hold it."""
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
        """Go on from a checkpoint."""
        state = checkpoint.state
        self.steps, self.frames = integer("steps", state["steps"], 0), integer("frames", state["frames"], 0)
        self._seconds_before = float(state["seconds"])
        if "returns" in state:  # as checkpoints were before
            self.returns = array("d", map(float, state["returns"]))
            self.episodes = len(self.returns)
        else:
            self.episodes = integer("episodes", state["episodes"], 0)
            self.returns = read_returns(self.logdir, self.episodes)
            if missing := self.episodes - len(self.returns):
                lost = f"{self.logdir / EPISODES} lacks {missing:,} of the {self.episodes:,} episodes so far"
                warnings.warn(lost, stacklevel=2)
        self._recent.extend(
            Episode(int(env_index), float(total), int(steps)) for env_index, total, steps in state["recent"]
        )
        self._successes = integer("successes", state["successes"], 0)
        best = state.get("best_test", state["best"])  # tables had their own before
        self._best = -math.inf if best is None else float(best)
        self._evaluation = math.nan if state["evaluation"] is None else float(state["evaluation"])
        self._saved_at = self.steps
        before = state.get("transitions")
        if before is None:  # as checkpoints were before
            before = transition_settings(resolved(load_run(self.logdir)))
        self._changed = changes(before, self.config)

    # --- what all of them do ---

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
        except Exception as second:  # must not hide what went wrong first
            if error is None:
                raise
            warnings.warn(f"not everything could be saved: {second}", stacklevel=2)

    def _save(self, *, diverged: bool) -> None:
        """Save everything that is good: of a run that has diverged, the best weights from before."""
        if diverged:
            with suppress(Diverged):  # when they were kept they had diverged, too
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
        """Let the run end after the step that it is in. May be called by a signal handler, or from another thread."""
        self._stopping = True

    @property
    def stopped(self) -> bool:
        """Whether the run was stopped before its end."""
        return self._stopping and not self._finished()

    def result(self) -> Result:
        """Return what the run has come to so far."""
        reason = self._ending() or ("interrupted" if self._stopping else "not over")
        return Result(list(self.returns), self.steps, self.frames, self.updates, self._seconds, self.logdir, reason)

    def mean_return(self) -> float:
        """Mean of the last `mean_episodes` returns; minus infinity until there are that many."""
        if len(self._recent) < self.config.mean_episodes:
            return -math.inf
        return float(np.mean([episode.total for episode in self._recent]))

    def _finished(self) -> bool:
        return self._ending() is not None

    def _ending(self) -> str | None:
        evaluation, mean = self._evaluation, self.mean_return()
        standing = Standing(self.steps, self.episodes, self.updates, self._successes, mean, evaluation)
        return ending(self.config, standing)

    def _warn_of_cut(self, steps: int, way_on: str, setting: str = "checkpoint_every_steps") -> None:
        """Warn that an episode is cut off which has gone on since the checkpoint before, `steps` steps ago."""
        warnings.warn(
            f"{setting}: an episode of {self.config.env_id} had gone on for all {steps:,} steps between two "
            f"checkpoints when the second cut it off, so episodes of that length never end; {way_on}",
            stacklevel=2,
        )

    def _clock(self) -> float:
        """Seconds that the run has taken, those before it was resumed included."""
        return self._seconds_before + (time.perf_counter() - self._started if self._started else 0.0)

    def _end(self, episode: Episode) -> None:
        """Take note of a whole episode."""
        assert self._log is not None
        self.episodes += 1
        self.returns.append(episode.total)
        self._recent.append(episode)
        self._successes = self._successes + 1 if episode.steps >= self.config.success_steps else 0
        self._log.episode(self.episodes, self.steps, *episode, epsilon(self.config, self.steps))

    def _metadata(self) -> dict[str, Any]:
        """Return what stands beside weights."""
        mean = float(np.mean([episode.total for episode in self._recent])) if self._recent else None
        env_id = self.config.env_id
        return {"env_id": env_id, "steps": self.steps, "updates": self.updates, "mean_return": mean}

    def _keep_if_best(self, value: float) -> None:
        """Keep the weights as they are now, if they came to more than all before."""
        if value > self._best:
            self._best = value
            self._best_weights.keep(self.weights(), {**self._metadata(), "best": value})

    def _is_ours(self, metadata: dict[str, Any]) -> bool:
        """Whether weights with such metadata are for the run's environment."""
        before = self._changed.get("env_id", (self.config.env_id,))[0]
        return "env_id" not in changes({"env_id": str(metadata.get("env_id", before))}, self.config)

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
        """Return the tensors if all their numbers are finite."""
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
        before, learned = self._last, self.learned()
        self._seconds = self._clock()
        elapsed = self._seconds - before.seconds if before else math.nan
        totals, lengths = [episode.total for episode in self._recent], [episode.steps for episode in self._recent]
        report = Report(
            seconds=self._seconds,
            steps=self.steps,
            frames=self.frames,
            updates=learned.updates,
            episodes=self.episodes,
            epsilon=epsilon(self.config, self.steps),
            mean_return=float(np.mean(totals)) if totals else math.nan,
            last_return=totals[-1] if totals else math.nan,
            mean_length_steps=float(np.mean(lengths)) if lengths else math.nan,
            last_length_steps=lengths[-1] if lengths else math.nan,
            loss=learned.loss,
            mean_q=learned.mean_q,
            max_q=learned.max_q,
            grad_norm=learned.grad_norm,
            frames_per_second=(self.frames - before.frames) / elapsed if before else math.nan,
            updates_per_second=(learned.updates - before.updates) / elapsed if before else math.nan,
            evaluation_return=self._evaluation,
            **self._process.read(),
        )
        if before is not None:
            self._log.report(report, learned.samples)
        self._last = report
        return report

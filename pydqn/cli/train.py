"""`pydqn train`: starting, resuming and following a run."""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydqn.cli.errors import RESUMABLE, USER_ERRORS, print_error
from pydqn.cli.imports import repeated
from pydqn.cli.options import given_settings
from pydqn.config import Config
from pydqn.presets import preset, preset_and_note

if TYPE_CHECKING:
    from pydqn.cli.progress import ProgressBar
    from pydqn.runs.locks import FolderLock
    from pydqn.runs.logs import Report
    from pydqn.training.base import BaseRun


def train(arguments: argparse.Namespace) -> int:
    """Train a preset or resume a run; returns the exit code."""
    from pydqn.cli.progress import ProgressBar
    from pydqn.runs.checkpoint import latest_checkpoint
    from pydqn.training.signals import deferred
    from pydqn.training.start import open_run

    if (arguments.preset is None) == (arguments.resume is None):
        raise ValueError("train: expected a PRESET, or --resume RUN")
    start = _to_resume(arguments, arguments.resume) if arguments.resume else _to_start(arguments)
    run = None
    try:
        with (
            deferred() as signals,
            ProgressBar(start.config.total_steps) as bar,
            open_run(start.config, start.logdir, resume=start.resume) as run,
        ):
            signals.stop, run.saving, run.note = run.stop, bar.saving, bar.note
            for line in (_listed(run.task()), _listed(run.arithmetic()), start.note):
                print(line, end="\n" if line else "", file=sys.stderr)
            _follow(run, bar)
    except KeyboardInterrupt:
        if run is None:  # nothing has been started, so nothing is lost
            return RESUMABLE
        raise
    except BrokenPipeError:
        raise
    except USER_ERRORS as error:
        code = print_error(error)
        if run is not None and (checkpoint := latest_checkpoint(run.logdir)) is not None:
            print(
                f"run: {checkpoint} is whole ({_command('train', *repeated(arguments), '--resume', run.logdir)})",
                file=sys.stderr,
            )
        return code
    _print_result(run, repeated(arguments))
    return RESUMABLE if run.stopped else 0


class _Start(NamedTuple):
    """What `pydqn train` was asked for."""

    config: Config
    logdir: Path | FolderLock
    resume: bool | Path
    note: str = ""  # which settings were reset


def _to_resume(arguments: argparse.Namespace, path: str | Path) -> _Start:
    from pydqn.runs.layout import load_run, run_of

    if arguments.resume and arguments.logdir:
        raise ValueError("logdir: a resumed run stays in its folder")
    logdir, checkpoint = run_of(path)
    return _Start(load_run(logdir, **given_settings(arguments)), logdir, checkpoint or True)


def _to_start(arguments: argparse.Namespace) -> _Start:
    """Return what to run and where. An unfinished run in that folder may be resumed instead."""
    from pydqn.runs.checkpoint import latest_checkpoint, read_state
    from pydqn.runs.locks import lock_holder, lock_numbered

    config, note = preset_and_note(arguments.preset, given_settings(arguments))
    task = arguments.preset if config.env_id == preset(arguments.preset).env_id else config.env_id.split("/")[-1]
    logdir = Path(arguments.logdir or Path("runs") / f"{task}-{config.seed}")
    checkpoint, state = latest_checkpoint(logdir), {}
    with suppress(ValueError, OSError):  # a damaged checkpoint is not offered
        state = {} if checkpoint is None else read_state(checkpoint)
    if state.get("finished") is False and lock_holder(logdir) is None:
        offer = f"{logdir} can go on from step {state['steps']:,}"
        if sys.stdin.isatty() and sys.stderr.isatty():
            with suppress(EOFError):  # Ctrl-D
                if input(f"{offer}. Resume it? [Y/n] ").strip().lower() in ("", "y", "yes"):
                    return _to_resume(arguments, logdir)
        else:
            print(f"{offer}: {_command('train', *repeated(arguments), '--resume', logdir)}", file=sys.stderr)
    return _Start(config, logdir if arguments.logdir else lock_numbered(logdir), False, note)


def _follow(run: BaseRun, bar: ProgressBar) -> None:
    """Run to the end, with a progress bar and a line per `log_every_episodes` episodes."""
    config = run.config
    episodes, best = run.episodes, -math.inf
    for report in run.reports():
        every = config.log_every_episodes
        if every and report.episodes // every > episodes // every:
            bar.line(_line(report))
        episodes = report.episodes
        if config.agent == "tabular" and report.evaluation_return > best:
            best = report.evaluation_return
            bar.line(f"step {report.steps:,}: best test mean so far {best:.3f}")
        bar.show(report)


def _line(report: Report) -> str:
    parts = [
        f"episode {report.episodes:,}",
        f"step {report.steps:,}",
        f"return {report.last_return:g}",
        f"length {report.last_length_steps:g}",
        f"mean return {report.mean_return:.2f}",
        f"epsilon {report.epsilon:.3f}",
        f"loss {report.loss:.3g}",
        f"{report.frames_per_second:,.0f} frames/s",
    ]
    return "  ".join(parts).replace("nan", "-")


def _print_result(run: BaseRun, imports: list[str]) -> None:
    result = run.result()
    recent = result.returns[-run.config.mean_episodes :]
    mean = "no episode finished"
    if recent:
        mean = f"mean return of the last {len(recent)}: {sum(recent) / len(recent):.2f}"
    print(
        f"{'interrupted' if run.stopped else 'done'}: {result.steps:,} steps, {result.updates:,} updates, "
        f"{len(result.returns)} episodes in {result.seconds / 60:.1f} min; {mean}"
    )
    if run.stopped:
        follow_up = _command("train", *imports, "--resume", run.logdir)
    else:
        print(f"ended by {result.reason}")
        follow_up = _command("play", *imports, run.logdir, "--record", "episode.mp4")
    print(f"run: {run.logdir}   ({follow_up}, {_command('plot', run.logdir, '-o', 'curve.png')})")


def _command(*words: str | Path) -> str:
    """Return a command that can be typed, for a shell and for our options, whatever the name of a folder (a `Path`)."""
    return shlex.join(
        ["pydqn", *(f"./{word}" if isinstance(word, Path) and str(word)[0] == "-" else str(word) for word in words)]
    )


def _listed(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())

"""The `pydqn` command: the only room that prints or exits."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import shlex
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydqn._util.machine import bound_spinning
from pydqn.cli.options import make_parser
from pydqn.config import SECTIONS, Config
from pydqn.presets import PRESETS, preset, preset_and_note

if TYPE_CHECKING:
    from pydqn.cli.progress import ProgressBar
    from pydqn.evaluation.play import PlayedEpisode
    from pydqn.runs.locks import FolderLock
    from pydqn.runs.logs import Report
    from pydqn.training.base import BaseRun

_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: everything is saved, run me again
_INTERRUPTED = 130  # what shells report for a program that SIGINT ended
_BROKEN_PIPE = 141  # the same for SIGPIPE
_ERRORS = (ValueError, RuntimeError, OSError, MemoryError)  # what a user can mend; anything else is our mistake


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    bound_spinning()  # before any command imports torch
    arguments = _parser().parse_args(argv)
    try:
        with _one_line_warnings():
            try:
                return int(arguments.run(arguments) or 0)
            except BrokenPipeError:
                raise
            except _ERRORS as error:
                return _fail(error)
    except BrokenPipeError:  # whoever read our output has seen enough: `pydqn presets nature | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except KeyboardInterrupt:
        return _INTERRUPTED


@contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Show warnings as lines, those of environments that fail to close last: below what a command came to."""
    late: list[Warning | str] = []

    def show(message: Warning | str, category: type[Warning], *place: Any) -> None:
        if category.__name__ == "CloseWarning":  # (not imported, as Gymnasium is with it: few commands need that)
            late.append(message)
        else:
            print(f"pydqn: warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        try:
            yield
        finally:
            sys.stdout.flush()
            for message in late:
                print(f"pydqn: warning: {message}", file=sys.stderr)


def _fail(error: Exception) -> int:
    print(f"pydqn: error: {error}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    return make_parser(
        {
            "presets": _presets,
            "train": _train,
            "play": _play,
            "evaluate": _evaluate,
            "plot": _plot,
            "bench": _bench,
        }
    )


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of Config that were given as options."""
    names = {field.name for field in dataclasses.fields(Config)}
    return {name: value for name, value in vars(arguments).items() if name in names}


def _presets(arguments: argparse.Namespace) -> None:
    if arguments.preset is None:
        for name, entry in PRESETS.items():
            print(f"{name:18} {entry.summary}\n{'':18} {entry.source}")
        return
    config = preset(arguments.preset)
    print(f"# {PRESETS[arguments.preset].source}")
    for field in dataclasses.fields(Config):
        value = getattr(config, field.name)
        if field.name in SECTIONS:
            print(f"\n{SECTIONS[field.name]}")
        text = (" ".join(map(str, value)) or "none") if isinstance(value, tuple) else str(value)
        print(f"{field.name:24} {text:14} {field.metadata['help']}")


def _train(arguments: argparse.Namespace) -> int:
    from pydqn.cli.progress import ProgressBar
    from pydqn.runs.checkpoint import latest_checkpoint
    from pydqn.training.loop import open_run
    from pydqn.training.signals import deferred

    if (arguments.preset is None) == (arguments.resume is None):
        raise ValueError("train: expected a PRESET, or --resume RUN")
    start = _to_resume(arguments, arguments.resume) if arguments.resume else _to_start(arguments)
    config = start.config
    run = None
    try:
        with (
            deferred() as signals,
            ProgressBar(config.total_steps) as bar,
            open_run(config, start.logdir, resume=start.resume) as run,
        ):
            signals.stop, run.saving = run.stop, bar.saving
            for line in (_listed(run.task()), _listed(run.arithmetic()), start.note):
                print(line, end="\n" if line else "", file=sys.stderr)
            _follow(run, bar)
    except KeyboardInterrupt:
        if run is None:  # nothing has begun, so nothing is lost
            return _AGAIN
        raise
    except BrokenPipeError:
        raise
    except _ERRORS as error:
        code = _fail(error)
        if run is not None and (checkpoint := latest_checkpoint(run.logdir)) is not None:
            print(f"run: {checkpoint} is whole ({_command('train', '--resume', run.logdir)})", file=sys.stderr)
        return code
    code = _AGAIN if run.stopped else 0
    result = run.result()
    recent = result.returns[-config.mean_episodes :]
    mean = (
        f"mean return of the last {len(recent)}: {sum(recent) / len(recent):.2f}" if recent else "no episode finished"
    )
    state = "interrupted" if code else "done"
    print(
        f"{state}: {result.steps:,} steps, {result.updates:,} updates, {len(result.returns)} episodes "
        f"in {result.seconds / 60:.1f} min; {mean}"
    )
    if not code:
        print(f"ended by {result.reason}")
    words = ("train", "--resume", run.logdir) if code else ("play", run.logdir, "--record", "game.mp4")
    print(f"run: {run.logdir}   ({_command(*words)}, {_command('plot', run.logdir, '-o', 'curve.png')})")
    return code


def _command(*words: str | Path) -> str:
    """Return a command as it can be typed: a folder (a `Path`) may have any name, for the shell as for our options."""
    return shlex.join(
        ["pydqn", *(f"./{word}" if isinstance(word, Path) and str(word)[0] == "-" else str(word) for word in words)]
    )


def _listed(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


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
    return _Start(load_run(logdir, **_given(arguments)), logdir, checkpoint or True)


def _to_start(arguments: argparse.Namespace) -> _Start:
    """Return what to run and where; an unfinished run that is there already may go on instead."""
    from pydqn.runs.checkpoint import latest_checkpoint, read_state
    from pydqn.runs.locks import lock_holder, lock_numbered

    config, note = preset_and_note(arguments.preset, _given(arguments))
    task = arguments.preset if config.env_id == preset(arguments.preset).env_id else config.env_id.split("/")[-1]
    logdir = Path(arguments.logdir or Path("runs") / f"{task}-{config.seed}")
    checkpoint, state = latest_checkpoint(logdir), {}
    with suppress(ValueError, OSError):  # a damaged one is not offered, nor one of a run that is going on
        state = {} if checkpoint is None else read_state(checkpoint)
    if state.get("finished") is False and lock_holder(logdir) is None:
        offer = f"{logdir} can go on from step {state['steps']:,}"
        if sys.stdin.isatty() and sys.stderr.isatty():
            with suppress(EOFError):  # Ctrl-D
                if input(f"{offer}. Resume it? [Y/n] ").strip().lower() in ("", "y", "yes"):
                    return _to_resume(arguments, logdir)
        else:
            print(f"{offer}: {_command('train', '--resume', logdir)}", file=sys.stderr)
    return _Start(config, logdir if arguments.logdir else lock_numbered(logdir), False, note)


def _follow(run: BaseRun, bar: ProgressBar) -> None:
    """Run to the end, with a progress bar and a line for every so many episodes."""
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


def _overrides(arguments: argparse.Namespace) -> dict[str, Any]:
    given = {"device": arguments.device, "evaluation_epsilon": arguments.epsilon}
    return {name: value for name, value in given.items() if value is not None}


def _play(arguments: argparse.Namespace) -> None:
    from pydqn.evaluation.play import PlayedEpisode, play_episode
    from pydqn.plotting.action_values import beside
    from pydqn.plotting.images import Caption
    from pydqn.plotting.recording import Recorder

    if arguments.fps is not None and arguments.fps < 1:
        raise ValueError(f"fps: expected at least 1, got {arguments.fps}")
    most_steps = math.inf if arguments.most_steps is None else arguments.most_steps
    show = (not arguments.record and sys.stdout.isatty()) if arguments.show is None else arguments.show
    if show:
        sys.stdout.write("\x1b[2J")  # each image is drawn over the one before
    recorder: Recorder | None = None
    with ExitStack() as stack:
        due = time.perf_counter()
        options = {"weights": arguments.weights, "seed": arguments.seed, **_overrides(arguments)}
        images = bool(show or arguments.record)
        for step in play_episode(arguments.folder, most_steps=most_steps, images=images, **options):
            if isinstance(step, PlayedEpisode):
                _print_game(step)
                break
            names, image, fps = step.action_names, step.image, arguments.fps or step.fps
            if step.image is None or image is None:
                continue
            if arguments.q_values:
                image = beside(image, names, step.values, step.action)
            if arguments.record:
                page = Path(arguments.record).suffix == ".html"  # shows the action values in any case
                if recorder is None:
                    title = Path(arguments.folder).name
                    recorder = stack.enter_context(Recorder(arguments.record, fps, title=title, action_names=names))
                recorder.add(
                    step.image if page else image,
                    Caption(names[step.action], step.reward, step.total, step.values),
                )
            if show:
                _draw(image)
                due = max(due + 1 / fps, time.perf_counter())
                time.sleep(due - time.perf_counter() if due > time.perf_counter() else 0)
    if arguments.record:
        print(f"recorded: {arguments.record}")


def _print_game(game: PlayedEpisode) -> None:
    total = "unfinished" if math.isnan(game.total) else f"{game.total:g}"
    counts = " ".join(f"{action}:{count}" for action, count in game.action_counts.items())
    print(f"total reward {total} in {game.steps} steps; actions {counts}")


def _draw(image: Any) -> None:
    """Draw an image in the terminal, two pixels to a character cell."""
    columns, rows = shutil.get_terminal_size()
    height, width = image.shape[:2]
    shrink = max(1, math.ceil(width / columns), math.ceil(height / (2 * (rows - 1))))
    small = image[::shrink, ::shrink]
    small = small[: len(small) // 2 * 2]
    lines = [
        "".join(
            f"\x1b[38;2;{a[0]};{a[1]};{a[2]};48;2;{b[0]};{b[1]};{b[2]}m\u2580" for a, b in zip(top, bottom, strict=True)
        )
        for top, bottom in zip(small[::2], small[1::2], strict=True)
    ]
    sys.stdout.write("\x1b[H" + "\x1b[0m\n".join(lines) + "\x1b[0m\n")
    sys.stdout.flush()


def _evaluate(arguments: argparse.Namespace) -> None:
    import json
    import statistics

    from pydqn._util.files import append_line
    from pydqn.evaluation.evaluate import score
    from pydqn.runs.layout import SCORES

    result = score(
        arguments.folder,
        arguments.episodes,
        protocol=arguments.protocol,
        weights=arguments.weights,
        seed=arguments.seed,
        **_overrides(arguments),
    )
    returns = result.returns
    spread = statistics.stdev(returns) if len(returns) > 1 else 0.0
    normalized = result.human_normalized_percent
    print(
        f"{len(returns)} episodes: mean return {result.mean_return:.2f}, standard deviation {spread:.2f}, "
        f"from {min(returns):g} to {max(returns):g}" + ("" if normalized is None else f"; {normalized:.1f}% of human")
    )
    print(f"protocol {result.protocol}: {', '.join(f'{name} {value}' for name, value in result.settings.items())}")
    try:
        append_line(Path(arguments.folder) / SCORES, json.dumps(result._asdict()))
    except OSError as error:  # the scores have been shown
        print(f"pydqn: warning: these scores could not be kept: {error}", file=sys.stderr)


def _plot(arguments: argparse.Namespace) -> None:
    if arguments.values:
        from pydqn.plotting.values import plot_values, values_of

        if len(arguments.runs) != 1:
            raise ValueError(f"values: expected one RUN, got {len(arguments.runs)}")
        plot_values(values_of(arguments.runs[0]), arguments.output)
    else:
        from pydqn.plotting.curves import plot_runs

        plot_runs(arguments.runs, arguments.output, panels=arguments.panels, each=arguments.each)
    print(f"drawn: {os.fspath(arguments.output)}")


def _bench(arguments: argparse.Namespace) -> None:
    import datetime

    from pydqn._util.files import write_json
    from pydqn.runs.provenance import provenance
    from pydqn.training.benchmark import measure

    if not arguments.seconds > 0:
        raise ValueError(f"seconds: expected a positive number, got {arguments.seconds}")
    if arguments.output and not Path(arguments.output).absolute().parent.is_dir():
        raise ValueError(f"output: there is no folder {str(Path(arguments.output).parent)!r}")
    config, note = preset_and_note(arguments.preset, _given(arguments))
    print(note, end="\n" if note else "", file=sys.stderr)
    rows = []
    print(f"{'stage':34} {'one call':>12} {'per second':>14}")
    for row in measure(config, arguments.seconds):
        rows.append(row._asdict())
        print(f"{row.stage:34} {row.microseconds:9,.0f} us {row.per_second:14,.0f} {row.unit}", flush=True)
    if arguments.output:
        about = {"date": datetime.date.today().isoformat(), **provenance()}
        write_json(Path(arguments.output), {"about": about, "config": config.to_dict(), "stages": rows})


if __name__ == "__main__":
    sys.exit(main())

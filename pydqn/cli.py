"""The `pydqn` command: the only room that prints or exits."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from pydqn import __version__
from pydqn.config import Config
from pydqn.presets import PRESETS, preset

_INTERRUPTED = 130  # what shells report for a program that SIGINT ended


class _Parser(argparse.ArgumentParser):
    """Reports an error as one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments) or 0)
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        print(f"pydqn: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return _INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="pydqn", description="Train, watch and evaluate DQN agents.")
    parser.add_argument("--version", action="version", version=f"pydqn {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    command = commands.add_parser("presets", help="list the presets, or print one with all its settings")
    command.add_argument("preset", nargs="?", metavar="PRESET")
    command.set_defaults(run=_presets)

    command = commands.add_parser(
        "train",
        usage="pydqn train [options] PRESET",  # there are too many to list twice
        help="train a preset",
        description="Train a preset. Every setting of its Config is an option; defaults are the preset's "
        "(pydqn presets PRESET prints them). Ctrl-C stops the run and keeps its weights.",
    )
    command.add_argument("preset", metavar="PRESET", help=f"one of: {', '.join(PRESETS)}")
    command.add_argument("--logdir", help="folder of the run (default: runs/NAME-SEED, or the next free one)")
    _add_config_options(command)
    command.set_defaults(run=_train)

    command = commands.add_parser("play", help="watch a trained agent play one game, and record it")
    _add_run_options(command)
    command.add_argument("--record", metavar="FILE", help="write a video: .mp4 or .gif")
    command.add_argument(
        "--fps",
        type=int,
        default=30,
        help="pictures per second (default: 30; a game of Atari makes 60 / frame-skip decisions a second)",
    )
    command.add_argument("--most-steps", type=int, metavar="N", help="stop after N decisions")
    command.add_argument(
        "--show", action="store_true", help="draw the game in the terminal (as it does anyway when not recording)"
    )
    command.set_defaults(run=_play)

    command = commands.add_parser("evaluate", help="play whole games with a run's best weights")
    _add_run_options(command)
    command.add_argument("--episodes", type=int, default=30, help="whole games (default: 30)")
    command.set_defaults(run=_evaluate)

    command = commands.add_parser("plot", help="draw the learning curves of one or more runs")
    command.add_argument("runs", nargs="+", metavar="RUN")
    command.add_argument("-o", "--output", required=True, metavar="FILE", help="picture to write: .png, .svg or .pdf")
    command.set_defaults(run=_plot)
    return parser


def _add_run_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", metavar="RUN", help="folder of a run")
    command.add_argument("--seed", type=int, default=0, help="of the environments and of exploration (default: 0)")
    command.add_argument("--device", default=None, help="auto, cpu, cuda or cuda:N (default: the run's own)")
    command.add_argument("--epsilon", type=float, default=None, help="probability of a random action")


def _add_config_options(command: argparse.ArgumentParser) -> None:
    for field in dataclasses.fields(Config):
        kind: type = type(field.default)
        options: dict[str, Any] = {"help": field.metadata["help"], "default": argparse.SUPPRESS, "dest": field.name}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = {float: float, str: str}.get(kind, _integer)
            options["metavar"] = {int: "N", float: "X", str: "NAME", tuple: "N"}[kind]
            if kind is tuple:
                options["nargs"] = "+"
            if field.metadata["choices"]:
                options["metavar"] = "|".join(field.metadata["choices"])
        command.add_argument("--" + field.name.replace("_", "-"), **options)


def _integer(text: str) -> int:
    """Read an integer as people write it: 1000000 or 1e6."""
    try:
        return int(text)
    except ValueError:
        value = float(text)
        if not value.is_integer():
            raise
        return int(value)


_integer.__name__ = "integer"  # argparse names the type in its message


def _config(arguments: argparse.Namespace) -> Config:
    names = {field.name for field in dataclasses.fields(Config)}
    return preset(arguments.preset, **{name: value for name, value in vars(arguments).items() if name in names})


def _presets(arguments: argparse.Namespace) -> None:
    if arguments.preset is None:
        for name, entry in PRESETS.items():
            print(f"{name:18} {entry.summary} ({entry.source})")
        return
    config = preset(arguments.preset)
    for field in dataclasses.fields(Config):
        value = getattr(config, field.name)
        text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        print(f"{field.name:24} {text:14} {field.metadata['help']}")


def _train(arguments: argparse.Namespace) -> int:
    config = _config(arguments)
    task = arguments.preset if config.env_id == preset(arguments.preset).env_id else config.env_id.split("/")[-1]
    logdir = Path(arguments.logdir) if arguments.logdir else _free_logdir(f"{task}-{config.seed}")

    from pydqn.logs import ProgressBar
    from pydqn.training import Run

    code = 0
    with Run(config, logdir) as run:
        bar = ProgressBar(config.total_steps)
        try:
            for report in run.reports():
                bar.show(report)
        except KeyboardInterrupt:
            code = _INTERRUPTED
        finally:
            bar.close()
    result = run.result()
    recent = result.returns[-config.mean_episodes :]
    mean = f"mean return of the last {len(recent)}: {sum(recent) / len(recent):.2f}" if recent else "no game finished"
    state = "interrupted" if code else "done"
    print(
        f"{state}: {result.steps:,} steps, {result.updates:,} updates, {len(result.returns)} games "
        f"in {result.seconds / 60:.1f} min; {mean}"
    )
    print(f"run: {logdir}   (pydqn play {logdir} --record game.mp4, pydqn plot {logdir} -o curve.png)")
    return code


def _free_logdir(name: str) -> Path:
    from pydqn.logs import PROGRESS

    for number in range(1, sys.maxsize):
        logdir = Path("runs") / (name if number == 1 else f"{name}.{number}")
        if not (logdir / PROGRESS).exists():
            return logdir
    raise AssertionError("unreachable")


def _overrides(arguments: argparse.Namespace) -> dict[str, Any]:
    given = {"device": arguments.device, "evaluation_epsilon": arguments.epsilon}
    return {name: value for name, value in given.items() if value is not None}


def _play(arguments: argparse.Namespace) -> None:
    from contextlib import ExitStack

    from pydqn.evaluation import Game, Recorder, watch

    if arguments.fps < 1:
        raise ValueError(f"fps: expected at least 1, got {arguments.fps}")
    most_steps = math.inf if arguments.most_steps is None else arguments.most_steps
    with ExitStack() as stack:
        recorder = stack.enter_context(Recorder(arguments.record, arguments.fps)) if arguments.record else None
        show = arguments.show or (recorder is None and sys.stdout.isatty())
        if show:
            sys.stdout.write("\x1b[2J")  # each picture is drawn over the one before
        game = None
        due = time.perf_counter()
        for moment in watch(arguments.folder, seed=arguments.seed, most_steps=most_steps, **_overrides(arguments)):
            if isinstance(moment, Game):
                game = moment
                break
            if recorder is not None:
                recorder.add(moment)
            if show:
                _draw(moment)
                due = max(due + 1 / arguments.fps, time.perf_counter())
                time.sleep(due - time.perf_counter() if due > time.perf_counter() else 0)
    assert game is not None
    total = "unfinished" if math.isnan(game.total) else f"{game.total:g}"
    counts = " ".join(f"{action}:{count}" for action, count in enumerate(game.action_counts))
    print(f"total reward {total} in {game.steps} steps; actions {counts}")
    if arguments.record:
        print(f"recorded: {arguments.record}")


def _draw(picture: Any) -> None:
    """Draw a picture in the terminal, two pixels to a character cell."""
    columns, rows = shutil.get_terminal_size()
    height, width = picture.shape[:2]
    shrink = max(1, math.ceil(width / columns), math.ceil(height / (2 * (rows - 1))))
    small = picture[::shrink, ::shrink]
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
    import statistics

    from pydqn.evaluation import evaluate

    returns = evaluate(arguments.folder, arguments.episodes, seed=arguments.seed, **_overrides(arguments))
    spread = statistics.stdev(returns) if len(returns) > 1 else 0.0
    print(
        f"{len(returns)} games: mean return {statistics.fmean(returns):.2f}, standard deviation {spread:.2f}, "
        f"from {min(returns):g} to {max(returns):g}"
    )


def _plot(arguments: argparse.Namespace) -> None:
    from pydqn.plots import plot_runs

    plot_runs(arguments.runs, arguments.output)
    print(f"drawn: {os.fspath(arguments.output)}")


if __name__ == "__main__":
    sys.exit(main())

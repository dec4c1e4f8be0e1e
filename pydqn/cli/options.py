"""What can be typed after `pydqn`: commands, options, help."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from pydqn import __version__
from pydqn.config import SECTIONS, Config
from pydqn.evaluation.protocols import PROTOCOLS
from pydqn.presets import PRESETS

_PANELS = ("return-frames", "return-minutes", "return-episodes", "length-episodes", "episodes-steps", "q-steps")
_WEIGHTS = ("best", "last", "checkpoint")


class _Parser(argparse.ArgumentParser):
    """Reports an error as one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def make_parser(commands_of: Mapping[str, Callable[[argparse.Namespace], int | None]]) -> argparse.ArgumentParser:
    """Build the parser; each command's namespace gets its function as `run`."""
    parser = _Parser(prog="pydqn", description="Train, watch and evaluate DQN agents.")
    parser.add_argument("--version", action="version", version=f"pydqn {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    command = commands.add_parser("presets", help="list the presets, or print one with all its settings")
    command.add_argument("preset", nargs="?", metavar="PRESET")
    command.set_defaults(run=commands_of["presets"])

    command = commands.add_parser(
        "train",
        usage="pydqn train [options] PRESET | pydqn train [options] --resume RUN",  # too many to list twice
        help="train a preset, or go on with a run",
        description="Train a preset. Every setting of its Config is an option; defaults are the preset's "
        "(pydqn presets PRESET prints them). Ctrl-C stops the run, which can be resumed.",
    )
    command.add_argument("preset", nargs="?", metavar="PRESET", help=f"one of: {', '.join(PRESETS)}")
    command.add_argument("--logdir", help="folder of the run (default: runs/NAME-SEED, or the next free one)")
    command.add_argument(
        "--resume", metavar="RUN", help="go on with this run from its latest checkpoint (or from RUN/checkpoints/...)"
    )
    _add_config_options(command)
    command.set_defaults(run=commands_of["train"])

    command = commands.add_parser("play", help="watch a trained agent play one episode, and record it")
    _add_run_options(command)
    command.add_argument(
        "--record",
        metavar="FILE",
        help="write a video, .mp4 or .gif, or a page that plays the episode in a browser, .html",
    )
    command.add_argument(
        "--fps",
        type=int,
        help="images per second (default: the environment's own, Atari's is 30; an episode of Atari makes 60 / frame-skip "
        "steps a second)",
    )
    command.add_argument("--most-steps", type=int, metavar="N", help="stop after N steps")
    command.add_argument("--q-values", action="store_true", help="draw the action values beside the image")
    command.add_argument(
        "--show",
        action=argparse.BooleanOptionalAction,
        help="draw the episode in the terminal (as it does anyway when not recording); --no-show needs no images",
    )
    command.set_defaults(run=commands_of["play"])

    command = commands.add_parser("evaluate", help="play whole episodes with a run's best weights")
    _add_run_options(command)
    command.add_argument(
        "--protocol", choices=list(PROTOCOLS), help="published rules of evaluation (default: the run's own choice)"
    )
    command.add_argument("--episodes", type=int, help="whole episodes (default: as many as the protocol says)")
    command.set_defaults(run=commands_of["evaluate"])

    command = commands.add_parser("plot", help="draw the learning curves of one or more runs, or a value function")
    command.add_argument("runs", nargs="+", metavar="RUN")
    command.add_argument("-o", "--output", required=True, metavar="FILE", help="image to write: .png, .svg or .pdf")
    command.add_argument("--panels", nargs="+", metavar="NAME", help="some of: " + ", ".join(_PANELS))
    command.add_argument(
        "--each", action="store_true", help="every run is a curve of its own, also seeds of one setting"
    )
    command.add_argument("--values", action="store_true", help="draw the value function of a small task's run instead")
    command.set_defaults(run=commands_of["plot"])

    command = commands.add_parser(
        "bench",
        usage="pydqn bench [options] [PRESET]",
        help="measure how fast this machine runs a preset",
        description="Measure each stage of a preset alone, and the whole loop, on an otherwise idle machine. Every "
        "setting of its Config is an option.",
    )
    command.add_argument("preset", nargs="?", default="pong", metavar="PRESET", help="(default: pong)")
    command.add_argument("--seconds", type=float, default=3.0, metavar="X", help="for each stage (default: 3)")
    command.add_argument("-o", "--output", metavar="FILE", help="also write the figures, versions and machine, .json")
    _add_config_options(command)
    command.set_defaults(run=commands_of["bench"])
    return parser


def _add_run_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", metavar="RUN", help="folder of a run")
    command.add_argument("--seed", type=int, default=0, help="of the environments and of exploration (default: 0)")
    command.add_argument("--device", default=None, help="auto, cpu, cuda or cuda:N (default: the run's own)")
    command.add_argument("--weights", choices=_WEIGHTS, help="which weights (default: best, or the newest there are)")
    command.add_argument("--epsilon", type=float, default=None, help="probability of a random action")


def _add_config_options(command: argparse.ArgumentParser) -> None:
    for field in dataclasses.fields(Config):
        if field.name in SECTIONS:
            group = command.add_argument_group(SECTIONS[field.name])
        kind: type = field.metadata["kind"]
        options: dict[str, Any] = {"help": field.metadata["help"], "default": argparse.SUPPRESS, "dest": field.name}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = {float: float, str: str}.get(kind, _integer)
            options["metavar"] = {int: "N", float: "X", str: "NAME", tuple: "N"}[kind]
            if kind is tuple:
                options["nargs"] = "*"
            if field.metadata["choices"]:
                options["metavar"] = "|".join(field.metadata["choices"])
        group.add_argument("--" + field.name.replace("_", "-"), **options)


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

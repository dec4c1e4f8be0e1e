"""The commands and options of `pydqn`, with their help."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from pydqn import __version__
from pydqn.config import Config
from pydqn.evaluation.protocols import PROTOCOLS
from pydqn.presets import PRESETS

# The same names are in `plotting.curves` and `evaluation.build`, which are slow to import. A test compares them.
_PANELS = ("return-frames", "return-minutes", "return-episodes", "length-episodes", "episodes-steps", "q-steps")
_WEIGHTS = ("best", "last", "checkpoint")

# The first field of each section of the help pages.
SECTIONS = {
    "agent": "the environment and the end of the run",
    "frame_skip": "Atari only",
    "stack": "observations and the replay buffer",
    "network": "the network",
    "gamma": "the loss",
    "value": "the value representation",
    "munchausen": "Munchausen",
    "optimizer": "the optimizer",
    "batch_size": "the training loop",
    "evaluation_every_steps": "evaluation",
    "log_every_steps": "logs, checkpoints and videos",
    "device": "the machine",
}


class _Parser(argparse.ArgumentParser):
    """Reports an error as one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def make_parser(commands_of: Mapping[str, Callable[[argparse.Namespace], int | None]]) -> argparse.ArgumentParser:
    """Build the parser. The namespace of each command has its function as `run`."""
    parser = _Parser(prog="pydqn", description="Train, watch and evaluate DQN agents.")
    parser.add_argument("--version", action="version", version=f"pydqn {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, summary: str, details: str = "", **options: Any) -> argparse.ArgumentParser:
        description = f"{summary} {details}".strip()
        command: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=description, **options)
        command.set_defaults(run=commands_of[name])
        if name != "presets":
            command.add_argument(
                "--import",
                dest="imports",
                action="append",
                default=[],
                metavar="MODULE",
                help="Import this module first, which registers an environment of your own. Can be given repeatedly.",
            )
        return command

    command = add("presets", "List the presets, or print all settings of one.")
    command.add_argument("preset", nargs="?", metavar="PRESET", help="Print the settings of this preset.")
    command.add_argument(
        "--diff", nargs=2, metavar="PRESET", help="Print the settings that these two presets differ in."
    )

    command = add(
        "train",
        "Train a preset, or resume a run.",
        "Every setting of a preset is an option; `pydqn presets PRESET` prints its values. Ctrl-C stops the run, which "
        "can be resumed.",
        usage="pydqn train [options] PRESET | pydqn train [options] --resume RUN",  # the options would fill a page
    )
    names = ", ".join(PRESETS)
    command.add_argument("preset", nargs="?", metavar="PRESET", help=f"Train this preset, one of: {names}.")
    command.add_argument(
        "--logdir", metavar="RUN", help="Write the run to this folder (default: runs/NAME-SEED, or the next free one)."
    )
    command.add_argument(
        "--resume", metavar="RUN", help="Resume this run from its latest checkpoint, or from RUN/checkpoints/NAME."
    )
    _add_config_options(command)

    command = add("play", "Watch a trained agent play one episode, and record it.")
    _add_run_options(command)
    command.add_argument(
        "--record", metavar="FILE", help="Write a video (.mp4 or .gif), or a page that plays the episode (.html)."
    )
    command.add_argument(
        "--fps",
        type=int,
        metavar="N",
        help="Show this many images per second (default: as the environment says; 30 in Atari games, which themselves "
        "run at 60 frames per second).",
    )
    command.add_argument("--most-steps", type=int, metavar="N", help="Stop after this many steps.")
    command.add_argument("--q-values", action="store_true", help="Draw the action values beside the image.")
    command.add_argument(
        "--show",
        action=argparse.BooleanOptionalAction,
        help="Draw the episode in the terminal (default: unless it is recorded). --no-show needs no images.",
    )

    command = add("evaluate", "Play whole episodes with a run's best weights, and print the returns.")
    _add_run_options(command)
    command.add_argument(
        "--protocol",
        choices=list(PROTOCOLS),
        help="Evaluate under these published settings (default: those of the run).",
    )
    command.add_argument(
        "--episodes", type=int, metavar="N", help="Play this many episodes (default: as the protocol says)."
    )

    command = add(
        "export",
        "Write a run's policy to a file for programs without pydqn.",
        "The file is compared with the policy on observations of played episodes.",
    )
    command.add_argument("folder", metavar="RUN", help="Use the run in this folder.")
    command.add_argument(
        "output", metavar="FILE", help="Write this file: .onnx (needs pydqn[export]), or .pt2 for torch.export.load."
    )
    command.add_argument(
        "--weights", choices=_WEIGHTS, help="Export these weights (default: the best, or else the newest)."
    )

    command = add("plot", "Draw the learning curves of runs, or a value function.")
    command.add_argument("runs", nargs="+", metavar="RUN", help="Draw the runs in these folders.")
    command.add_argument("-o", "--output", required=True, metavar="FILE", help="Write this image: .png, .svg or .pdf.")
    command.add_argument("--panels", nargs="+", metavar="NAME", help=f"Draw these panels: {', '.join(_PANELS)}.")
    command.add_argument(
        "--each", action="store_true", help="Draw a curve for each run, also for seeds of the same settings."
    )
    command.add_argument("--values", action="store_true", help="Draw the value function of a small task's run instead.")

    command = add(
        "bench",
        "Measure how fast this machine runs a preset.",
        "It measures each stage alone and then the whole loop; the machine should be idle. Every setting of a preset "
        "is an option.",
        usage="pydqn bench [options] [PRESET]",
    )
    command.add_argument(
        "preset", nargs="?", default="pong", metavar="PRESET", help="Measure this preset (default: pong)."
    )
    command.add_argument(
        "--seconds", type=float, default=3.0, metavar="X", help="Measure each stage for so long (default: 3)."
    )
    command.add_argument(
        "-o", "--output", metavar="FILE", help="Also write the results, versions and machine to this .json file."
    )
    _add_config_options(command)
    return parser


def given_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of Config that were given as options."""
    names = {field.name for field in dataclasses.fields(Config)}
    return {name: value for name, value in vars(arguments).items() if name in names}


def run_overrides(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of a run's Config that the options of `play` and `evaluate` replace."""
    given = {"device": arguments.device, "evaluation_epsilon": arguments.epsilon}
    return {name: value for name, value in given.items() if value is not None}


def _add_run_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", metavar="RUN", help="Use the run in this folder.")
    command.add_argument(
        "--seed", type=int, default=0, metavar="N", help="Seed the environments and the exploration (default: 0)."
    )
    command.add_argument(
        "--device", metavar="NAME", help="Compute on this device: auto, cpu, cuda or cuda:N (default: that of the run)."
    )
    command.add_argument(
        "--weights", choices=_WEIGHTS, help="Use these weights (default: the best, or else the newest)."
    )
    command.add_argument(
        "--epsilon", type=float, metavar="X", help="Act at random with this probability (default: as the run says)."
    )


def _add_config_options(command: argparse.ArgumentParser) -> None:
    for field in dataclasses.fields(Config):
        if field.name in SECTIONS:
            group = command.add_argument_group(SECTIONS[field.name])
        kind: type = field.metadata["kind"]
        options: dict[str, Any] = {"help": field.metadata["help"], "default": argparse.SUPPRESS, "dest": field.name}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            auto = kind is int and field.default == "auto"
            options["type"] = _integer_or_auto if auto else {float: float, str: str}.get(kind, _integer)
            options["metavar"] = "N|auto" if auto else {int: "N", float: "X", str: "NAME", tuple: "N"}[kind]
            if kind is tuple:
                options["nargs"] = "*"
            options["metavar"] = "|".join(field.metadata["choices"]) or field.metadata["metavar"] or options["metavar"]
        group.add_argument("--" + field.name.replace("_", "-"), **options)


def _integer(text: str) -> int:
    """Read an integer, also in the form 1e6."""
    try:
        return int(text)
    except ValueError:
        value = float(text)
        if not value.is_integer():
            raise
        return int(value)


def _integer_or_auto(text: str) -> int | str:
    return text if text == "auto" else _integer(text)


_integer.__name__ = _integer_or_auto.__name__ = "integer"  # argparse names the type in its message

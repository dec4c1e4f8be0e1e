"""The `pydqn` command. Only this package prints or exits."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import sys
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydqn._util.machine import bound_spinning
from pydqn.cli.errors import BROKEN_PIPE, INTERRUPTED, USER_ERRORS, print_error
from pydqn.cli.imports import import_modules
from pydqn.cli.options import SECTIONS, given_settings, make_parser, run_overrides
from pydqn.cli.play import play
from pydqn.cli.train import train
from pydqn.config import Config
from pydqn.presets import PRESETS, preset, preset_and_note


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    bound_spinning()  # before any command imports torch
    commands = {
        "presets": presets,
        "train": train,
        "play": play,
        "evaluate": evaluate,
        "export": export,
        "plot": plot,
        "bench": bench,
    }
    arguments = make_parser(commands).parse_args(argv)
    try:
        with _one_line_warnings():
            try:
                import_modules(arguments)
                return int(arguments.run(arguments) or 0)
            except BrokenPipeError:
                raise
            except USER_ERRORS as error:
                return print_error(error)
    except BrokenPipeError:  # the reader has closed the pipe: `pydqn presets nature | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        return INTERRUPTED


@contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Show each warning as one line; those of environments that fail to close come last, after the results."""
    late: list[Warning | str] = []

    def show(message: Warning | str, category: type[Warning], *_: Any) -> None:
        if category.__name__ == "CloseWarning":  # not imported: its module imports Gymnasium, which few commands need
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


def presets(arguments: argparse.Namespace) -> None:
    """List the presets, print the settings of one, or what two differ in."""
    if arguments.diff:
        _print_differences(*arguments.diff)
        return
    if arguments.preset is None:
        for name, entry in PRESETS.items():
            print(f"{name:18} {entry.summary}\n{'':18} {entry.source}")
        return
    config = preset(arguments.preset)
    print(f"# {PRESETS[arguments.preset].source}")
    names = [field.name for field in dataclasses.fields(Config)]
    width = max(map(len, names))
    columns = max(80, shutil.get_terminal_size((120, 24)).columns)
    for field in dataclasses.fields(Config):
        if field.name in SECTIONS:
            print(f"\n{SECTIONS[field.name]}")
        start = f"{field.name:{width}}  {_shown(config, field.name):15} "
        indent = " " * (width + 18)
        print(textwrap.fill(field.metadata["help"], columns, initial_indent=start, subsequent_indent=indent))


def _print_differences(one: str, other: str) -> None:
    configs = (preset(one), preset(other))
    rows = [(field.name, *(_shown(config, field.name) for config in configs)) for field in dataclasses.fields(Config)]
    rows = [("", one, other), *(row for row in rows if row[1] != row[2])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{text:{width}}" for text, width in zip(row, widths, strict=True)).rstrip())


def _shown(config: Config, name: str) -> str:
    """Return the value of a field as the command line takes it."""
    value = getattr(config, name)
    return (" ".join(map(str, value)) or "none") if isinstance(value, tuple) else str(value)


def evaluate(arguments: argparse.Namespace) -> None:
    """Evaluate a run; prints the scores and adds them to those of its folder."""
    import statistics

    from pydqn.evaluation.evaluate import append_score, score

    result = score(
        arguments.folder,
        arguments.episodes,
        protocol=arguments.protocol,
        weights=arguments.weights,
        seed=arguments.seed,
        **run_overrides(arguments),
    )
    returns = result.returns
    deviation = statistics.stdev(returns) if len(returns) > 1 else 0.0
    normalized = result.human_normalized_percent
    print(
        f"{len(returns)} episodes: mean return {result.mean_return:.2f}, standard deviation {deviation:.2f}, "
        f"from {min(returns):g} to {max(returns):g}" + ("" if normalized is None else f"; {normalized:.1f}% of human")
    )
    print(f"protocol {result.protocol}: {', '.join(f'{name} {value}' for name, value in result.settings.items())}")
    try:
        append_score(arguments.folder, result)
    except OSError as error:  # the scores have been printed, so this is no failure
        print(f"pydqn: warning: these scores could not be kept: {error}", file=sys.stderr)


def export(arguments: argparse.Namespace) -> None:
    """Write a run's policy to a file."""
    from pydqn.evaluation.export import export as exported

    written = exported(arguments.folder, arguments.output, weights=arguments.weights)
    inputs = ", ".join(f"{name} {described}" for name, described in written.inputs.items())
    print(f"exported: {written.path}: {inputs} -> values float32 (batch, {written.num_actions})")
    print(f"checked: its values differ from the policy's by at most {written.largest_difference:.1e}")


def plot(arguments: argparse.Namespace) -> None:
    """Draw learning curves or a value function."""
    if arguments.values:
        from pydqn.plotting.values import plot_values, values_of

        if len(arguments.runs) != 1:
            raise ValueError(f"values: expected one RUN, got {len(arguments.runs)}")
        plot_values(values_of(arguments.runs[0]), arguments.output)
    else:
        from pydqn.plotting.curves import plot_runs

        plot_runs(arguments.runs, arguments.output, panels=arguments.panels, each=arguments.each)
    print(f"drawn: {os.fspath(arguments.output)}")


def bench(arguments: argparse.Namespace) -> None:
    """Measure the stages of a preset."""
    import datetime

    from pydqn._util.files import write_json
    from pydqn.runs.provenance import provenance
    from pydqn.training.benchmark import measure

    if not arguments.seconds > 0:
        raise ValueError(f"seconds: expected a positive number, got {arguments.seconds}")
    if arguments.output and not Path(arguments.output).absolute().parent.is_dir():
        raise ValueError(f"output: there is no folder {str(Path(arguments.output).parent)!r}")
    config, note = preset_and_note(arguments.preset, given_settings(arguments))
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

"""`pydqn play`: one episode, drawn in the terminal or recorded."""

from __future__ import annotations

import argparse
import math
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from pydqn.cli.options import run_overrides
from pydqn.cli.terminal import Terminal

if TYPE_CHECKING:
    from pydqn.evaluation.play import PlayedEpisode


def play(arguments: argparse.Namespace) -> None:
    """Play one episode with the weights of a run."""
    from pydqn.evaluation.play import PlayedEpisode, play_episode
    from pydqn.plotting.action_values import beside
    from pydqn.plotting.images import Caption
    from pydqn.plotting.recording import Recorder

    if arguments.fps is not None and arguments.fps < 1:
        raise ValueError(f"fps: expected at least 1, got {arguments.fps}")
    show = (not arguments.record and sys.stdout.isatty()) if arguments.show is None else arguments.show
    terminal = Terminal() if show else None
    recorder: Recorder | None = None
    with ExitStack() as stack:
        steps = play_episode(
            arguments.folder,
            weights=arguments.weights,
            seed=arguments.seed,
            most_steps=math.inf if arguments.most_steps is None else arguments.most_steps,
            images=bool(show or arguments.record),
            **run_overrides(arguments),
        )
        for step in steps:
            if isinstance(step, PlayedEpisode):
                _print_episode(step)
                break
            if step.image is None:
                continue
            names, image, fps = step.action_names, step.image, arguments.fps or step.fps
            if arguments.q_values:
                image = beside(image, names, step.values, step.action, step.quantiles)
            if arguments.record:
                if recorder is None:
                    title = Path(arguments.folder).name
                    recorder = stack.enter_context(Recorder(arguments.record, fps, title=title, action_names=names))
                caption = Caption(names[step.action], step.reward, step.total, step.values, step.quantiles)
                # A page draws the action values itself.
                recorder.add(step.image if Path(arguments.record).suffix == ".html" else image, caption)
            if terminal is not None:
                terminal.draw(image, fps)
    if arguments.record:
        print(f"recorded: {arguments.record}")


def _print_episode(episode: PlayedEpisode) -> None:
    total = "unfinished" if math.isnan(episode.total) else f"{episode.total:g}"
    counts = " ".join(f"{action}:{count}" for action, count in episode.action_counts.items())
    print(f"total reward {total} in {episode.steps} steps; actions {counts}")

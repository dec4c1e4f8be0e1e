"""Starting, resuming and following runs from Python."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydqn.config import Config
from pydqn.envs.own import MakeEnv, registered
from pydqn.envs.tasks import with_overrides
from pydqn.evaluation.build import MakeNetwork
from pydqn.runs.layout import env_id_of, load_run, run_of
from pydqn.runs.locks import FolderLock
from pydqn.runs.logs import Report
from pydqn.runs.result import Result
from pydqn.training.base import BaseRun
from pydqn.training.loop import Run
from pydqn.training.signals import deferred
from pydqn.training.tabular import TabularRun


def train(
    config: Config,
    logdir: str | os.PathLike[str],
    *,
    make_env: MakeEnv | None = None,
    network: MakeNetwork | None = None,
) -> Result:
    """Train from scratch; see `BaseRun` for the files in `logdir`.

    Args:
        config: what to run.
        logdir: folder of the run.
        make_env: returns a new Gymnasium environment at each call, instead of `config.env_id`; may be a class. It gets
            `config.env_kwargs` and, if it takes that argument, `render_mode="rgb_array"` where images are needed.
        network: `network(space, num_actions)` returns the module to train, instead of `config.network`. The space is
            that of one observation: (stack, *frame_shape), or a Dict of such parts. The module takes a batch of them as
            the replay buffer holds them, (B, stack, *frame_shape), and returns (B, num_actions) values.

    Raises:
        ValueError: the configuration cannot run on this machine, or `logdir` already holds a run.
        FolderInUse: another run is writing in `logdir` (a ValueError that names it).
    """
    with _with_environment(config, make_env) as config:
        return _finish(open_run(config, logdir, network=network))


def resume(
    logdir: str | os.PathLike[str],
    *,
    make_env: MakeEnv | None = None,
    network: MakeNetwork | None = None,
    **overrides: Any,
) -> Result:
    """Resume a run from its latest checkpoint, with fields of its `Config` replaced by `overrides`.

    Args:
        logdir: folder of the run; or one of its checkpoints: the run then resumes from that one, and everything later
            is removed.
        make_env: see `train`. A run whose environment or network a function made needs that function again.
        network: see `train`.
        overrides: fields of the run's `Config` to replace.

    Raises:
        ValueError: `logdir` is not the folder of a run with a checkpoint, or the overrides do not fit it; or the
            checkpoint is damaged (the message names the file, and the checkpoint to resume instead).
    """
    folder, checkpoint = run_of(logdir)
    with registered(make_env, env_id_of(folder)) as environment:
        config = load_run(folder, **overrides, **environment)
        return _finish(open_run(config, folder, resume=checkpoint or True, network=network))


def run(
    config: Config,
    logdir: str | os.PathLike[str],
    *,
    resume: bool = False,
    make_env: MakeEnv | None = None,
    network: MakeNetwork | None = None,
) -> Generator[Report, None, Result]:
    """Train like `train`, yielding a `Report` at each logging period: for one's own progress, logs and stopping rules.

    Leaving the loop (`break`) saves everything and closes the run, which can then be resumed, if the generator is
    closed, as happens when nothing refers to it any more. A KeyboardInterrupt saves nothing beyond earlier checkpoints.

    Args:
        config: what to run.
        logdir: folder of the run.
        resume: go on from the latest checkpoint in `logdir`, with this config.
        make_env: see `train`.
        network: see `train`.

    Returns:
        The result, as the generator's return value.

    Raises:
        ValueError: see `train` and `resume`.
    """
    with (
        _with_environment(config, make_env) as config,
        open_run(config, logdir, resume=resume, network=network) as opened,
    ):
        yield from opened.reports()
    return opened.result()


def open_run(
    config: Config,
    logdir: str | os.PathLike[str] | FolderLock,
    *,
    resume: bool | Path = False,
    network: MakeNetwork | None = None,
) -> BaseRun:
    """Make a run of the kind that `config.agent` names."""
    kind = TabularRun if config.agent == "tabular" else Run
    return kind(config, logdir, resume=resume, network=network)


@contextmanager
def _with_environment(config: Config, make_env: MakeEnv | None) -> Iterator[Config]:
    """Yield `config` for the environment that `make_env` makes; what is reset is named in a warning."""
    with registered(make_env, config.env_id) as environment:
        kept = {"env_kwargs": config.env_kwargs} if environment else {}  # they are for the user's function
        config, note = with_overrides(config, "the config's", {**environment, **kept})
        if note:
            way_on = f"to keep them, make the config with env_id={config.env_id!r}"
            warnings.warn(f"make_env: {note} ({way_on})", stacklevel=4)
        yield config


def _finish(run: BaseRun) -> Result:
    """Run to the end. SIGINT and SIGTERM stop the run, and are raised again for the caller when everything is saved."""
    with deferred() as signals, run:
        signals.stop = run.stop
        for _ in run.reports():
            pass
    if signals.received is not None:
        signal.raise_signal(signals.received)
    return run.result()

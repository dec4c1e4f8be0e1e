"""Making the environments of a `Config`."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

from pydqn.config import Config
from pydqn.envs.atari import AtariEnvs
from pydqn.envs.base import Envs
from pydqn.envs.gym import GymEnvs
from pydqn.envs.ids import rom_of
from pydqn.envs.tasks import resolved
from pydqn.envs.workers import WorkerEnvs

_SLOW_SECONDS = 1e-3  # several steps of this length take longer than messages to other processes
_MOST_WORKERS = 64


def make_envs(config: Config, num_envs: int, seed: int, *, render: bool = False) -> Envs:
    """Make `num_envs` environments of `config.env_id`, each with its own seed derived from `seed`.

    Raises:
        ValueError: there is no such environment (similar names are given), or its spaces do not fit DQN.
    """
    rom, config = rom_of(config.env_id), resolved(config)
    if rom is not None:
        if config.env_kwargs != "{}":
            raise ValueError(
                f"env_kwargs: expected none for {config.env_id}, since the options of Atari games are settings of "
                f"their own (frame_skip, sticky_actions, full_action_space, ...), got {config.env_kwargs}"
            )
        if isinstance(config.env_workers, int) and config.env_workers:
            raise ValueError(
                f"env_workers: expected auto or 0 for {config.env_id}, got {config.env_workers}: Atari's emulators "
                "have threads of their own (emulator_threads)"
            )
        return AtariEnvs(rom, config, num_envs, seed, render=render)
    return _stepped(config, num_envs, seed, render)


def _stepped(config: Config, num_envs: int, seed: int, render: bool) -> Envs:
    """Make Gymnasium environments in this process, or in others if that is wanted or their steps are slow."""
    workers, auto = config.env_workers, config.env_workers == "auto" and num_envs > 1 and os.name == "posix"
    if workers == "auto" and config.restart_envs:  # only processes can be replaced
        workers = min(num_envs, _MOST_WORKERS)
    if isinstance(workers, int) and workers > 0:
        return WorkerEnvs(config, num_envs, seed, workers, render=render)
    envs = GymEnvs(config, num_envs, seed, render=render, most_seconds=_SLOW_SECONDS if auto else math.inf)
    if not auto or envs.step_seconds <= _SLOW_SECONDS:
        return envs
    envs.close()
    slow = WorkerEnvs(config, num_envs, seed, min(num_envs, _MOST_WORKERS), render=render)
    slow.stepping += f" (a step takes {1e3 * envs.step_seconds:.1f} ms)"
    return slow


@contextmanager
def advise_evaluating_after_training() -> Iterator[None]:
    """Add to the errors of making environments for evaluation, besides those of training, how to train without them."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        raise (ValueError if isinstance(error, ValueError) else RuntimeError)(
            f"{error} (this environment is for evaluation, besides those of training; if no more can be made, train "
            "with --evaluation-every-steps 0, in Python evaluation_every_steps=0, and evaluate the run afterwards)"
        ) from error

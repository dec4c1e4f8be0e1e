"""Making the environments that a config names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pydqn.config import Config
from pydqn.envs.atari import AtariEnvs
from pydqn.envs.base import Envs
from pydqn.envs.gym import GymEnvs
from pydqn.envs.ids import rom_of
from pydqn.envs.tasks import resolved


def make_envs(config: Config, num_envs: int, seed: int, *, render: bool = False) -> Envs:
    """Make `num_envs` environments of `config.env_id`, each with its own seed derived from `seed`.

    Raises:
        ValueError: no such environment (near matches are named), or its spaces do not fit DQN.
    """
    rom, config = rom_of(config.env_id), resolved(config)
    if rom is not None:
        return AtariEnvs(rom, config, num_envs, seed, render=render)
    return GymEnvs(config, num_envs, seed, render=render)


@contextmanager
def beside_learning() -> Iterator[None]:
    """Let environments for evaluation that cannot be made beside those that learn say how to train without them."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        raise (ValueError if isinstance(error, ValueError) else RuntimeError)(
            f"{error} (this one was for evaluation, beside those that learn: where no more can exist, train with "
            "--evaluation-every-steps 0, in Python evaluation_every_steps=0, and evaluate the run when it is over)"
        ) from error

"""Evaluation: the returns of whole episodes under a protocol."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pydqn._util.checks import integer
from pydqn._util.files import append_line
from pydqn.config import Config
from pydqn.envs.base import Envs
from pydqn.envs.ids import rom_of
from pydqn.envs.make import make_envs
from pydqn.envs.own import MakeEnv, registered
from pydqn.evaluation.build import MakeNetwork, trained_policy
from pydqn.evaluation.play import policy_steps
from pydqn.evaluation.protocols import PROTOCOLS, under_protocol, warn_if_cut
from pydqn.evaluation.scores import human_normalized
from pydqn.learning.policy import Policy, torch_threads
from pydqn.runs.layout import SCORES, env_id_of, load_run

_MOST_ENVS = 16


def evaluation_envs(config: Config, episodes: int, seed: int) -> Envs:
    """Make environments to play `episodes` episodes in, under `config.evaluation_protocol`.

    There are at most as many as the run has, since some simulators allow no more; this limit is not for Atari.
    """
    most = _MOST_ENVS if rom_of(config.env_id) is not None else min(config.num_envs, _MOST_ENVS)
    return make_envs(under_protocol(config), min(episodes, most), seed)


def evaluate_policy(
    config: Config,
    policy: Policy,
    episodes: int,
    seed: int,
    stop: Callable[[], bool] = lambda: False,
    envs: Envs | None = None,
) -> list[float]:
    """Play whole episodes under `config.evaluation_protocol` and return their true returns.

    Every environment plays a fixed share of the episodes, so that short episodes are not preferred.

    Args:
        config: the run's config.
        policy: the policy that plays.
        episodes: how many episodes to play.
        seed: seed of the environments and of exploration.
        stop: called after every step; once it returns True, evaluation ends with the returns so far.
        envs: `evaluation_envs` of these arguments, which stay open; None to make them and close them.
    """
    if envs is None:
        envs = evaluation_envs(config, episodes, seed)
        try:
            return evaluate_policy(config, policy, episodes, seed, stop, envs)
        finally:
            envs.close()
    own, config = config, under_protocol(config)
    num_envs = envs.num_envs
    left = np.array([len(range(env_index, episodes, num_envs)) for env_index in range(num_envs)])
    returns: list[float] = []
    for step in policy_steps(config, envs, policy, config.evaluation_epsilon, seed):
        for episode in step.episodes:
            warn_if_cut(own, episode.steps)
            if left[episode.env_index] > 0:
                left[episode.env_index] -= 1
                returns.append(episode.total)
        if stop() or not (left > 0).any():
            return returns
    raise AssertionError("unreachable: policy_steps has no end")


class Score(NamedTuple):
    """The result of an evaluation, and the settings that it depends on."""

    env_id: str
    protocol: str
    settings: dict[str, Any]  # those that protocols fix, and the number of environments
    seed: int
    trained_steps: int  # for how many steps the weights had been trained
    returns: list[float]  # true returns of whole episodes
    mean_return: float
    human_normalized_percent: float | None  # for the games of Mnih et al. 2015


def score(
    run: str | os.PathLike[str],
    episodes: int | None = None,
    *,
    protocol: str | None = None,
    weights: str | None = None,
    seed: int = 0,
    make_env: MakeEnv | None = None,
    network: MakeNetwork | None = None,
    **overrides: Any,
) -> Score:
    """Evaluate a run.

    Args:
        run: folder of the run.
        episodes: how many episodes to play; None for as many as the protocol says.
        protocol: a name of `pydqn.evaluation.protocols.PROTOCOLS`; None for that of the run's config.
        weights: see `trained_policy`.
        seed: seed of the environments and of exploration.
        make_env: see `pydqn.train`. A run whose environment or network a function made needs that function again.
        network: see `pydqn.train`.
        overrides: fields of the run's `Config` to replace, except those that the protocol fixes.

    Raises:
        ValueError: `run` is not the folder of a run with weights, or an argument is out of range.
    """
    with registered(make_env, env_id_of(run)) as environment:
        overrides = {**overrides, **environment, **({} if protocol is None else {"evaluation_protocol": protocol})}
        return _score(run, load_run(run, **overrides), episodes, weights, seed, network, overrides)


def _score(
    run: str | os.PathLike[str],
    config: Config,
    episodes: int | None,
    weights: str | None,
    seed: int,
    network: MakeNetwork | None,
    overrides: dict[str, Any],
) -> Score:
    rules = PROTOCOLS[config.evaluation_protocol]
    rom = rom_of(config.env_id)
    if rom is None and rules.settings:
        raise ValueError(f"protocol: {config.evaluation_protocol} is for Atari games, the run is of {config.env_id}")
    for name, value in overrides.items():
        if rules.settings.get(name, value) != value:
            raise ValueError(f"{name}: the protocol {config.evaluation_protocol} fixes it, got {value}; choose another")
    episodes = integer("episodes", rules.episodes if episodes is None else episodes, 1)
    integer("seed", seed, 0)
    played = under_protocol(config)
    envs = evaluation_envs(config, episodes, seed)
    try:
        policy, metadata = trained_policy(run, played, envs, weights, network)
        with torch_threads(config, policy.network):
            returns = evaluate_policy(config, policy, episodes, seed, envs=envs)
    finally:
        envs.close()
    mean = float(np.mean(returns))
    reported = [*PROTOCOLS["nature"].settings] if rom is not None else ["evaluation_epsilon", "max_episode_steps"]
    reported += [] if config.env_kwargs == "{}" else ["env_kwargs"]
    return Score(
        env_id=config.env_id,
        protocol=config.evaluation_protocol,
        settings={**{name: getattr(played, name) for name in reported}, "num_envs": envs.num_envs},
        seed=seed,
        trained_steps=int(metadata.get("steps", 0)),
        returns=returns,
        mean_return=mean,
        human_normalized_percent=None if rom is None else human_normalized(rom, mean),
    )


def append_score(run: str | os.PathLike[str], score: Score) -> None:
    """Append a score to the run's scores.jsonl, as one line of JSON."""
    append_line(Path(run) / SCORES, json.dumps(score._asdict()))


def evaluate(
    run: str | os.PathLike[str],
    episodes: int,
    *,
    seed: int = 0,
    make_env: MakeEnv | None = None,
    network: MakeNetwork | None = None,
    **overrides: Any,
) -> list[float]:
    """Return the true returns of whole episodes played with a run's best weights; see `score` for all options.

    Raises:
        ValueError: `run` is not the folder of a run with weights, or `episodes` is not positive.
    """
    return score(run, episodes, seed=seed, make_env=make_env, network=network, **overrides).returns

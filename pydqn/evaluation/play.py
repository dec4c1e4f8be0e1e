"""Playing episodes with a policy, step by step."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pydqn._util.checks import integer
from pydqn.config import Config
from pydqn.envs.base import Envs, Episode
from pydqn.envs.make import make_envs
from pydqn.envs.own import MakeEnv, registered
from pydqn.evaluation.build import MakeNetwork, replay_settings, trained_policy
from pydqn.evaluation.protocols import under_protocol, warn_if_cut
from pydqn.learning.policy import Actor, Policy
from pydqn.learning.records import MASKED
from pydqn.replay.device import DeviceReplay
from pydqn.replay.frames import FrameReplay
from pydqn.runs.layout import env_id_of, load_run


def start_episodes(envs: Envs, replay: FrameReplay | DeviceReplay, seed: int | None = None) -> None:
    """Start an episode in every environment (see `Envs.reset`) and append the first frames to the replay buffer."""
    slot = replay.next_slot()
    envs.reset(slot, seed)
    nothing, everything = np.zeros(envs.num_envs, np.int64), np.ones(envs.num_envs, np.bool_)
    replay.append(slot, nothing, nothing, ~everything, ~everything, everything)


class PolicyStep(NamedTuple):
    """One step of `policy_steps`."""

    action: NDArray[np.int64]  # (num_envs,)
    values: NDArray[np.float32]  # (num_envs, num_actions): the action values from which it was chosen
    quantiles: NDArray[np.float32] | None  # (num_envs, L): of the action's return, where wanted and known
    reward: NDArray[np.float64]  # (num_envs,): true rewards
    episodes: list[Episode]  # episodes that ended with this step


def policy_steps(
    config: Config, envs: Envs, policy: Policy, epsilon: float, seed: int, *, quantiles: bool = False
) -> Iterator[PolicyStep]:
    """Play without end, yielding every step, with `quantiles` of returns or without.

    `seed` is that of the environments and of exploration.
    """
    replay = FrameReplay(envs.num_envs * (config.stack + config.n_step), **replay_settings(config, envs))
    generator = np.random.default_rng(seed)
    start_episodes(envs, replay, seed)
    values_of = policy.values
    if config.evaluation_noise:
        values_of = Actor(policy, replay.latest(), capture=False, seed=seed).values
    while True:
        values = values_of(replay.latest()).copy()
        action = policy.choose(values, epsilon, generator)
        spread = policy.quantiles(replay.latest(), action) if quantiles else None
        envs.send(action)
        slot = replay.next_slot()
        step = envs.recv(slot)
        replay.append(slot, action, step.reward, step.terminated, step.truncated, step.first)
        yield PolicyStep(action, values, spread, step.reward, step.episodes)


def _shown(values: NDArray[np.float32]) -> tuple[float, ...]:
    """Return action values for people: minus infinity for actions that are not allowed."""
    return tuple(np.where(values == MASKED, -np.inf, values).tolist())


class PlayedStep(NamedTuple):
    """One step of `play_episode`."""

    image: NDArray[np.uint8] | None  # (H, W, 3), unless played without images
    fps: int  # steps per second at which a person would watch
    action: int
    action_names: tuple[str, ...]
    values: tuple[float, ...]  # the action values from which it was chosen; -inf where an action is not allowed
    reward: float
    total: float  # return so far
    quantiles: tuple[float, ...] = ()  # of the action's return, at even levels, if its distribution was learned


class PlayedEpisode(NamedTuple):
    """The episode that `play_episode` has played."""

    total: float  # its return; NaN if it was cut off
    steps: int
    action_counts: dict[str, int]


def play_episode(
    run: str | os.PathLike[str],
    *,
    weights: str | None = None,
    seed: int = 0,
    most_steps: float = math.inf,
    images: bool = True,
    make_env: MakeEnv | None = None,
    network: MakeNetwork | None = None,
    **overrides: Any,
) -> Iterator[PlayedStep | PlayedEpisode]:
    """Play one episode with a run's weights; yields a `PlayedStep` per step, and the `PlayedEpisode` at the end.

    Args:
        run: folder of the run.
        weights: see `trained_policy`.
        seed: seed of the environment and of exploration.
        most_steps: cut the episode off after so many steps.
        images: whether steps have images; not all environments can render them.
        make_env: see `pydqn.train`. A run whose environment or network a function made needs that function again.
        network: see `pydqn.train`.
        overrides: fields of the run's `Config` to replace.

    Raises:
        ValueError: `run` is not the folder of a run with weights, or an argument is out of range.
        RuntimeError: the environment failed, or cannot render images.
    """
    integer("seed", seed, 0)
    if not most_steps >= 1:
        raise ValueError(f"most_steps: expected at least 1, got {most_steps}")
    with ExitStack() as stack:
        environment = stack.enter_context(registered(make_env, env_id_of(run)))
        own = load_run(run, **overrides, **environment)
        config = under_protocol(own)
        envs = make_envs(config, 1, seed, render=images)
        stack.callback(envs.close)
        policy, _ = trained_policy(run, config, envs, weights, network)
        names = envs.action_names
        counts = dict.fromkeys(names, 0)
        total = 0.0
        played = policy_steps(config, envs, policy, config.evaluation_epsilon, seed, quantiles=images)
        for steps, step in enumerate(played, 1):
            action, reward = int(step.action[0]), float(step.reward[0])
            counts[names[action]] += 1
            total += reward
            image = envs.image() if images else None
            quantiles = () if step.quantiles is None else tuple(step.quantiles[0].tolist())
            yield PlayedStep(image, envs.fps, action, names, _shown(step.values[0]), reward, total, quantiles)
            if step.episodes:
                warn_if_cut(own, steps)
            if step.episodes or steps >= most_steps:
                yield PlayedEpisode(step.episodes[0].total if step.episodes else math.nan, steps, counts)
                return

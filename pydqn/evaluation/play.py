"""Playing: a policy in environments, step by step."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pydqn._util.checks import integer
from pydqn.config import Config
from pydqn.envs.base import Episode, Lanes
from pydqn.envs.make import make_lanes
from pydqn.evaluation.build import load_policy, memory_settings
from pydqn.evaluation.protocols import under_protocol, warn_if_cut
from pydqn.learning.policy import Policy
from pydqn.replay.frames import FrameReplay
from pydqn.runs.layout import load_run


def open_episodes(lanes: Lanes, memory: FrameReplay, seed: int | None = None) -> None:
    """Open an episode in every lane (see `Lanes.reset`) and put the first frames into the memory."""
    slot = memory.next_slot()
    lanes.reset(slot, seed)
    nothing, everything = np.zeros(lanes.num_envs, np.int64), np.ones(lanes.num_envs, np.bool_)
    memory.append(slot, nothing, nothing, ~everything, ~everything, everything)


class Moment(NamedTuple):
    """One step of `steps_of`."""

    action: NDArray[np.int64]  # (num_envs,): what the policy did
    values: NDArray[np.float32]  # (num_envs, num_actions): why
    reward: NDArray[np.float64]  # (num_envs,): what came of it
    episodes: list[Episode]  # games that ended


def steps_of(config: Config, lanes: Lanes, policy: Policy, epsilon: float, seed: int) -> Iterator[Moment]:
    """Play on and on from that seed, yielding every step. The first frames are there when the first is asked for."""
    memory = FrameReplay(lanes.num_envs * (config.stack + config.n_step), **memory_settings(config, lanes))
    generator = np.random.default_rng(seed)
    open_episodes(lanes, memory, seed)
    while True:
        values = policy.values(memory.latest())
        action = policy.choose(values, epsilon, generator)
        lanes.send(action)
        slot = memory.next_slot()
        step = lanes.recv(slot)
        memory.append(slot, action, step.reward, step.terminated, step.truncated, step.first)
        yield Moment(action, values, step.reward, step.episodes)


class Scene(NamedTuple):
    """One step of a game that is watched."""

    picture: NDArray[np.uint8] | None  # (H, W, 3), unless played without images
    fps: int  # at which the environment's steps are watched
    action: int
    action_names: tuple[str, ...]
    values: tuple[float, ...]  # by which the action was chosen
    reward: float
    total: float  # return so far


class Game(NamedTuple):
    """A game that was watched."""

    total: float  # NaN when it was broken off
    steps: int
    action_counts: dict[str, int]


def watch(
    run: str | os.PathLike[str],
    *,
    weights: str | None = None,
    seed: int = 0,
    most_steps: float = math.inf,
    images: bool = True,
    **overrides: Any,
) -> Iterator[Scene | Game]:
    """Play one game with a run's weights; yields a `Scene` per step, and the `Game` at the end.

    Args:
        run: folder of the run.
        weights: as for `load_policy`.
        seed: of the environment and of exploration.
        most_steps: break the game off after so many steps.
        images: whether scenes have pictures; without, any environment will do.
        overrides: fields of the run's `Config` to replace.

    Raises:
        ValueError: `run` is not the folder of a run with weights, or an argument is out of range.
        RuntimeError: the environment failed, or cannot draw itself.
    """
    integer("seed", seed, 0)
    if not most_steps >= 1:
        raise ValueError(f"most_steps: expected at least 1, got {most_steps}")
    own = load_run(run, **overrides, clip_rewards=False)
    config = under_protocol(own)
    lanes = make_lanes(config, 1, seed, render=images)
    try:
        policy, _ = load_policy(run, config, lanes, weights)
        names = lanes.action_names
        counts = dict.fromkeys(names, 0)
        total = 0.0
        for steps, moment in enumerate(steps_of(config, lanes, policy, config.evaluation_epsilon, seed), 1):
            action, reward = int(moment.action[0]), float(moment.reward[0])
            counts[names[action]] += 1
            total += reward
            picture = lanes.picture() if images else None
            yield Scene(picture, lanes.fps, action, names, tuple(moment.values[0].tolist()), reward, total)
            if moment.episodes:
                warn_if_cut(own, steps)
            if moment.episodes or steps >= most_steps:
                yield Game(moment.episodes[0].total if moment.episodes else math.nan, steps, counts)
                return
    finally:
        lanes.close()

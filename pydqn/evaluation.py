"""Playing with trained weights: evaluate and record. Needs a run's weights and config only."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pydqn.checkpoint import load_weights
from pydqn.config import Config
from pydqn.envs import Episode, Lanes, make_lanes
from pydqn.learner import Policy, resolve_device
from pydqn.networks import QNetwork, make_network
from pydqn.replay import FrameReplay

CONFIG = "config.json"
BEST_WEIGHTS = Path("weights") / "best.safetensors"
LAST_WEIGHTS = Path("weights") / "last.safetensors"
_MOST_LANES = 16


def network_for(config: Config, lanes: Lanes, seed: int = 0) -> QNetwork:
    """Build the network that `config` describes, for these lanes' frames and actions."""
    return make_network(
        config.network,
        config.stack,
        lanes.frame_shape,
        lanes.num_actions,
        hidden_units=config.hidden_units,
        dueling=config.dueling,
        pixel_mean=config.pixel_mean,
        pixel_std=config.pixel_std,
        seed=seed,
    )


def memory_for(config: Config, lanes: Lanes, capacity: int, seed: int = 0) -> FrameReplay:
    """Build a replay memory for these lanes, in which acting and learning find the same stacks."""
    return FrameReplay(
        capacity,
        lanes.frame_shape,
        stack=config.stack,
        n_step=config.n_step,
        gamma=config.gamma,
        num_envs=lanes.num_envs,
        dtype=lanes.dtype,
        padding=config.padding,
        seed=seed,
    )


def open_episodes(lanes: Lanes, memory: FrameReplay) -> None:
    """Open an episode in every lane and put the first frames into the memory."""
    slot = memory.next_slot()
    lanes.reset(slot)
    nothing, everything = np.zeros(lanes.num_envs, np.int64), np.ones(lanes.num_envs, np.bool_)
    memory.append(slot, nothing, nothing, ~everything, ~everything, everything)


def load_run(run: str | os.PathLike[str], **overrides: Any) -> Config:
    """Read the `Config` of a run's folder, with fields replaced by `overrides`.

    Raises:
        ValueError: `run` is not the folder of a run, or its config is not valid.
    """
    path = Path(run) / CONFIG
    try:
        plain = json.loads(path.read_text())
    except OSError:
        raise ValueError(f"run: {str(run)!r} is not the folder of a run (it has no {CONFIG})") from None
    except (ValueError, RecursionError):
        raise ValueError(f"run: {path} is not JSON") from None
    if not isinstance(plain, dict):
        raise ValueError(f"run: {path} is not a run's config")
    return dataclasses.replace(Config.from_dict(plain), **overrides)


def load_policy(run: str | os.PathLike[str], config: Config, lanes: Lanes) -> Policy:
    """Build the policy of a run from its best weights, or from its last ones when it was too short to have a best.

    Raises:
        ValueError: there are no weights, or they do not fit `config`.
    """
    paths = [path for name in (BEST_WEIGHTS, LAST_WEIGHTS) if (path := Path(run) / name).is_file()]
    if not paths:
        raise ValueError(f"run: {str(run)!r} has no weights yet")
    network = network_for(config, lanes)
    weights, _ = load_weights(paths[0])
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"run: {paths[0]} does not fit its config ({str(error).splitlines()[1].strip()})") from None
    if config.torch_threads:
        torch.set_num_threads(config.torch_threads)
    return Policy(network, resolve_device(config.device), config.precision)


class Moment(NamedTuple):
    """One step of `steps_of`."""

    action: NDArray[np.int64]  # (num_envs,): what the policy did
    episodes: list[Episode]  # games that ended


def steps_of(config: Config, lanes: Lanes, policy: Policy, epsilon: float, seed: int) -> Iterator[Moment]:
    """Play on and on, yielding every step. The first frames are there when the first step is asked for."""
    memory = memory_for(config, lanes, lanes.num_envs * (config.stack + config.n_step))
    generator = np.random.default_rng(seed)
    open_episodes(lanes, memory)
    while True:
        action = policy.act(memory.latest(), epsilon, generator)
        lanes.send(action)
        slot = memory.next_slot()
        step = lanes.recv(slot)
        memory.append(slot, action, step.reward, step.terminated, step.truncated, step.first)
        yield Moment(action, step.episodes)


def evaluate_policy(config: Config, policy: Policy, episodes: int, seed: int) -> list[float]:
    """Play whole games at `config.evaluation_epsilon` and return their true returns.

    Every lane plays a fixed share of the games, so that short games are not preferred.
    """
    num_envs = min(episodes, _MOST_LANES)
    lanes = make_lanes(config, num_envs, seed)
    left = np.array([len(range(lane, episodes, num_envs)) for lane in range(num_envs)])
    returns: list[float] = []
    try:
        for moment in steps_of(config, lanes, policy, config.evaluation_epsilon, seed):
            for episode in moment.episodes:
                if left[episode.lane] > 0:
                    left[episode.lane] -= 1
                    returns.append(episode.total)
            if not (left > 0).any():
                return returns
    finally:
        lanes.close()
    raise AssertionError("unreachable: steps_of has no end")


def evaluate(run: str | os.PathLike[str], episodes: int, *, seed: int = 0, **overrides: Any) -> list[float]:
    """Return the true returns of `episodes` whole games played with a run's best weights.

    Raises:
        ValueError: `run` is not the folder of a run with weights, or `episodes` is not positive.
    """
    _require("episodes", episodes, 1)
    _require("seed", seed, 0)
    config = load_run(run, **overrides)
    lanes = make_lanes(config, 1, seed)
    try:
        policy = load_policy(run, config, lanes)
    finally:
        lanes.close()
    return evaluate_policy(config, policy, episodes, seed)


def _require(name: str, value: float, least: int) -> None:
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


class Game(NamedTuple):
    """A game that was watched."""

    total: float
    steps: int
    action_counts: list[int]


def watch(
    run: str | os.PathLike[str], *, seed: int = 0, most_steps: float = math.inf, **overrides: Any
) -> Iterator[NDArray[np.uint8] | Game]:
    """Play one game with a run's best weights; yields a picture (H, W, 3) per step, and at the end the `Game`."""
    _require("seed", seed, 0)
    _require("most_steps", most_steps, 1)
    config = load_run(run, **overrides)
    lanes = make_lanes(config, 1, seed, render=True)
    try:
        policy = load_policy(run, config, lanes)
        counts = [0] * lanes.num_actions
        for moment in steps_of(config, lanes, policy, config.evaluation_epsilon, seed):
            counts[int(moment.action[0])] += 1
            yield lanes.picture()
            if moment.episodes or sum(counts) >= most_steps:
                total = moment.episodes[0].total if moment.episodes else math.nan
                yield Game(total, sum(counts), counts)
                return
    finally:
        lanes.close()


class Recorder:
    """Writes pictures to an .mp4 or .gif file; needs no display. The file appears when the block ends well."""

    def __init__(self, path: str | os.PathLike[str], fps: int = 30, scale: int = 2) -> None:
        self._path = Path(path)
        if self._path.suffix not in (".mp4", ".gif"):
            raise ValueError(f"record: expected a name that ends in .mp4 or .gif, got {str(path)!r}")
        if not self._path.parent.is_dir():
            raise ValueError(f"record: there is no folder {str(self._path.parent)!r}")
        self._beside = self._path.with_name(f".{self._path.stem}.part{self._path.suffix}")
        self._fps = fps
        self._scale = scale
        self._writer: Any = None

    def __enter__(self) -> Recorder:
        import imageio

        if self._path.suffix == ".gif":
            self._writer = imageio.get_writer(self._beside, mode="I", duration=1000 / self._fps, loop=0)
        else:
            self._writer = imageio.get_writer(self._beside, fps=self._fps, macro_block_size=2)
        return self

    def add(self, picture: NDArray[np.uint8]) -> None:
        """Append one picture, enlarged without smoothing."""
        self._writer.append_data(picture.repeat(self._scale, axis=0).repeat(self._scale, axis=1))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._writer.close()
        if kind is None:
            os.replace(self._beside, self._path)
        else:
            self._beside.unlink(missing_ok=True)

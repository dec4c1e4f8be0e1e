"""Playing with trained weights: evaluate and watch. Needs a run's weights and config only."""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pydqn.runs.checkpoint import latest_checkpoint, load_checkpoint, load_weights
from pydqn.config import Config
from pydqn.envs.gym import make_lanes
from pydqn._util.files import Damaged, read_json
from pydqn.envs.ids import rom_of
from pydqn.envs.base import Episode, Lanes
from pydqn.learning.networks import QNetwork, Table, make_network
from pydqn.learning.policy import Policy, resolve_device, torch_threads
from pydqn.replay.frames import FrameReplay
from pydqn.evaluation.scores import PROTOCOLS, human_normalized
from pydqn.envs.tasks import episode_limit, with_overrides

CONFIG = "config.json"
BEST_WEIGHTS = Path("weights") / "best.safetensors"
LAST_WEIGHTS = Path("weights") / "last.safetensors"
WEIGHTS = ("best", "last", "checkpoint")
SCORES = "scores.jsonl"
_MOST_LANES = 16


def network_for(config: Config, lanes: Lanes, seed: int = 0) -> QNetwork | Table:
    """Build the network (or table) that `config` describes, for these lanes' frames and actions."""
    if config.agent == "tabular":
        return Table(lanes.frame_shape[0], lanes.num_actions)
    return make_network(
        config.network,
        config.stack,
        lanes.frame_shape,
        lanes.num_actions,
        hidden_units=config.hidden_units,
        dueling=config.dueling,
        pixel_mean=config.pixel_mean,
        pixel_std=config.pixel_std,
        input_range=lanes.input_range,
        seed=seed,
    )


def memory_settings(config: Config, lanes: Lanes) -> dict[str, Any]:
    """Return what a replay memory for these lanes is made with, so that acting and learning find the same stacks."""
    return {
        "frame_shape": lanes.frame_shape,
        "stack": config.stack,
        "n_step": config.n_step,
        "gamma": config.gamma,
        "num_envs": lanes.num_envs,
        "dtype": lanes.dtype,
        "padding": config.padding,
        "prioritized": config.prioritized,
        "alpha": config.priority_alpha,
        "beta": config.priority_beta,
    }


def open_episodes(lanes: Lanes, memory: FrameReplay, seed: int | None = None) -> None:
    """Open an episode in every lane (see `Lanes.reset`) and put the first frames into the memory."""
    slot = memory.next_slot()
    lanes.reset(slot, seed)
    nothing, everything = np.zeros(lanes.num_envs, np.int64), np.ones(lanes.num_envs, np.bool_)
    memory.append(slot, nothing, nothing, ~everything, ~everything, everything)


def load_run(run: str | os.PathLike[str], **overrides: Any) -> Config:
    """Read the `Config` of a run's folder, with fields replaced by `overrides`.

    With another environment (`env_id`), settings that belong to the run's own become neutral ones, as in
    `pydqn.presets.preset`, and a UserWarning names them; not pixel_mean and pixel_std, with which the run's weights
    have learned.

    Raises:
        ValueError: `run` is not the folder of a run, or its config is not valid.
    """
    path = Path(run) / CONFIG
    if not path.exists():
        raise ValueError(f"run: {str(run)!r} is not the folder of a run (it has no {CONFIG})")
    plain = read_json(path)
    if not isinstance(plain, dict):
        raise ValueError(f"run: {path} is not a run's config")
    config = Config.from_dict(plain)
    trained = {name: getattr(config, name) for name in ("pixel_mean", "pixel_std")}
    config, note = with_overrides(config, "the run's", {**trained, **overrides})
    if note:
        warnings.warn(f"run: {note}", stacklevel=2)
    return config


def load_policy(
    run: str | os.PathLike[str], config: Config, lanes: Lanes, weights: str | None = None
) -> tuple[Policy, dict[str, Any]]:
    """Build the policy of a run.

    Args:
        run: folder of the run.
        config: its config.
        lanes: for the shapes of frames and actions.
        weights: one of `WEIGHTS`; None for the best ones, or where the run was too short to have a best, its newest.

    Returns:
        The policy and what was written beside the weights.

    Raises:
        ValueError: there are no such weights, or they do not fit `config`.
    """
    if weights is not None and weights not in WEIGHTS:
        raise ValueError(f"weights: expected one of {', '.join(WEIGHTS)}, got {weights!r}")
    best = _from_file(run, BEST_WEIGHTS) if weights in (None, "best") else None
    last = _from_file(run, LAST_WEIGHTS) if weights in (None, "last") and best is None else None
    kept = None
    if weights in (None, "checkpoint") and best is None:
        with suppress(*([Damaged] if last is not None else [])):  # then that will do
            kept = _from_checkpoint(run)
    found = [candidate for candidate in (best, last, kept) if candidate is not None]
    if not found:
        raise ValueError(f"run: {str(run)!r} has no {'' if weights is None else weights + ' '}weights yet")
    tensors, metadata = max(found, key=lambda candidate: candidate[1].get("steps", 0))
    network = network_for(config, lanes)
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise ValueError(f"run: the weights in {str(run)!r} do not fit its config ({reason})") from None
    return Policy(network, resolve_device(config.device), config.precision), metadata


def _from_file(run: str | os.PathLike[str], name: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    path = Path(run) / name
    return load_weights(path) if path.is_file() else None


def _from_checkpoint(run: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """Return what acts, of all that the latest checkpoint holds."""
    path = latest_checkpoint(run)
    if path is None:
        return None
    checkpoint = load_checkpoint(path)
    online = {name: tensor for name, tensor in checkpoint.tensors.items() if name.startswith("online.")}
    return {name.removeprefix("online."): tensor for name, tensor in online.items()}, checkpoint.state


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


def under_protocol(config: Config) -> Config:
    """Return `config` as evaluation plays: with what its protocol fixes, and a limit of steps where it has none."""
    config = dataclasses.replace(config, **PROTOCOLS[config.evaluation_protocol].settings)
    if episode_limit(config) is None:  # a policy may go on for ever
        config = dataclasses.replace(config, max_episode_steps=config.evaluation_max_episode_steps)
    return config


def warn_if_cut(config: Config, steps: int) -> None:
    """Warn when a game of `steps` decisions, played `under_protocol(config)`, was cut for want of another limit."""
    if episode_limit(config) is None and 0 < config.evaluation_max_episode_steps <= steps:
        warnings.warn(
            f"evaluation_max_episode_steps: {config.env_id} has no limit of steps of its own, and a game of an "
            f"evaluation was cut after {steps:,}; its return counts as it is (0 for no cut)",
            stacklevel=2,
        )


def evaluation_lanes(config: Config, episodes: int, seed: int) -> Lanes:
    """Make the environments in which so many games are played under `config.evaluation_protocol`.

    They are at most as many as the run has: of some simulators no more can exist. (Of Atari's emulators they can.)
    """
    most = _MOST_LANES if rom_of(config.env_id) is not None else min(config.num_envs, _MOST_LANES)
    return make_lanes(under_protocol(config), min(episodes, most), seed)


def evaluate_policy(
    config: Config,
    policy: Policy,
    episodes: int,
    seed: int,
    stop: Callable[[], bool] = lambda: False,
    lanes: Lanes | None = None,
) -> list[float]:
    """Play whole games under `config.evaluation_protocol` and return their true returns.

    Every environment plays a fixed share of the games, so that short games are not preferred.

    Args:
        config: of the run.
        policy: what plays.
        episodes: whole games.
        seed: of the environments and of exploration.
        stop: once it returns True, the returns of games that have ended so far are returned.
        lanes: `evaluation_lanes` of these arguments, which stay open; None to make some and release them.
    """
    if lanes is None:
        lanes = evaluation_lanes(config, episodes, seed)
        try:
            return evaluate_policy(config, policy, episodes, seed, stop, lanes)
        finally:
            lanes.close()
    own, config = config, under_protocol(config)
    num_envs = lanes.num_envs
    left = np.array([len(range(lane, episodes, num_envs)) for lane in range(num_envs)])
    returns: list[float] = []
    for moment in steps_of(config, lanes, policy, config.evaluation_epsilon, seed):
        for episode in moment.episodes:
            warn_if_cut(own, episode.steps)
            if left[episode.lane] > 0:
                left[episode.lane] -= 1
                returns.append(episode.total)
        if stop() or not (left > 0).any():
            return returns
    raise AssertionError("unreachable: steps_of has no end")


class Score(NamedTuple):
    """What an evaluation came to, with all that it depends on."""

    env_id: str
    protocol: str
    settings: dict[str, Any]  # what a protocol fixes, or as the run's own config has it; how many environments played
    seed: int
    trained_steps: int  # how long the weights had been trained
    returns: list[float]  # true returns of whole games
    mean_return: float
    human_normalized_percent: float | None  # where the game is among those of Mnih et al. 2015


def score(
    run: str | os.PathLike[str],
    episodes: int | None = None,
    *,
    protocol: str | None = None,
    weights: str | None = None,
    seed: int = 0,
    **overrides: Any,
) -> Score:
    """Evaluate a run.

    Args:
        run: folder of the run.
        episodes: whole games; None for as many as the protocol says.
        protocol: a name of `pydqn.evaluation.scores.PROTOCOLS`; None for that of the run's config.
        weights: as for `load_policy`.
        seed: of the environments and of exploration.
        overrides: fields of the run's `Config` to replace; not those that the protocol fixes.

    Raises:
        ValueError: `run` is not the folder of a run with weights, or an argument is out of range.
    """
    config = load_run(run, **overrides, **({} if protocol is None else {"evaluation_protocol": protocol}))
    rules = PROTOCOLS[config.evaluation_protocol]
    rom = rom_of(config.env_id)
    if rom is None and rules.settings:
        raise ValueError(f"protocol: {config.evaluation_protocol} is for Atari games, the run is of {config.env_id}")
    for name, value in overrides.items():
        if rules.settings.get(name, value) != value:
            raise ValueError(f"{name}: the protocol {config.evaluation_protocol} fixes it, got {value}; choose another")
    games = rules.episodes if episodes is None else episodes
    _require("episodes", games, 1)
    _require("seed", seed, 0)
    played = under_protocol(config)
    lanes = evaluation_lanes(config, games, seed)
    try:
        policy, metadata = load_policy(run, played, lanes, weights)
        with torch_threads(config):
            returns = evaluate_policy(config, policy, games, seed, lanes=lanes)
    finally:
        lanes.close()
    mean = float(np.mean(returns))
    told = PROTOCOLS["nature"].settings if rom is not None else ("evaluation_epsilon", "max_episode_steps")
    return Score(
        env_id=config.env_id,
        protocol=config.evaluation_protocol,
        settings={**{name: getattr(played, name) for name in told}, "num_envs": lanes.num_envs},
        seed=seed,
        trained_steps=int(metadata.get("steps", 0)),
        returns=returns,
        mean_return=mean,
        human_normalized_percent=None if rom is None else human_normalized(rom, mean),
    )


def evaluate(run: str | os.PathLike[str], episodes: int, *, seed: int = 0, **overrides: Any) -> list[float]:
    """Return the true returns of `episodes` whole games played with a run's best weights; `score` tells more.

    Raises:
        ValueError: `run` is not the folder of a run with weights, or `episodes` is not positive.
    """
    return score(run, episodes, seed=seed, **overrides).returns


def _require(name: str, value: float, least: int) -> None:
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


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
    _require("seed", seed, 0)
    _require("most_steps", most_steps, 1)
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

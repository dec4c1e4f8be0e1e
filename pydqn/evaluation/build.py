"""Building what a config describes: networks, settings of replay buffers, and policies with trained weights."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from pydqn._util.files import Damaged
from pydqn._util.weights import load_weights
from pydqn.config import Config
from pydqn.envs.base import Envs
from pydqn.learning.networks import QNetwork, Table, make_network
from pydqn.learning.policy import Policy, resolve_device
from pydqn.runs.checkpoint import latest_checkpoint, load_checkpoint
from pydqn.runs.layout import BEST_WEIGHTS, LAST_WEIGHTS

WEIGHTS = ("best", "last", "checkpoint")


def network_for(config: Config, envs: Envs, seed: int = 0) -> QNetwork | Table:
    """Build the network (or table) of `config`, for the frames and actions of these environments."""
    if config.agent == "tabular":
        return Table(envs.frame_shape[0], envs.num_actions)
    return make_network(
        config.network,
        config.stack,
        envs.layout,
        envs.num_actions,
        hidden_units=config.hidden_units,
        dueling=config.dueling,
        pixel_mean=config.pixel_mean,
        pixel_std=config.pixel_std,
        seed=seed,
    )


def replay_settings(config: Config, envs: Envs) -> dict[str, Any]:
    """Return the settings of a replay buffer for these environments; acting and learning use the same ones."""
    return {
        "frame_shape": envs.frame_shape,
        "stack": config.stack,
        "n_step": config.n_step,
        "gamma": config.gamma,
        "num_envs": envs.num_envs,
        "dtype": envs.dtype,
        "padding": config.padding,
        "prioritized": config.prioritized,
        "alpha": config.priority_alpha,
        "beta": config.priority_beta,
    }


def load_policy(
    run: str | os.PathLike[str], config: Config, envs: Envs, weights: str | None = None
) -> tuple[Policy, dict[str, Any]]:
    """Build the policy of a run.

    Args:
        run: folder of the run.
        config: its config.
        envs: environments with the shapes of its frames and actions.
        weights: one of `WEIGHTS`; None for the best ones, or if the run has none yet, the newest.

    Returns:
        The policy and the metadata of its weights.

    Raises:
        ValueError: there are no such weights, or they do not fit `config`.
    """
    if weights is not None and weights not in WEIGHTS:
        raise ValueError(f"weights: expected one of {', '.join(WEIGHTS)}, got {weights!r}")
    best = _from_file(run, BEST_WEIGHTS) if weights in (None, "best") else None
    last = _from_file(run, LAST_WEIGHTS) if weights in (None, "last") and best is None else None
    kept = None
    if weights in (None, "checkpoint") and best is None:
        with suppress(*([Damaged] if last is not None else [])):  # `last` is enough then
            kept = _from_checkpoint(run)
    found = [candidate for candidate in (best, last, kept) if candidate is not None]
    if not found:
        raise ValueError(f"run: {str(run)!r} has no {'' if weights is None else weights + ' '}weights yet")
    tensors, metadata = max(found, key=lambda candidate: candidate[1].get("steps", 0))
    network = network_for(config, envs)
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
    """Return the weights of the online network in the latest checkpoint."""
    path = latest_checkpoint(run)
    if path is None:
        return None
    checkpoint = load_checkpoint(path)
    online = {name: tensor for name, tensor in checkpoint.tensors.items() if name.startswith("online.")}
    return {name.removeprefix("online."): tensor for name, tensor in online.items()}, checkpoint.state

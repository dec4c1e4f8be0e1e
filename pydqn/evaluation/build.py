"""Building what a config describes: networks, settings of replay buffers, and policies with trained weights."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pydqn._util.files import Damaged
from pydqn._util.weights import load_weights
from pydqn.config import Config
from pydqn.envs.base import Envs
from pydqn.envs.spaces import stacked_space
from pydqn.learning.custom import custom_network
from pydqn.learning.networks import Table, make_network
from pydqn.learning.policy import Policy, resolve_device
from pydqn.learning.settings import LearnerSettings
from pydqn.learning.torsos import ImpalaSettings
from pydqn.runs.checkpoint import latest_checkpoint, load_checkpoint
from pydqn.runs.layout import BEST_WEIGHTS, LAST_WEIGHTS

MakeNetwork = Callable[[Any, int], nn.Module]  # the space of an observation, the number of actions
WEIGHTS = ("best", "last", "checkpoint")


def with_network(config: Config, network: MakeNetwork | None) -> Config:
    """Return `config` for a network that the user's function makes, if there is one.

    Raises:
        ValueError: the config and the function exclude each other.
    """
    if network is None and config.network == "custom":
        raise ValueError(
            "network: expected the function that makes the network, since the config says custom: in Python network=..."
        )
    if network is None:
        return config
    if not callable(network) or config.agent == "tabular":
        what = "no function for an agent with a table" if config.agent == "tabular" else "a function"
        raise ValueError(f"network: expected {what}, got {network!r}")
    if config.value != "scalar":
        raise ValueError(
            f"value: expected scalar with a network of your own, which returns values, got {config.value!r}"
        )
    return dataclasses.replace(config, network="custom")


def network_for(config: Config, envs: Envs, seed: int = 0, network: MakeNetwork | None = None) -> nn.Module:
    """Build the network (or table) of `config`, for the frames and actions of these environments.

    Args:
        config: what to build.
        envs: environments with the shapes of its frames and actions.
        seed: of the initial weights.
        network: the user's function that makes it, see `pydqn.train`.

    Raises:
        ValueError: the network does not fit the environments, or there is none.
    """
    config = with_network(config, network)
    if network is not None:
        space = stacked_space(envs.layout, config.stack)
        return custom_network(network, space, config.stack, envs.layout, envs.num_actions, seed)
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
        settings=LearnerSettings.from_config(config),
        noisy_sigma=config.noisy_sigma,
        layer_norm=config.layer_norm,
        shared_bias=config.shared_bias,
        impala=ImpalaSettings(config.impala_width, config.impala_spectral, config.impala_pooled),
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
        "uniform_share": config.priority_uniform_share,
    }


def trained_policy(
    run: str | os.PathLike[str],
    config: Config,
    envs: Envs,
    weights: str | None = None,
    network: MakeNetwork | None = None,
) -> tuple[Policy, dict[str, Any]]:
    """Build the policy of a run.

    Args:
        run: folder of the run.
        config: its config.
        envs: environments with the shapes of its frames and actions.
        weights: one of `WEIGHTS`; None for the best ones, or if the run has none yet, the newest.
        network: see `pydqn.train`.

    Returns:
        The policy and the metadata of its weights.

    Raises:
        ValueError: there are no such weights, or they do not fit `config`.
    """
    tensors, metadata = _weights_of(run, weights)
    module = network_for(config, envs, network=network)
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise ValueError(f"run: the weights in {str(run)!r} do not fit its config ({reason})") from None
    return Policy(module, resolve_device(config.device), config.precision), metadata


def start_from(network: nn.Module, source: str | os.PathLike[str]) -> None:
    """Give a network the weights of a run or of a file; what does not fit stays, and a UserWarning names it.

    Args:
        network: the network.
        source: folder of a run, of which the best weights count (see `trained_policy`), or a .safetensors file.

    Raises:
        ValueError: there are no such weights, or none of them fits.
    """
    try:
        found, _ = _weights_of(source, None) if Path(source).is_dir() else load_weights(source)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"init_weights: {error}") from None
    own = network.state_dict()
    fitting = {name: value for name, value in found.items() if name in own and own[name].shape == value.shape}
    if not fitting:
        raise ValueError(f"init_weights: none of the weights in {str(source)!r} fits the network")
    network.load_state_dict(fitting, strict=False)
    rest = sorted({*own, *found} - fitting.keys())
    if rest:
        shapes = ", ".join(f"{name} (here {_shape(own, name)}, there {_shape(found, name)})" for name in rest)
        text = f"init_weights: {len(fitting)} of {len(own)} tensors are those of {source}; not {shapes}"
        warnings.warn(text, stacklevel=2)


def _shape(tensors: dict[str, torch.Tensor], name: str) -> str:
    return str(tuple(tensors[name].shape)) if name in tensors else "none"


def _weights_of(run: str | os.PathLike[str], weights: str | None) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the weights of a run and their metadata; see `trained_policy`."""
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
    return max(found, key=lambda candidate: candidate[1].get("steps", 0))


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

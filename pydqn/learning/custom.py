"""Networks of the user's own, and networks of records with one input per part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pydqn.envs.frames import FrameLayout
from pydqn.learning.networks import QNetwork
from pydqn.learning.records import MASKED, ActionMask, RecordTorso, parts_of


class RecordNetwork(nn.Module):
    """A network of the user's, for frames that are records: gets their parts, and masks the values that it returns."""

    def __init__(self, network: nn.Module, layout: FrameLayout, num_actions: int) -> None:
        super().__init__()
        self.network = network
        self._layout = layout
        self.mask = ActionMask(num_actions) if layout.masked_actions else None

    def forward(self, obs: Tensor) -> Tensor:
        """Return (B, num_actions) values of (B, stack, bytes) records."""
        values = self.of_parts(parts_of(obs, self._layout))
        return values if self.mask is None else self.mask(values, obs)

    def of_parts(self, parts: Sequence[Tensor]) -> Tensor:
        """Return (B, num_actions) values, not masked, of records that have been taken apart."""
        named = {part.name: values for part, values in zip(self._layout.parts, parts, strict=True)}
        values: Tensor = self.network(named if len(parts) > 1 else parts[0]).float()
        return values


class PartsNetwork(nn.Module):
    """The network of records with one input per part and, if there are masks, a last one, (B, num_actions) booleans."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return (B, num_actions) values of (B, stack, *shape) parts."""
        network = self.network
        assert isinstance(network, (QNetwork, RecordNetwork))
        parts = inputs if network.mask is None else inputs[:-1]
        if isinstance(network, RecordNetwork):
            values = network.of_parts(parts)
        else:
            assert isinstance(network.torso, RecordTorso)
            values = network.of_features(network.torso.of_parts(parts))
        return values if network.mask is None else values.masked_fill(~inputs[-1], MASKED)


def custom_network(
    make: Callable[[Any, int], nn.Module], space: Any, stack: int, layout: FrameLayout, num_actions: int, seed: int
) -> nn.Module:
    """Build a network by the user's function, with weights drawn from `seed` alone, and try it on zeros.

    Args:
        make: gets the space of an observation and the number of actions.
        space: that space.
        stack: frames per observation.
        layout: of the frames.
        num_actions: A.
        seed: of the initial weights; PyTorch's global generator stays as it was.

    Raises:
        ValueError: the function returned no module, or one that does not return (B, A) values.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        module = make(space, num_actions)
    if not isinstance(module, nn.Module):
        raise ValueError(f"network: expected a function that returns a torch.nn.Module, got {type(module).__name__}")
    network = RecordNetwork(module, layout, num_actions) if layout.is_record else module
    dtype = torch.uint8 if layout.dtype == np.uint8 else torch.float32
    obs = torch.zeros((2, stack, *layout.frame_shape), dtype=dtype, device="cpu")
    training = network.training
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            values: object = network.eval()(obs)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"network: failed for two observations of {space}: {reason}") from error
    network.train(training)
    if not isinstance(values, Tensor) or values.shape != (2, num_actions) or not values.is_floating_point():
        found = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"network: expected (2, {num_actions}) values for two observations, got {found}")
    return network

"""Heads: fully connected layers from features to the outputs of all actions."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pydqn.learning.noise import NoisyLinear


class HeadSettings(NamedTuple):
    """See `make_network`."""

    hidden_units: tuple[int, ...] = (512,)
    dueling: bool = False
    noisy_sigma: float = 0.0
    layer_norm: bool = False  # before each ReLU
    shared_bias: bool = False


class LayerNorm(nn.Module):
    """Gives each sample the mean 0 and the variance 1, then scales and shifts each feature or channel (Ba et al. 2016).

    https://arxiv.org/abs/1607.06450. Of maps, channels and positions are taken together. Computes in float32, and
    returns the dtype that it gets.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features, device="cpu"))
        self.bias = nn.Parameter(torch.zeros(features, device="cpu"))

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, F) features, or (B, C, H, W) maps, of the same shape."""
        return F.group_norm(x.float(), 1, self.weight, self.bias).to(x.dtype)


def norms(features: Iterable[int], normalizes: bool) -> nn.ModuleList:
    """Return a `LayerNorm` for each number of features or channels; none of them unless `normalizes`."""
    return nn.ModuleList(LayerNorm(count) for count in features if normalizes)


class SharedBias(nn.Module):
    """A linear layer whose outputs for different actions have the same bias: (B, F) to (B, num_actions * outputs).

    The last layer of van Hasselt et al. 2016 (https://arxiv.org/abs/1509.06461, appendix).
    """

    def __init__(self, features: int, num_actions: int, outputs: int, noisy_sigma: float) -> None:
        super().__init__()
        self.linear = _linear(features, num_actions * outputs, noisy_sigma, bias=False)
        bound = 1 / math.sqrt(features)
        self.bias = nn.Parameter(torch.empty(outputs, device="cpu").uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of all actions, one action's after the other's."""
        y: Tensor = self.linear(x)
        each = y.unflatten(1, (-1, len(self.bias)))
        return torch.add(each, self.bias.to(y.dtype)).flatten(1)


def dueling(advantages: Tensor, value: Tensor | None = None) -> Tensor:
    """Return Q = V + A - mean A over axis 1, the actions' (Wang et al. 2016, equation 9); A if there is no V.

    https://arxiv.org/abs/1511.06581. V has one entry on that axis.
    """
    return advantages if value is None else value + advantages - advantages.mean(dim=1, keepdim=True)


def make_head(features: int, num_actions: int, outputs: int, settings: HeadSettings) -> nn.Sequential:
    """Build hidden layers and a linear one: (B, features) to (B, num_actions * outputs)."""
    layers: list[nn.Module] = []
    for width in settings.hidden_units:
        layers += _hidden(features, width, settings)
        features = width
    if settings.shared_bias:
        return nn.Sequential(*layers, SharedBias(features, num_actions, outputs, settings.noisy_sigma))
    return nn.Sequential(*layers, _linear(features, num_actions * outputs, settings.noisy_sigma))


def split_head(features: int, settings: HeadSettings) -> tuple[nn.Sequential, int, HeadSettings]:
    """Build the first hidden layer; return it, its number of units, and the settings of what remains."""
    first, *rest = settings.hidden_units
    return nn.Sequential(*_hidden(features, first, settings)), first, settings._replace(hidden_units=tuple(rest))


def _hidden(features: int, width: int, settings: HeadSettings) -> list[nn.Module]:
    layer = _linear(features, width, settings.noisy_sigma)
    return [layer, *([LayerNorm(width)] if settings.layer_norm else []), nn.ReLU(inplace=True)]


def _linear(features: int, outputs: int, noisy_sigma: float, bias: bool = True) -> nn.Module:
    if noisy_sigma:
        return NoisyLinear(features, outputs, noisy_sigma, bias=bias)
    return nn.Linear(features, outputs, bias=bias)

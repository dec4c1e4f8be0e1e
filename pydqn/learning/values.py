"""Value representations: what a network's outputs say about the return of an action, and its mean, the action value.

    scalar             one number, the mean itself
    categorical        logits of atoms (Bellemare et al. 2017, https://arxiv.org/abs/1707.06887)
    hl_gauss           logits of bins, whose mean is learned by classification (Farebrother et al. 2024,
                       https://arxiv.org/abs/2403.03950)
    quantile           quantiles at fixed levels (Dabney et al. 2018, https://arxiv.org/abs/1710.10044)
    implicit_quantile  quantiles at any levels, which are an input (Dabney et al. 2018,
                       https://arxiv.org/abs/1806.06923)

B is the batch, A the number of actions, and N that of atoms, bins or quantiles.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pydqn.learning.settings import LearnerSettings


def midpoints(count: int) -> Tensor:
    """Return (count,) levels (2i - 1) / (2 count), i = 1..count: the midpoints of equal parts of 0..1."""
    return (torch.arange(count, dtype=torch.float32, device="cpu") + 0.5) / count


class Categorical(nn.Module):
    """Logits of the atoms or bins of a support.

    `support` holds the (N,) atoms, evenly spaced from `value_min` to `value_max`. With `bins` it holds the centres of
    N bins between these, and `edges` the (N + 1,) edges.
    """

    support: Tensor
    edges: Tensor

    def __init__(self, count: int, low: float, high: float, *, bins: bool) -> None:
        super().__init__()
        self.outputs = count  # of the network, per action
        edges = torch.linspace(low, high, count + 1, device="cpu")
        atoms = (edges[1:] + edges[:-1]) / 2 if bins else torch.linspace(low, high, count, device="cpu")
        self.register_buffer("support", atoms, persistent=False)
        self.register_buffer("edges", edges, persistent=False)

    def mean(self, outputs: Tensor) -> Tensor:
        """Return (..., ) means of (..., N) logits."""
        return outputs.softmax(dim=-1) @ self.support

    def quantiles(self, outputs: Tensor, levels: Tensor) -> Tensor:
        """Return (B, L) atoms, or centres of bins, at which the distribution of (B, N) logits reaches (L,) levels."""
        reached = outputs.softmax(dim=-1).cumsum(dim=-1).unsqueeze(1) >= levels.unsqueeze(1)  # (B, L, N)
        reached[..., -1] = True  # rounding may leave the sum below the level
        return self.support[reached.int().argmax(dim=-1)]


class Quantiles(nn.Module):
    """Quantiles at the levels `tau`, (N,) midpoints."""

    tau: Tensor

    def __init__(self, count: int) -> None:
        super().__init__()
        self.outputs = count
        self.register_buffer("tau", midpoints(count), persistent=False)

    def mean(self, outputs: Tensor) -> Tensor:
        """Return (..., ) means of (..., N) quantiles."""
        return outputs.mean(dim=-1)

    def quantiles(self, outputs: Tensor, levels: Tensor) -> Tensor:
        """Return (B, L) quantiles at (L,) levels, linear between the (B, N) ones, which need not be in order."""
        ordered, count = outputs.sort(dim=-1).values, outputs.shape[-1]
        position = (levels * count - 0.5).clamp(0, count - 1)
        below = position.floor().long()
        above = (below + 1).clamp(max=count - 1)
        return torch.lerp(ordered[:, below], ordered[:, above], position - below)


class ImplicitQuantiles(nn.Module):
    """Quantiles at levels that are an input of the network; `tau` holds the midpoints that actions are chosen by.

    The papers draw these levels at random as well. With midpoints an action value is a function of the observation.
    """

    tau: Tensor
    frequencies: Tensor

    def __init__(self, features: int, settings: LearnerSettings) -> None:
        super().__init__()
        self.outputs = 1
        self.embedding = nn.Linear(settings.num_cosines, features)
        self.register_buffer("tau", midpoints(settings.num_action_taus), persistent=False)
        first = settings.first_cosine
        frequencies = math.pi * torch.arange(first, first + settings.num_cosines, dtype=torch.float32, device="cpu")
        self.register_buffer("frequencies", frequencies, persistent=False)

    def embed(self, features: Tensor, tau: Tensor) -> Tensor:
        """Return (B * N, F) products of (B, F) features and the embeddings of (B, N) levels.

        phi(tau) = ReLU(sum_k cos(pi k tau) w_k + b): Dabney et al. 2018, equation 4.
        """
        cosines = (tau.unsqueeze(2) * self.frequencies).cos()
        embedded = torch.relu(self.embedding(cosines.to(self.embedding.weight.dtype)))
        return (features.unsqueeze(1) * embedded).flatten(0, 1)

    def mean(self, outputs: Tensor) -> Tensor:
        """Return (..., ) means of (..., N) quantiles."""
        return outputs.mean(dim=-1)


_FIELDS = {
    "scalar": (),
    "categorical": ("num_atoms", "value_min", "value_max"),
    "hl_gauss": ("num_atoms", "value_min", "value_max"),
    "quantile": ("num_quantiles",),
    "implicit_quantile": ("num_action_taus", "num_cosines", "first_cosine"),
}


def represented(settings: LearnerSettings) -> dict[str, Any]:
    """Return the settings that a network's value representation consists of."""
    return {name: getattr(settings, name) for name in ("value", *_FIELDS[settings.value])}


Representation = Categorical | Quantiles | ImplicitQuantiles


def make_representation(settings: LearnerSettings, features: int) -> Representation | None:
    """Build what a network of `features` needs beside its layers; None for scalar values."""
    if settings.value == "scalar":
        return None
    if settings.value == "quantile":
        return Quantiles(settings.num_quantiles)
    if settings.value == "implicit_quantile":
        return ImplicitQuantiles(features, settings)
    return Categorical(settings.num_atoms, settings.value_min, settings.value_max, bins=settings.value == "hl_gauss")

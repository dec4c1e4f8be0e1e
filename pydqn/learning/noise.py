"""Noisy linear layers, whose noise explores (Fortunato et al. 2018, https://arxiv.org/abs/1706.10295, section 3)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class NoisyLinear(nn.Module):
    """A linear layer with factorised Gaussian noise: (B, in_features) to (B, out_features).

    y = (mu_w + sigma_w * (e_out outer e_in)) x + mu_b + sigma_b * e_out, where e = sgn(z) sqrt|z| of normal z. This is
    computed as mu(x) + e_out * sigma(e_in * x), so that each sample may have noise of its own. Initially mu is uniform
    in +-1/sqrt(in_features), and sigma is sigma_0 / sqrt(in_features).

    With `bias` False there is no mu_b, but still sigma_b. Without noise, which is the case outside of `Noise.applied`,
    y = mu(x).
    """

    def __init__(self, in_features: int, out_features: int, sigma: float = 0.5, *, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.mu, self.sigma = nn.Linear(in_features, out_features, bias), nn.Linear(in_features, out_features)
        bound = 1 / math.sqrt(in_features)
        for parameter in self.mu.parameters():
            nn.init.uniform_(parameter, -bound, bound)
        for parameter in self.sigma.parameters():
            nn.init.constant_(parameter, sigma * bound)
        self.noise: tuple[Tensor, Tensor] | None = None  # e_in and e_out, of one row for all samples, or one for each

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's outputs, with the noise that is applied."""
        y: Tensor = self.mu(x)
        if self.noise is None:
            return y
        e_in, e_out = self.noise
        if len(e_in) > 1 and len(x) > len(e_in):  # several rows per sample: levels of implicit quantiles
            e_in, e_out = (e.repeat_interleave(len(x) // len(e_in), dim=0) for e in (e_in, e_out))
        noise: Tensor = self.sigma(x * e_in.to(x.dtype)) * e_out.to(y.dtype)
        return y + noise


class Noise:
    """The noise of all noisy layers of a network, in tensors that stay where they are, so that a graph may hold them.

    Args:
        network: the network; it need not have such layers.
        rows: 1 for the same noise for all samples, or the number of samples, which then get noise of their own.
        device: of the network.
    """

    def __init__(self, network: nn.Module, rows: int, device: torch.device) -> None:
        self._layers = [module for module in network.modules() if isinstance(module, NoisyLinear)]
        self._tensors = [
            (
                torch.zeros((rows, layer.in_features), device=device),
                torch.zeros((rows, layer.out_features), device=device),
            )
            for layer in self._layers
        ]

    def __bool__(self) -> bool:
        return bool(self._layers)

    def draw(self, generator: torch.Generator | None) -> None:
        """Draw new noise from `generator`, or from the device's own."""
        for tensors in self._tensors:
            for tensor in tensors:
                tensor.normal_(generator=generator)
                torch.mul(tensor.sign(), tensor.abs().sqrt_(), out=tensor)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the network's layers use this noise until the block ends."""
        for layer, tensors in zip(self._layers, self._tensors, strict=True):
            layer.noise = tensors
        try:
            yield
        finally:
            for layer in self._layers:
                layer.noise = None

"""Torsos: from observations, as the replay buffer holds them, to features."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pydqn.envs.frames import BYTE_RANGE, UNIT_RANGE, Part
from pydqn.learning.heads import norms
from pydqn.learning.pixels import to_channels_last


class _Conv(NamedTuple):
    channels: int
    kernel: int
    stride: int


# Mnih et al. 2015, extended data table 1.
_NATURE = (_Conv(32, 8, 4), _Conv(64, 4, 2), _Conv(64, 3, 1))
TORSOS = {
    "nature": _NATURE,
    # Without biases; the last convolution covers its whole input like a hidden layer, and dueling splits its output.
    "nature_7x7": (*_NATURE, _Conv(512, 7, 1)),
    # The same shape with half the channels: about a third of the arithmetic.
    "small": (_Conv(16, 8, 4), _Conv(32, 4, 2), _Conv(32, 3, 1)),
    "grid": (_Conv(32, 4, 2), _Conv(64, 3, 2), _Conv(64, 3, 1)),  # for images too small for strides of 4
    "minatar": (_Conv(16, 3, 1),),  # Young and Tian 2019, https://arxiv.org/abs/1903.03176
}
WITHOUT_BIASES = "nature_7x7"  # no biases, Xavier initialization, split streams
_MOST_FEATURES = 6_400  # of the last convolution; 84x84 has 3,136 with "nature". More of them are pooled
_POOLED = 7  # height and width


def fitting_torso(part: Part) -> str:
    """Return the name of a torso that fits a part of an observation."""
    if not part.channels:
        return "mlp"
    side = min(part.image_size)
    return "minatar" if side < 20 else "grid" if side < 64 else "nature"


def _unchanged(x: Tensor) -> Tensor:
    return x


class PixelTorso(nn.Module):
    """Convolutions over a stack of frames: (B, stack, *frame_shape) to (B, features).

    Frames have the shape (H, W), or with `channels` "first" (C, H, W) and with "last" (H, W, C). The first convolution
    sees the channels of all frames of a stack. Large maps of the last one are pooled to 7x7. With `layer_norm`, there
    is a `LayerNorm` before each ReLU.

    Computes conv(((x - low) / (high - low) - pixel_mean) / pixel_std) for an `input_range` from low to high, so x / 255
    for bytes. The first layer's weights include the scaling. This saves a pass over the input, and the convolution gets
    integers, which even bfloat16 represents exactly. Floating-point frames go through the first convolution in their
    own dtype.
    """

    _padding = 0  # of the first convolution, on each side

    def __init__(
        self,
        name: str,
        stack: int,
        frame_shape: tuple[int, ...],
        pixel_mean: float = 0.0,
        pixel_std: float = 1.0,
        input_range: tuple[float, float] = BYTE_RANGE,
        channels: str = "none",
        *,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        layers = []
        depth, height, width = self._settle(stack, frame_shape, pixel_mean, pixel_std, input_range, channels)
        for conv in TORSOS[name]:
            layers.append(nn.Conv2d(depth, conv.channels, conv.kernel, conv.stride, bias=name != WITHOUT_BIASES))
            depth = conv.channels
            height, width = ((side - conv.kernel) // conv.stride + 1 for side in (height, width))
            if min(height, width) < 1:
                raise ValueError(f"network: {name!r} needs larger frames than {frame_shape}")
        self.convs = nn.ModuleList(layers)
        self.norms = norms((conv.channels for conv in TORSOS[name]), layer_norm)
        self.pools = depth * height * width > _MOST_FEATURES
        self.features = depth * (_POOLED**2 if self.pools else height * width)
        self.splits = name == WITHOUT_BIASES

    def _settle(
        self,
        stack: int,
        frame_shape: tuple[int, ...],
        pixel_mean: float,
        pixel_std: float,
        input_range: tuple[float, float],
        channels: str,
    ) -> tuple[int, int, int]:
        """Keep what the input's scaling depends on; return the channels, height and width of a stack."""
        self._channels_are = channels
        self.pixel_mean = pixel_mean
        self.pixel_std = pixel_std
        self.input_range = input_range
        self.dtype_after_first: torch.dtype | None = None  # that of the last convolution; see `mixed_precision_copy`
        axes = {"none": (1, *frame_shape), "first": frame_shape, "last": (*frame_shape[2:], *frame_shape[:2])}[channels]
        return stack * axes[0], axes[1], axes[2]

    def prepare(self, obs: Tensor) -> Tensor:
        """Convert (B, stack, *frame_shape) pixels to (B, channels, H, W) in the arithmetic's dtype, values unchanged.

        Floating-point frames become float32: a lower precision would lose digits. `forward` does this, too, if it has
        not been done; a learner does it once for all networks that a batch goes through.
        """
        if obs.dim() == 5:
            obs = (obs if self._channels_are == "first" else obs.permute(0, 1, 4, 2, 3)).flatten(1, 2)
        if obs.is_floating_point():
            return obs if obs.dtype in (torch.float32, self._dtype()) else obs.float()
        return to_channels_last(obs, self._dtype())

    def scaling(self) -> tuple[float, float]:
        """Return what pixels are multiplied by before the first convolution, and what is then added."""
        low, high = self.input_range
        return 1 / ((high - low) * self.pixel_std), -(self.pixel_mean + low / (high - low)) / self.pixel_std

    def _dtype(self) -> torch.dtype:
        """Return the dtype of the layers after the first one."""
        weight = self.convs[-1].weight
        assert isinstance(weight, Tensor)
        return self.dtype_after_first or weight.dtype

    def forward(self, obs: Tensor) -> Tensor:
        """Return the features of `obs`, in the dtype of the layers after the first one."""
        normalizers, x = iter(self.norms), None
        for conv in self.convs:  # not a slice, which would be a new module at each pass
            x = self._first(obs) if x is None else conv(x)
            x = F.relu_(next(normalizers, _unchanged)(x))
        assert x is not None
        if self.pools:
            x = F.adaptive_max_pool2d(x, _POOLED)
        return x.flatten(1)

    def _first(self, obs: Tensor) -> Tensor:
        """Return the scaled first convolution of `obs`, in the dtype of the layers after it."""
        first = self.convs[0]
        assert isinstance(first, nn.Conv2d)
        scale, shift = self.scaling()
        weight, bias = first.weight * scale, first.bias
        x = self.prepare(obs)
        if shift and self._padding:  # what is padded has the value that becomes 0, which need not be an integer
            x = F.pad(x.float(), 4 * [self._padding], value=-shift / scale)
        if shift:
            too_much = -shift * first.weight.sum(dim=(1, 2, 3))
            bias = -too_much if bias is None else bias - too_much
        padding = 0 if shift else self._padding
        x = F.conv2d(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), first.stride, padding)
        lower = self._dtype()
        return x if lower == torch.float32 else x.to(lower)  # `prepare` has converted nothing but pixels to it


class SpectralConv(nn.Conv2d):
    """A convolution whose weights are divided by their largest singular value (Miyato et al. 2018).

    https://arxiv.org/abs/1802.05957, section 2.1.

    Each pass with gradients, in training mode, refines `u`, the left singular vector of the weights as a matrix with a
    row per output channel, by one step of the power method. Other passes leave it as it is.
    """

    u: Tensor

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(channels, out_channels, 3, padding=1)
        self.register_buffer("u", F.normalize(torch.randn(out_channels, device="cpu"), dim=0))

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution with the divided weights."""
        matrix, refines = self.weight.flatten(1).float(), self.training and torch.is_grad_enabled()
        with torch.no_grad():
            v = F.normalize(self.u @ matrix, dim=0)
            u = self.u
            if refines:
                u = F.normalize(matrix @ v, dim=0)
                self.u.copy_(u)
        largest = u @ (matrix @ v)
        return F.conv2d(x, (self.weight / largest).to(x.dtype), self.bias, padding=1)


class ImpalaSettings(NamedTuple):
    """See `ImpalaTorso`."""

    width: int = 1
    spectral: bool = False
    pooled: int = 0


class _Residual(nn.Module):
    """x + conv(ReLU(conv(ReLU(x)))) of `channels`."""

    def __init__(self, channels: int, spectral: bool, layer_norm: bool) -> None:
        super().__init__()
        self.norms = norms((channels, channels), layer_norm)
        kind = SpectralConv if spectral else _conv3
        self.convs = nn.ModuleList([kind(channels, channels), kind(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum, of the same shape."""
        first, second = self.norms or (_unchanged, _unchanged)
        y: Tensor = self.convs[0](F.relu(first(x)))
        y = self.convs[1](F.relu_(second(y)))
        return x + y


class ImpalaTorso(PixelTorso):
    """The residual network of IMPALA (Espeholt et al. 2018, https://arxiv.org/abs/1802.01561, figure 3).

    Three times a convolution 3x3, a maximum over 3x3 with stride 2 and two residual blocks, of 16, 32 and 32 channels
    times `width`; with `layer_norm`, a `LayerNorm` before each ReLU. With `pooled` above 0, the last map is pooled to
    that height and width. Else see `PixelTorso`.
    """

    _padding = 1

    def __init__(
        self,
        stack: int,
        frame_shape: tuple[int, ...],
        pixel_mean: float = 0.0,
        pixel_std: float = 1.0,
        input_range: tuple[float, float] = BYTE_RANGE,
        channels: str = "none",
        *,
        width: int = 1,
        spectral: bool = False,
        pooled: int = 0,
        layer_norm: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        depth, height, width_now = self._settle(stack, frame_shape, pixel_mean, pixel_std, input_range, channels)
        convs, residuals = [], []
        for wide in (16 * width, 32 * width, 32 * width):
            convs.append(_conv3(depth, wide))
            residuals.append(nn.Sequential(*(_Residual(wide, spectral, layer_norm) for _ in range(2))))
            depth, height, width_now = wide, (height + 1) // 2, (width_now + 1) // 2
        self.convs, self.residuals = nn.ModuleList(convs), nn.ModuleList(residuals)
        self.norms = norms((depth,), layer_norm)
        self._side = pooled
        self.features = depth * (pooled**2 if pooled else height * width_now)
        self.splits = False

    def forward(self, obs: Tensor) -> Tensor:
        """Return the features of `obs`, in the dtype of the layers after the first one."""
        x: Tensor | None = None
        for conv, residual in zip(self.convs, self.residuals, strict=True):
            x = self._first(obs) if x is None else conv(x)
            x = residual(F.max_pool2d(x, 3, 2, 1))
        assert x is not None
        x = F.relu(next(iter(self.norms), _unchanged)(x))
        return (F.adaptive_max_pool2d(x, self._side) if self._side else x).flatten(1)


def _conv3(channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out_channels, 3, padding=1)


class VectorTorso(nn.Module):
    """Flattens a stack of vectors: (B, stack, *frame_shape) to (B, features). Maps `input_range` to 0..1."""

    def __init__(self, stack: int, frame_shape: tuple[int, ...], input_range: tuple[float, float] = UNIT_RANGE) -> None:
        super().__init__()
        self.features = stack * math.prod(frame_shape)
        self.splits = False
        self.input_range = input_range

    def prepare(self, obs: Tensor) -> Tensor:
        """Convert `obs` to float32, values unchanged."""
        return obs.to(torch.float32)

    def forward(self, obs: Tensor) -> Tensor:
        """Return `obs` as one float32 row per sample."""
        x, (low, high) = self.prepare(obs).flatten(1), self.input_range
        return x if self.input_range == UNIT_RANGE else (x - low) * (1 / (high - low))

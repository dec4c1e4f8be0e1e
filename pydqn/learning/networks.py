"""Q-networks: a torso that turns observations into features, and a head that turns features into action values.

Every network takes observations as the replay buffer holds them (pixels as uint8) and scales them itself.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn

from pydqn.envs.frames import BYTE_RANGE, UNIT_RANGE, FrameLayout, Part
from pydqn.envs.spaces import channels_of
from pydqn.learning.heads import HeadSettings, dueling, make_head, split_head
from pydqn.learning.records import ActionMask, RecordTorso
from pydqn.learning.settings import LearnerSettings
from pydqn.learning.torsos import (
    TORSOS,
    WITHOUT_BIASES,
    ImpalaSettings,
    ImpalaTorso,
    PixelTorso,
    VectorTorso,
    fitting_torso,
)
from pydqn.learning.values import ImplicitQuantiles, make_representation, represented

LAYER_NORMS = ("none", "head", "torso", "both")


class QNetwork(nn.Module):
    """A torso, hidden layers, and linear action values, or distributions of returns whose means they are.

    With `head.dueling`, two streams of hidden layers compute a value and advantages (see `dueling`); of distributions,
    for each atom or quantile. Both get all features, unless the torso `splits`: then the first half goes to the value
    and the second to the advantages.

    The levels of implicit quantiles are embedded into the features. Where the torso has no layers, as for vectors, the
    first hidden layer comes before that, for both streams: products with raw numbers would say little.
    """

    def __init__(
        self,
        torso: PixelTorso | VectorTorso | RecordTorso,
        num_actions: int,
        head: HeadSettings = HeadSettings(),  # noqa: B008 (it cannot be changed)
        settings: LearnerSettings | None = None,
        *,
        masked: bool = False,
    ) -> None:
        super().__init__()
        self.mask = ActionMask(num_actions) if masked else None
        self.torso = torso
        self._split = head.dueling and torso.splits
        features = torso.features // 2 if self._split else torso.features
        settings = settings or LearnerSettings()
        self.represents = represented(settings)
        self.encoder: nn.Module | None = None
        if settings.value == "implicit_quantile" and head.hidden_units and not isinstance(torso, PixelTorso):
            self.encoder, features, head = split_head(features, head)
        self.representation = make_representation(settings, torso.features if self.encoder is None else features)
        self._outputs = 1 if self.representation is None else self.representation.outputs  # per action
        self.advantage = make_head(features, num_actions, self._outputs, head)
        self.value = make_head(features, 1, self._outputs, head) if head.dueling else None

    def prepare(self, obs: Tensor) -> Tensor:
        """Convert observations as the torso does; `forward` takes them either way."""
        return self.torso.prepare(obs)

    def forward(self, obs: Tensor) -> Tensor:
        """Return (B, num_actions) float32 action values of (B, stack, *frame_shape) observations."""
        values = self.of_features(self.torso(obs))
        return values if self.mask is None else self.mask(values, obs)

    def of_features(self, features: Tensor) -> Tensor:
        """Return (B, num_actions) float32 action values, not masked, of what the torso returns."""
        if self.representation is None:
            return self._of_streams(features)
        tau = None
        if isinstance(self.representation, ImplicitQuantiles):
            tau = self.representation.tau.expand(features.shape[0], -1)  # not len(), for the exporter
        values: Tensor = self.representation.mean(self._outputs_of(features, tau))
        return values

    def outputs(self, obs: Tensor, tau: Tensor | None = None) -> Tensor:
        """Return (B, num_actions, N) float32 logits or quantiles; implicit quantiles are those at (B, N) levels `tau`.

        Actions that are masked have outputs, too.
        """
        return self._outputs_of(self.torso(obs), tau)

    def means(self, outputs: Tensor, obs: Tensor) -> Tensor:
        """Return (B, num_actions) float32 action values, masked, of what `outputs` returned for these observations."""
        assert self.representation is not None
        values: Tensor = self.representation.mean(outputs)
        return values if self.mask is None else self.mask(values, obs)

    def quantiles(self, obs: Tensor, action: Tensor, levels: Tensor) -> Tensor:
        """Return (B, L) quantiles of the return of (B,) actions at (L,) levels; the network must have distributions."""
        representation, each = self.representation, torch.arange(len(action), device=action.device)
        if isinstance(representation, ImplicitQuantiles):
            return self.outputs(obs, levels.expand(len(action), -1))[each, action].sort(dim=1).values
        assert representation is not None
        return representation.quantiles(self.outputs(obs)[each, action], levels)

    def _outputs_of(self, features: Tensor, tau: Tensor | None) -> Tensor:
        if isinstance(self.representation, ImplicitQuantiles):
            assert tau is not None
            features = features if self.encoder is None else self.encoder(features)
            values = self._of_streams(self.representation.embed(features, tau))  # (B * N, A)
            of_levels: Tensor = values.unflatten(0, (-1, tau.shape[1]))
            return of_levels.transpose(1, 2)
        return self._of_streams(features)

    def _of_streams(self, features: Tensor) -> Tensor:
        """Return (B, A) float32 numbers, or (B, A, N) where there are several per action."""
        of_value, of_advantage = features.chunk(2, dim=1) if self._split else (features, features)
        values: Tensor = self.advantage(of_advantage).float()
        if self._outputs > 1:
            values = values.unflatten(1, (-1, self._outputs))
        if self.value is not None:
            value: Tensor = self.value(of_value).float()
            values = dueling(values, value.unsqueeze(1) if self._outputs > 1 else value)
        return values


def make_network(
    name: str,
    stack: int,
    frame_shape: tuple[int, ...] | FrameLayout,
    num_actions: int,
    *,
    hidden_units: tuple[int, ...] = (512,),
    dueling: bool = False,
    pixel_mean: float = 0.0,
    pixel_std: float = 1.0,
    input_range: tuple[float, float] | None = None,
    settings: LearnerSettings | None = None,
    noisy_sigma: float = 0.0,
    layer_norm: str = "none",
    shared_bias: bool = False,
    impala: ImpalaSettings = ImpalaSettings(),  # noqa: B008 (it cannot be changed)
    seed: int = 0,
) -> QNetwork:
    """Build a network with weights drawn from `seed` alone.

    The distribution is PyTorch's default; for "nature_7x7" Xavier's (Glorot and Bengio 2010), with biases of zero.

    Args:
        name: the torso: "nature", "nature_7x7", "small", "grid", "minatar" or "impala" for images, "mlp" for any shape;
            "auto" for the one that fits. Parts of an observation that are no images always get "mlp".
        stack: frames per observation.
        frame_shape: shape of one frame; or the layout of frames, which has several parts, channels or action masks.
        num_actions: A.
        hidden_units: widths of the fully connected hidden layers (of each stream when dueling).
        dueling: see `QNetwork`.
        pixel_mean: see `PixelTorso`.
        pixel_std: see `PixelTorso`.
        input_range: the values of frames that are mapped to 0 and 1; None for (0, 255) with pixels, and (0, 1), which
            changes nothing, with "mlp". A layout has its own.
        settings: the learner's, of which the value representation counts; None for scalar values.
        noisy_sigma: the initial noise of the fully connected layers (see `NoisyLinear`); 0 for layers without.
        layer_norm: where there is a `LayerNorm` before each ReLU: "none", "head", "torso" or "both". Only a torso with
            convolutions has any.
        shared_bias: whether the last layer has one bias for all actions (see `SharedBias`).
        impala: width, spectral normalization and pooling of the torso "impala".
        seed: of the initial weights; PyTorch's global generator stays as it was.

    Raises:
        ValueError: the frames do not fit the network.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would seed the GPUs, too
        known = ("auto", *TORSOS, "impala", "mlp")
        if name not in known:
            raise ValueError(f"network: expected one of {', '.join(known)}, got {name!r}")
        layout = frame_shape if isinstance(frame_shape, FrameLayout) else _layout_of(name, frame_shape, input_range)
        if name not in ("mlp", "auto") and not any(part.channels for part in layout.parts):
            shapes = ", ".join(str(part.shape) for part in layout.parts)
            raise ValueError(f"network: {name!r} needs images, got frames of shape {shapes}; mlp takes any")
        if layer_norm not in LAYER_NORMS:
            raise ValueError(f"layer_norm: expected one of {', '.join(LAYER_NORMS)}, got {layer_norm!r}")
        in_torso, in_head = layer_norm in ("torso", "both"), layer_norm in ("head", "both")
        torsos = [_torso(name, stack, part, pixel_mean, pixel_std, impala, in_torso) for part in layout.parts]
        if layer_norm == "torso" and not any(isinstance(torso, PixelTorso) for torso in torsos):
            raise ValueError("layer_norm: 'torso' needs convolutions, which this network lacks; expected none or head")
        torso = RecordTorso(layout, torsos, sum(torso.features for torso in torsos)) if layout.is_record else torsos[0]
        head = HeadSettings(hidden_units, dueling, noisy_sigma, in_head, shared_bias)
        network = QNetwork(torso, num_actions, head, settings, masked=layout.masked_actions > 0)
        if name == WITHOUT_BIASES:
            for layer in network.modules():
                if isinstance(layer, (nn.Conv2d, nn.Linear)):
                    nn.init.xavier_uniform_(layer.weight)
                    if layer.bias is not None:
                        nn.init.zeros_(layer.bias)
        return network


def _layout_of(name: str, shape: tuple[int, ...], input_range: tuple[float, float] | None) -> FrameLayout:
    """Return the layout of frames that are one array, of which only the shape is known."""
    usual = UNIT_RANGE if name == "mlp" else BYTE_RANGE
    channels = channels_of(shape, "auto", least_side=1)
    return FrameLayout((Part("", shape, np.dtype(np.float32), input_range or usual, channels),))


def _torso(
    name: str, stack: int, part: Part, pixel_mean: float, pixel_std: float, impala: ImpalaSettings, layer_norm: bool
) -> PixelTorso | VectorTorso:
    name = fitting_torso(part) if name == "auto" else name
    if name == "mlp" or not part.channels:
        return VectorTorso(stack, part.shape, part.input_range)
    scaling = (pixel_mean, pixel_std, part.input_range, part.channels)
    if name == "impala":
        return ImpalaTorso(stack, part.shape, *scaling, **impala._asdict(), layer_norm=layer_norm)
    return PixelTorso(name, stack, part.shape, *scaling, layer_norm=layer_norm)


def mixed_precision_copy(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy of `network` whose linear and 2D convolutional layers keep their parameters in `dtype`.

    Autocast would convert them at each use. Whoever changes the parameters of `network` has to change these, too. The
    copy shares with `network` what autocast leaves alone, and the first convolution over pixels, whose weights are
    scaled before they are rounded. A `QNetwork` over pixels then computes in `dtype` by itself; other modules are to be
    run under autocast.
    """
    other: nn.Module = copy.deepcopy(network, {id(part): part for part in tensors_of(network)})
    torsos = [module for module in other.modules() if isinstance(module, PixelTorso)]
    firsts = [torso.convs[0] for torso in torsos]
    made: dict[int, nn.Parameter] = {}  # layers may share a parameter
    for module in other.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and module not in firsts:
            for name, parameter in module.named_parameters(recurse=False):
                low = made.setdefault(id(parameter), nn.Parameter(parameter.detach().to(dtype)))
                setattr(module, name, low.requires_grad_(parameter.requires_grad))
    for torso in torsos:
        torso.dtype_after_first = dtype
    return other


def tensors_of(network: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers of a network."""
    return [*network.parameters(), *network.buffers()]


class Table(nn.Module):
    """A table of action values of numbered states, initially zero, with the interface of a network.

    Takes one-hot observations (B, stack, num_states), of which only the newest counts, and returns (B, num_actions)
    float32 values.
    """

    def __init__(self, num_states: int, num_actions: int) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros(num_states, num_actions, dtype=torch.float64, device="cpu"))

    def forward(self, obs: Tensor) -> Tensor:
        """Return the rows of the states in `obs`."""
        return self.values[obs[:, -1].argmax(dim=1)].float()

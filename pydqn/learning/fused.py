"""The gradients of scalar values written out, in as few operations as possible.

On a GPU an operation is a kernel, which takes two microseconds at least, however little it does; autograd's way through
an update of Nature's network has some 70 of them. Here a convolution takes its bias and its ReLU with it, a linear
layer, too; double Q-learning passes both observations through the online network at once; what lies between outputs and
their slopes is one operation, and so is what lies between rows of frames and the input of the first convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pydqn.learning.fused_kernels import look_up_pixels, td_slopes
from pydqn.learning.heads import dueling
from pydqn.learning.networks import QNetwork
from pydqn.learning.objectives import Gradients, Transitions
from pydqn.learning.settings import LearnerSettings
from pydqn.learning.torsos import PixelTorso, VectorTorso
from pydqn.replay.lookup import look_up

_aten = torch.ops.aten


class FusedGradients:
    """The gradients of a `QNetwork`'s loss, written into its parameters' `grad`.

    Args:
        online: float32 network that `reason_against` has nothing against.
        target: of the same shape.
        settings: of the learner.
        frames: the tensor of frames that observations are row numbers of, if they are.
        two_streams: whether the target network's pass runs on another CUDA stream, beside the online network's.
    """

    def __init__(
        self,
        online: QNetwork,
        target: QNetwork,
        settings: LearnerSettings,
        frames: Tensor | None = None,
        two_streams: bool = False,
    ) -> None:
        self._online, self._target = _Layers(online), _Layers(target)
        self._settings, self._frames = settings, frames
        self._beside = torch.cuda.Stream(next(online.parameters()).device) if two_streams else None

    @torch.no_grad()
    def __call__(self, batch: Transitions, weight: Tensor) -> Gradients:
        """Compute the gradients of the weighted mean loss of (B,) transitions, and what is known then."""
        size = len(batch.action)
        x = _inputs(self._online.torso, torch.cat([batch.obs, batch.next_obs]), self._frames)
        with self._on_the_other_stream():
            target = self._target.forward(x[size:])
        online = self._online.forward(x if self._settings.double else x[:size])
        if self._beside is not None:
            torch.cuda.current_stream(x.device).wait_stream(self._beside)
        values, errors, *slopes = td_slopes(
            online.outputs,
            target.outputs,
            batch.action,
            batch.reward,
            batch.discount,
            weight,
            self._settings.loss,
        )
        self._online.backward(online, slopes)
        return Gradients(errors, errors, values)

    def _on_the_other_stream(self) -> AbstractContextManager[Any]:
        """Return the context in which work runs beside what the current stream gets from now on.

        Memory that is freed there is used again there only, by the next update, which begins after this one.
        """
        if self._beside is None:
            return nullcontext()
        self._beside.wait_stream(torch.cuda.current_stream(self._beside.device))
        return torch.cuda.stream(self._beside)


class FusedValues:
    """The action values of a `QNetwork` that `reason_against` has nothing against.

    Args:
        network: the network.
        frames: see `FusedGradients`.
    """

    def __init__(self, network: QNetwork, frames: Tensor | None = None) -> None:
        self._layers, self._frames = _Layers(network), frames

    @torch.no_grad()
    def __call__(self, obs: Tensor) -> Tensor:
        """Return (B, A) float32 action values of (B, ...) observations, or of (B, stack) row numbers."""
        return dueling(*self._layers.forward(_inputs(self._layers.torso, obs, self._frames)).outputs)


def reason_against(network: nn.Module, settings: LearnerSettings | None = None) -> str:
    """Say in a few words why `FusedValues`, or with settings `FusedGradients`, do not fit; "" if they do."""
    if type(network) is not QNetwork:
        return "the network is not pydqn's"
    if network.representation is not None:
        return "values are not scalar"
    if settings is not None and settings.munchausen:
        return "rewards have Munchausen's bonus"
    if type(network.torso) not in (PixelTorso, VectorTorso) or network.mask is not None:
        return f"observations have parts, or the torso is {type(network.torso).__name__}"
    if getattr(network.torso, "pools", False):
        return "the last map is pooled"
    if any(parameter.dtype != torch.float32 for parameter in network.parameters()):
        return "the network does not compute in float32 (see precision)"
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    of_parameters = ("_backward_hooks", "_post_accumulate_grad_hooks")
    parameters = [parameter for _, parameter in network.named_parameters(remove_duplicate=False)]
    if any(getattr(module, name) for module in network.modules() for name in hooks) or any(
        getattr(parameter, name) for parameter in parameters for name in of_parameters
    ):
        return "the network has hooks"
    if not all(parameter.requires_grad for parameter in parameters):
        return "some parameters are frozen"
    if len({id(parameter) for parameter in parameters}) < len(parameters):
        return "layers share parameters"
    if parameters[0].is_cuda and (torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled()):
        return "deterministic algorithms are asked for"
    layers = (nn.Conv2d, nn.Linear, nn.ReLU, nn.Sequential, nn.ModuleList, PixelTorso, VectorTorso, QNetwork)
    other = next((type(module).__name__ for module in network.modules() if type(module) not in layers), "")
    return f"the network has layers of the kind {other}" if other else ""


def _inputs(torso: PixelTorso | VectorTorso, obs: Tensor, frames: Tensor | None) -> Tensor:
    """Return the inputs of the first layer for observations, or row numbers of `frames`."""
    if isinstance(torso, VectorTorso):
        rows: Tensor = torso(obs if frames is None else look_up(frames, obs))
        return rows
    scale, shift = torso.scaling()
    if frames is not None and frames.dim() == 3 and frames.dtype == torch.uint8:
        images: Tensor = look_up_pixels(frames, obs, scale, shift)
        return images
    pixels = torso.prepare(obs if frames is None else look_up(frames, obs))
    return torch.add(shift, pixels, alpha=scale) if shift else pixels * scale


class _Passed(NamedTuple):
    """What a forward pass leaves for the backward pass."""

    maps: list[Tensor]  # the input, and the outputs of each convolution after its ReLU
    hidden: list[list[Tensor]]  # of each stream, the inputs of its layers: features, and what follows each ReLU
    outputs: list[Tensor]  # of each stream


class _Layers:
    """A `QNetwork`'s layers in their order; the first stream is that of the advantages, or the only one."""

    def __init__(self, network: QNetwork) -> None:
        assert isinstance(network.torso, (PixelTorso, VectorTorso))
        self.torso = network.torso
        self._convs = [conv for conv in getattr(self.torso, "convs", ()) if isinstance(conv, nn.Conv2d)]
        # cuDNN's convolution with ReLU needs a bias, and PyTorch would make one at each call.
        self._biases = [
            conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias for conv in self._convs
        ]
        streams = (network.advantage, network.value)
        self._streams = [
            [layer for layer in stream if isinstance(layer, nn.Linear)] for stream in streams if stream is not None
        ]
        self._split = len(self._streams) > 1 and self.torso.splits

    def forward(self, x: Tensor) -> _Passed:
        """Pass (N, ...) inputs through all layers."""
        maps = [x]
        for conv, bias in zip(self._convs, self._biases, strict=True):
            maps.append(_conv_relu(maps[-1], conv, bias))
        features = maps[-1].flatten(1)
        hidden: list[list[Tensor]] = []
        outputs = []
        for stream, features_of in zip(self._streams, self._features_of_streams(features), strict=True):
            *firsts, last = stream
            passed = [features_of]
            for linear in firsts:
                passed.append(_linear_relu(passed[-1], linear))
            outputs.append(F.linear(passed[-1], last.weight, last.bias))
            hidden.append(passed)
        return _Passed(maps, hidden, outputs)

    def backward(self, passed: _Passed, slopes: Sequence[Tensor]) -> None:
        """Give each parameter its gradient, from (B, ...) slopes of the loss in each stream's outputs.

        B may be less than the samples that were passed: the others have no part in the loss.
        """
        size = len(slopes[0])
        of_features: list[Tensor] = []
        for stream, inputs, slope in zip(self._streams, passed.hidden, slopes, strict=False):
            for index in range(len(stream) - 1, -1, -1):
                linear, x = stream[index], inputs[index][:size]
                linear.weight.grad = slope.t() @ x
                if linear.bias is not None:
                    linear.bias.grad = slope.sum(dim=0)
                if index:
                    slope = _aten.threshold_backward(slope @ linear.weight, x, 0)
            if not self._convs:
                continue
            if self._split or not of_features:
                of_features.append(slope @ stream[0].weight)
            else:
                of_features[0] = torch.addmm(of_features[0], slope, stream[0].weight)
        if self._convs:
            joined = torch.cat(of_features[::-1], dim=1) if self._split else of_features[0]
            self._backward_through_convs(passed.maps, joined, size)

    def _features_of_streams(self, features: Tensor) -> Sequence[Tensor]:
        if self._split:  # the first half is the value's
            value, advantage = features.chunk(2, dim=1)
            return advantage, value
        return [features] * len(self._streams)

    def _backward_through_convs(self, maps: Sequence[Tensor], of_features: Tensor, size: int) -> None:
        slope = of_features.view(size, *maps[-1].shape[1:]).contiguous(memory_format=torch.channels_last)
        for index in range(len(self._convs) - 1, -1, -1):
            conv, x = self._convs[index], maps[index][:size]
            slope = _aten.threshold_backward(slope, maps[index + 1][:size], 0)
            biases = None if conv.bias is None else [conv.out_channels]
            wanted = [index > 0, True, conv.bias is not None]
            slope, weight, bias = _aten.convolution_backward(
                *(slope, x, conv.weight, biases, conv.stride, conv.padding, conv.dilation, False, [0, 0], 1, wanted)
            )
            conv.weight.grad = weight
            if conv.bias is not None:
                conv.bias.grad = bias


def _conv_relu(x: Tensor, conv: nn.Conv2d, bias: Tensor) -> Tensor:
    """Return relu(conv(x)); on a GPU that is one of cuDNN's kernels."""
    if x.device.type == "cuda":
        y: Tensor = _aten.cudnn_convolution_relu(
            x, conv.weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups
        )
        return y
    return F.relu_(conv(x))


def _linear_relu(x: Tensor, linear: nn.Linear) -> Tensor:
    """Return relu(linear(x)); on a GPU that is one of cuBLAS's kernels."""
    if linear.bias is None:
        return F.relu_(linear(x))
    y: Tensor = torch._addmm_activation(linear.bias, x, linear.weight.t())
    return y

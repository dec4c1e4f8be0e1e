"""Policies: the action values of a network, computed on its device and in its precision, for acting."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pydqn._util.cuda import (
    CaptureError,
    DeviceToHost,
    Graph,
    HostToDevice,
    on,
    preserved,
    seconds_of,
    tensor_float_32,
    warm_up,
)
from pydqn._util.machine import default_torch_threads, instruction_sets, usable_cores
from pydqn.config import Config
from pydqn.learning.candidates import REPLAYS, choose, require_agreement
from pydqn.learning.fused import FusedValues, reason_against
from pydqn.learning.networks import QNetwork, mixed_precision_copy
from pydqn.learning.noise import Noise
from pydqn.learning.records import MASKED
from pydqn.learning.torsos import PixelTorso
from pydqn.learning.values import midpoints
from pydqn.replay.lookup import look_up

_LEVELS = 21  # of quantiles that are shown


def resolve_device(name: str) -> torch.device:
    """Turn "auto", "cpu", "cuda" or "cuda:N" into a device of this machine.

    Raises:
        ValueError: this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            way_on = "--device cpu (in Python device='cpu') does without"
            raise ValueError(f"device: {name!r} is not there; PyTorch sees {count} CUDA devices; {way_on}")
    return device


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """Turn "auto", "float32" or "bfloat16" into the dtype of the network's arithmetic.

    "auto" is bfloat16 on processors with instructions for it (AVX-512 BF16, AMX), and float32 elsewhere. (In a `Policy`
    it is always float32, unless its network is one of pydqn's that sees nothing but pixels.)
    """
    if name == "auto":
        return torch.bfloat16 if device.type == "cpu" and _bfloat16_is_faster() else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def _bfloat16_is_faster() -> bool:
    """Return whether the processor multiplies bfloat16: such layers then take half as long, elsewhere several times.

    This is not measured, so that the same seed gives the same run on the same machine.
    """
    if not torch.backends.mkldnn.is_available():  # no other kernels for it
        return False
    capabilities = getattr(torch.cpu, "get_capabilities", None)  # not in older releases
    found = [name for name, has in capabilities().items() if has] if capabilities else instruction_sets()
    return "avx512_bf16" in found or "amx_bf16" in found


@contextmanager
def torch_threads(config: Config, network: nn.Module) -> Iterator[int]:
    """Set the number of PyTorch's CPU threads, from the config or a suitable default, until the block ends.

    The number applies to the whole process: blocks in two of its threads interfere.
    """
    before = set_torch_threads(config, network)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def set_torch_threads(config: Config, network: nn.Module) -> int:
    """Set the number of PyTorch's CPU threads, as `torch_threads` does; return the number before."""
    before = torch.get_num_threads()
    convolutional = any(isinstance(module, nn.Conv2d) for module in network.modules())
    suitable = default_torch_threads(convolutional, usable_cores())
    torch.set_num_threads(config.torch_threads or min(before, suitable or before))
    return before


def new_generator(device: torch.device, seed: int) -> torch.Generator:
    """Return a generator of random tensors on the device."""
    generator = torch.Generator(device)
    generator.manual_seed(seed)
    return generator


class Policy:
    """A network for acting: action values without gradients, in a learner's precision.

    `network` has the float32 parameters. `compute_network` computes: the same network, or with bfloat16 a copy whose
    layers have bfloat16 parameters (see `mixed_precision_copy`).
    """

    def __init__(self, network: nn.Module, device: torch.device, precision: str = "auto") -> None:
        self.device = device
        # bfloat16 represents pixels, integers below 256, exactly. Other observations would lose digits, and of a
        # network that is not ours we do not know what it can lose.
        if precision == "auto" and not isinstance(getattr(network, "torso", None), PixelTorso):
            precision = "float32"
        self.dtype = resolve_precision(precision, device)
        self.network = network.to(device)
        for tensor in (*network.parameters(), *network.buffers()):  # images channels-last, everything else contiguous
            layout = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
            tensor.data = tensor.data.contiguous(memory_format=layout)
        exact = self.dtype == torch.float32
        self.compute_network = self.network if exact else mixed_precision_copy(self.network, self.dtype)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context in which `compute_network` runs."""
        if self.dtype == torch.float32 or isinstance(getattr(self.network, "torso", None), PixelTorso):
            return nullcontext()
        # A graph must cast the weights at each replay, so it may not remember a cast.
        return torch.autocast(self.device.type, self.dtype, cache_enabled=self.device.type == "cpu")

    @torch.no_grad()
    def forward(self, obs: Tensor) -> Tensor:
        """Return (B, A) float32 action values of (B, stack, *frame_shape) observations, both on the device."""
        with self.autocast():
            values: Tensor = self.compute_network(obs).float()  # NumPy does not know bfloat16
        return values

    def values(self, obs: NDArray[Any]) -> NDArray[np.float32]:
        """Return (B, A) action values of (B, stack, *frame_shape) observations."""
        return self.forward(torch.from_numpy(obs).to(self.device)).cpu().numpy()

    def quantiles(self, obs: NDArray[Any], action: NDArray[np.int64]) -> NDArray[np.float32] | None:
        """Return (B, 21) quantiles of the returns of (B,) actions, at evenly spaced levels; None of scalar values."""
        found = self.quantiles_of(*(torch.from_numpy(array).to(self.device) for array in (obs, action)))
        return None if found is None else found.cpu().numpy()

    @torch.no_grad()
    def quantiles_of(self, obs: Tensor, action: Tensor) -> Tensor | None:
        """Return what `quantiles` does, of and as float32 tensors on the device."""
        network = self.compute_network
        if not isinstance(network, QNetwork) or network.representation is None:
            return None
        with self.autocast():
            return network.quantiles(obs, action, midpoints(_LEVELS).to(self.device)).float()

    @staticmethod
    def choose(
        values: NDArray[np.float32],
        epsilon: float | NDArray[np.float64],
        generator: np.random.Generator,
        temperature: float = 0.0,
    ) -> NDArray[np.int64]:
        """Return (B,) epsilon-greedy actions for (B, A) action values, drawn independently of each other.

        Random actions are drawn from those that are allowed: whose value is not `MASKED`.

        Args:
            values: action values.
            epsilon: the probability of a random action; one number, or (B,).
            generator: of random numbers.
            temperature: above 0, the other actions are drawn too, with probabilities softmax(values / temperature).
        """
        explore = generator.random(len(values)) < epsilon
        allowed = values != MASKED
        if allowed.all():
            random_actions = generator.integers(values.shape[1], size=len(values))
        else:
            rank = np.floor(generator.random(len(values)) * allowed.sum(axis=1))
            random_actions = (allowed.cumsum(axis=1) > rank[:, None]).argmax(axis=1)
        if temperature > 0:  # the largest of values with Gumbel noise is a draw from their softmax
            noise = generator.gumbel(size=values.shape)
            values = np.where(allowed, values.astype(np.float64) / temperature + noise, -np.inf)
        return np.where(explore, random_actions, values.argmax(axis=1))


class Actor:
    """Action values for a fixed number of environments, on a GPU with a CUDA graph and a single wait per call.

    If the network has noisy layers, each environment gets noise of its own, drawn anew at each call.

    During the capture, at the first `values`, no other thread may wait for the device: PyTorch's mode that detects this
    applies to the whole process.

    Args:
        policy: the policy to act with; its network may go on learning.
        example: what the replay buffer's `latest` returns, for its shape and dtype.
        frames: if `latest` returns row numbers instead of observations, the tensor of frames that these number
            (`DeviceReplay.frames`).
        capture: whether to use a CUDA graph. None uses one on CUDA devices, and if the policy cannot be captured, warns
            and goes on without. True makes that an error.
        seed: of the noise.
        form: the learner's setting `update`. Unless it is "plain", PyTorch's own form, a capture tries all forms that
            fit, and keeps the fastest that agrees with that. Each actor chooses for itself.
    """

    def __init__(
        self,
        policy: Policy,
        example: NDArray[Any],
        frames: Tensor | None = None,
        capture: bool | None = None,
        *,
        seed: int = 0,
        form: str = "auto",
    ) -> None:
        self._policy, self._frames = policy, frames
        self._forms: dict[str, Callable[[], Tensor]] = {"plain": self._forward}
        network = policy.compute_network
        if isinstance(network, QNetwork) and form != "plain" and not reason_against(network):
            self._forms["fused"] = functools.partial(self._of_sent, FusedValues(network, frames))
        self._noise = Noise(policy.compute_network, len(example), policy.device)
        self._generator = new_generator(policy.device, seed) if self._noise else None
        self._to_device = HostToDevice([example], policy.device, names=["obs"])
        self._to_host = DeviceToHost(policy.device)
        self._captures = policy.device.type == "cuda" if capture is None else capture
        self._must_capture = bool(capture)
        self._graph: Graph[Tensor] | None = None

    def values(self, obs: NDArray[Any]) -> NDArray[np.float32]:
        """Return (num_envs, A) action values. The next call overwrites them."""
        with on(self._policy.device):
            self._to_device.put([obs])
            if self._captures and self._graph is None:
                self._capture()
            self._to_host.put(self._graph() if self._graph is not None else self._forward())
            return self._to_host.get()

    def _capture(self) -> None:
        """Capture the graph. This leaves buffers that the network changes in its forward pass as they were."""
        stream = torch.cuda.Stream(self._policy.device)
        drawn = self.state()
        try:
            with preserved([*self._policy.network.buffers()]):
                chosen = self._choose(stream) if len(self._forms) > 1 else self._forward
                warm_up(chosen, stream)
            self.load_state(drawn)
            self._graph = Graph(chosen, stream, generator=self._generator)
        except CaptureError as error:
            if self._must_capture:
                raise CaptureError(f"capture: the policy cannot become a CUDA graph ({error})") from error
            warnings.warn(f"actions are chosen without a CUDA graph, and slower: {error}", RuntimeWarning, stacklevel=4)
            self._captures = False

    def _choose(self, stream: torch.cuda.Stream) -> Callable[[], Tensor]:
        """Return the fastest form that agrees with the exact values of what was sent last."""
        with tensor_float_32(products=False, convolutions=False):
            expected = self._forward().clone()

        def attempt(name: str, form: Callable[[], Tensor]) -> float:
            warm_up(form, stream)
            graph = Graph(form, stream)
            require_agreement({"values": graph()}, {"values": expected})
            return seconds_of(graph, REPLAYS, self._policy.device)

        return self._forms[choose(self._forms, attempt)[0]]

    def state(self) -> Tensor | None:
        """Return the state of the noise's random generator; None if there is no noise."""
        return None if self._generator is None else self._generator.get_state()

    def load_state(self, state: Tensor | None) -> None:
        """Go on from what `state` returned. Another kind of device has other states, which change nothing."""
        if self._generator is not None and state is not None and state.shape == self._generator.get_state().shape:
            self._generator.set_state(state.cpu())

    def _forward(self) -> Tensor:
        (obs,) = self._to_device.tensors
        self._noise.draw(self._generator)
        with self._noise.applied():
            return self._policy.forward(obs if self._frames is None else look_up(self._frames, obs))

    def _of_sent(self, values: Callable[[Tensor], Tensor]) -> Tensor:
        return values(self._to_device.tensors[0])

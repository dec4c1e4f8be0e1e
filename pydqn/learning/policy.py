"""Policies: a network on its device, in the arithmetic that suits it, for acting."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pydqn._util.cuda import CannotRecordError, DeviceToHost, Graph, HostToDevice, on, unchanged, warm_up
from pydqn._util.machine import default_torch_threads, instruction_sets, usable_cores
from pydqn.config import Config
from pydqn.learning.networks import PixelTorso, Table, VectorTorso, lowered
from pydqn.replay.lookup import look_up


def resolve_device(name: str) -> torch.device:
    """Turn "auto", "cpu", "cuda" or "cuda:N" into a device that is there.

    Raises:
        ValueError: no such device on this machine.
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

    "auto" takes bfloat16 on processors with instructions for it (AVX-512 BF16, AMX), and float32 elsewhere. (A `Policy`
    whose observations are not pixels takes float32 everywhere.)
    """
    if name == "auto":
        return torch.bfloat16 if device.type == "cpu" and _bfloat16_pays() else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def _bfloat16_pays() -> bool:
    """Whether the processor multiplies bfloat16 itself: then such layers take half as long, elsewhere several times.

    The answer is the machine's and not a measurement's, so that the same seed is the same run there.
    """
    if not torch.backends.mkldnn.is_available():  # PyTorch has no other kernels for it
        return False
    capabilities = getattr(torch.cpu, "get_capabilities", None)  # not in older releases
    there = [name for name, has in capabilities().items() if has] if capabilities else instruction_sets()
    return "avx512_bf16" in there or "amx_bf16" in there


@contextmanager
def torch_threads(config: Config) -> Iterator[int]:
    """Let PyTorch use as many threads of the CPU as the config says, or as suit it, until the block ends.

    The number is the whole process's: blocks in two threads of it change each other's.
    """
    before = torch.get_num_threads()
    suitable = default_torch_threads(config.network != "mlp", usable_cores())
    count = config.torch_threads or min(before, suitable or before)
    torch.set_num_threads(count)
    try:
        yield count
    finally:
        torch.set_num_threads(before)


class Policy:
    """Action values of a network, for acting: no gradients, the learner's own precision."""

    def __init__(self, network: nn.Module, device: torch.device, precision: str = "auto") -> None:
        self.device = device
        # Pixels are whole numbers below 256, which bfloat16 holds; of other observations it would drop digits.
        if precision == "auto" and isinstance(getattr(network, "torso", network), (VectorTorso, Table)):
            precision = "float32"
        self.dtype = resolve_precision(precision, device)
        # The float32 parameters, and what computes: the same network, or one with copies of them in bfloat16.
        self.network = network.to(device)
        for tensor in (*network.parameters(), *network.buffers()):  # images channels-last, everything else in order
            layout = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
            tensor.data = tensor.data.contiguous(memory_format=layout)
        self.computing = self.network if self.dtype == torch.float32 else lowered(self.network, self.dtype)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context in which `computing` runs."""
        if self.dtype == torch.float32 or isinstance(getattr(self.network, "torso", None), PixelTorso):
            return nullcontext()
        # A graph must cast the weights each time that it is replayed, so a cast may not be remembered.
        return torch.autocast(self.device.type, self.dtype, cache_enabled=self.device.type == "cpu")

    @torch.no_grad()
    def forward(self, obs: Tensor) -> Tensor:
        """Return (B, A) action values of (B, stack, *frame_shape) observations, both on the device."""
        with self.autocast():
            values: Tensor = self.computing(obs)
        return values

    def values(self, obs: NDArray[Any]) -> NDArray[np.float32]:
        """Return (B, A) action values of (B, stack, *frame_shape) observations."""
        return self.forward(torch.from_numpy(obs).to(self.device)).cpu().numpy()

    @staticmethod
    def choose(values: NDArray[np.float32], epsilon: float, generator: np.random.Generator) -> NDArray[np.int64]:
        """Return (B,) epsilon-greedy actions for (B, A) action values; every environment tosses its own coin."""
        explore = generator.random(len(values)) < epsilon
        anything = generator.integers(values.shape[1], size=len(values))
        return np.where(explore, anything, values.argmax(axis=1))


class Actor:
    """A policy for the same number of environments again and again: on a GPU a graph, for which one wait is all that is lost.

    While the graph is being recorded, at the first `values`, no other thread may wait for the device: PyTorch's mode
    that finds such waits is one for the whole process.

    Args:
        policy: whose values; its network may go on learning.
        example: what a memory's `latest` gives, for its shape and dtype.
        frames: where `latest` gives rows instead of observations, what they are rows of (`DeviceReplay.frames`).
        capture: whether to use a CUDA graph; None for wherever there is CUDA and it can be recorded: where it cannot, a
            warning says why, and acting goes on without. True makes that an error.
    """

    def __init__(
        self, policy: Policy, example: NDArray[Any], frames: Tensor | None = None, capture: bool | None = None
    ) -> None:
        self._policy = policy
        self.frames = frames
        self._to_device, self._to_host = (
            HostToDevice([example], policy.device, names=["obs"]),
            DeviceToHost(policy.device),
        )
        self._captures = policy.device.type == "cuda" if capture is None else capture
        self._insists = bool(capture)
        self._graph: Graph[Tensor] | None = None

    def values(self, obs: NDArray[Any]) -> NDArray[np.float32]:
        """Return (num_envs, A) action values; they are good until the next call."""
        with on(self._policy.device):
            self._to_device.put([obs])
            if self._captures and self._graph is None:
                self._capture()
            self._to_host.put(self._graph() if self._graph is not None else self._forward())
            return self._to_host.get()

    def _capture(self) -> None:
        """Record the graph. Buffers that a network changes as it runs are changed by none of that."""
        stream = torch.cuda.Stream(self._policy.device)
        try:
            with unchanged([*self._policy.network.buffers()]):
                warm_up(self._forward, stream)
            self._graph = Graph(self._forward, stream)
        except CannotRecordError as error:
            if self._insists:
                raise CannotRecordError(f"capture: the policy cannot become a CUDA graph ({error})") from error
            warnings.warn(f"actions are chosen without a CUDA graph, and slower: {error}", RuntimeWarning, stacklevel=4)
            self._captures = False

    def _forward(self) -> Tensor:
        (obs,) = self._to_device.tensors
        return self._policy.forward(obs if self.frames is None else look_up(self.frames, obs))

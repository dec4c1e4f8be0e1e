"""The learner: one update function over fixed tensors, run eagerly or captured in a CUDA graph."""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from pydqn.config import Config
from pydqn.losses import LOSSES, td_error
from pydqn.networks import PixelTorso, Table, VectorTorso, lowered, tensors_of
from pydqn.optimizers import Settings, State, make_optimizer
from pydqn.replay import Batch

_WARMUP_UPDATES = 3  # before a capture: lets libraries choose kernels and the optimizer make its state


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
            raise ValueError(f"device: {name!r} is not there; PyTorch sees {count} CUDA devices")
    return device


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """Turn "auto", "float32" or "bfloat16" into the dtype of the network's arithmetic.

    "auto" takes bfloat16 on processors that turn out to be faster with it, and float32 elsewhere. (A `Policy` whose
    observations are not pixels takes float32 everywhere.)
    """
    if name == "auto":
        return torch.bfloat16 if device.type == "cpu" and _bfloat16_pays() else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


@functools.cache
@torch.no_grad()
def _bfloat16_pays() -> bool:
    """Time two of Nature's layers both ways: some milliseconds, once per process.

    Processors with instructions for bfloat16 take about half as long with it, others several times as long: far enough
    apart for the same answer each time, as the same run from the same seed needs it.
    """
    best = {torch.float32: math.inf, torch.bfloat16: math.inf}
    for _ in range(8):
        for dtype in best:
            image, features = torch.ones(32, 32, 20, 20, dtype=dtype), torch.ones(32, 3136, dtype=dtype)
            image = image.contiguous(memory_format=torch.channels_last)
            kernel, weight = torch.ones(64, 32, 4, 4, dtype=dtype), torch.ones(512, 3136, dtype=dtype)
            started = time.perf_counter()
            F.conv2d(image, kernel, stride=2)
            F.linear(features, weight)
            best[dtype] = min(best[dtype], time.perf_counter() - started)
    return best[torch.bfloat16] < 0.8 * best[torch.float32]


class Policy:
    """Action values of a network, for acting: no gradients, the learner's own precision."""

    def __init__(self, network: nn.Module, device: torch.device, precision: str = "auto") -> None:
        self.device = device
        # Pixels are whole numbers below 256, which bfloat16 holds; of other observations it would drop digits.
        if precision == "auto" and isinstance(getattr(network, "torso", network), (VectorTorso, Table)):
            precision = "float32"
        self.dtype = resolve_precision(precision, device)
        # The float32 parameters, and what computes: the same network, or one with copies of them in bfloat16.
        self.network: nn.Module = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.computing = self.network if self.dtype == torch.float32 else lowered(self.network, self.dtype)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context in which `computing` runs."""
        if self.dtype == torch.float32 or isinstance(getattr(self.network, "torso", None), PixelTorso):
            return nullcontext()
        # A graph must cast the weights each time that it is replayed, so a cast may not be remembered.
        return torch.autocast(self.device.type, self.dtype, cache_enabled=self.device.type == "cpu")

    @torch.no_grad()
    def values(self, obs: NDArray[Any]) -> NDArray[np.float32]:
        """Return (B, A) action values of (B, stack, *frame_shape) observations."""
        with self.autocast():
            values: Tensor = self.computing(torch.from_numpy(obs).to(self.device))
        return values.cpu().numpy()

    @staticmethod
    def choose(values: NDArray[np.float32], epsilon: float, generator: np.random.Generator) -> NDArray[np.int64]:
        """Return (B,) epsilon-greedy actions for (B, A) action values; every lane tosses its own coin."""
        explore = generator.random(len(values)) < epsilon
        anything = generator.integers(values.shape[1], size=len(values))
        return np.where(explore, anything, values.argmax(axis=1))

    def act(self, obs: NDArray[Any], epsilon: float, generator: np.random.Generator) -> NDArray[np.int64]:
        """Return (B,) epsilon-greedy actions for (B, stack, *frame_shape) observations."""
        return self.choose(self.values(obs), epsilon, generator)


class Metrics(NamedTuple):
    """What the latest update saw, as plain numbers."""

    loss: float  # weighted mean of the per-sample losses
    mean_q: float  # mean over the batch of the values of the actions taken
    grad_norm: float  # before clipping
    max_q: float  # largest action value of the batch


class _Seen(NamedTuple):
    """The same as tensors, worked out when someone asks; after a capture, memory that every replay writes again."""

    loss: Tensor
    norm: Tensor
    action: Tensor  # (B,)
    errors: Tensor  # (B,)
    losses: Tensor  # (B,)
    values: Tensor  # (B, A)


class Learner:
    """Owns the online and the target network and the optimizer.

    `update` runs one gradient step. On a CUDA device the whole step is captured once and replayed: batch, learning rate
    and step counter live on the device. The host runs ahead by one update: it waits only until the batch before has
    left the pinned memory. On a CPU the same function runs eagerly.

    Args:
        network: takes (B, stack, *frame_shape) observations, gives (B, A) values. Any `nn.Module` will do; where it
            has a method `prepare`, observations go through that once for all the networks that see them.
        config: the fields of the loss and the optimizer.
        device: where to learn, as `resolve_device` gives it.
        example: a batch of the replay memory, for shapes and dtypes (`replay.empty_batch(batch_size)`).
        capture: whether to use a CUDA graph; None for wherever there is CUDA.
    """

    def __init__(
        self,
        network: nn.Module,
        config: Config,
        device: torch.device,
        example: Batch,
        capture: bool | None = None,
    ) -> None:
        self.device = device
        self.updates = 0
        self._config = config
        self._capture = device.type == "cuda" if capture is None else capture
        if self._capture and device.type != "cuda":
            raise ValueError(f"capture: a CUDA graph needs a CUDA device, got {device}")
        self.policy = Policy(network, device, config.precision)
        self.online, self._computing = self.policy.network, self.policy.computing
        self.target = copy.deepcopy(self._computing).requires_grad_(False)
        self._prepare: Callable[[Tensor], Tensor] = getattr(self._computing, "prepare", lambda obs: obs)
        self._learning_rate = torch.tensor(config.learning_rate, dtype=torch.float32, device=device)
        self._parameters, self._copies = list(self.online.parameters()), list(self._computing.parameters())
        self._optimizer = make_optimizer(
            Settings(config.optimizer, config.optimizer_epsilon, config.rmsprop_decay, config.rmsprop_momentum),
            self._parameters,
            self._copies,
            self._learning_rate,
        )
        self._loss = LOSSES[config.loss]
        self._seen: _Seen | None = None
        self._batch = [torch.from_numpy(part) for part in example]
        self._host: list[Tensor] = []
        self._uploaded: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._batch = [torch.empty(part.shape, dtype=part.dtype, device=device) for part in self._batch]
            self._host = [torch.empty_like(part, device="cpu", pin_memory=True) for part in self._batch]
            self._uploaded = torch.cuda.Event()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._step: Callable[[], None] = self._update

    def update(self, batch: Batch) -> None:
        """Run one gradient step on `batch`, and copy the online network to the target when that is due."""
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            if self.device.type == "cuda":
                self._upload(batch)
            else:
                self._batch = [torch.from_numpy(part) for part in batch]
            if self._capture and self._graph is None:
                self._record()
            self._step()
            self.updates += 1
            every = self._config.target_sync_updates
            if every and self.updates % every == 0:
                self.sync_target()

    @torch.no_grad()
    def sync_target(self) -> None:
        """Copy the online network to the target network."""
        torch._foreach_copy_(tensors_of(self.target), tensors_of(self._computing))

    def metrics(self) -> Metrics:
        """Return what the latest update saw (waits for the device). Before the first one there is nothing: NaN."""
        if self._seen is None:
            return Metrics(*[math.nan] * 4)
        taken = self._seen.values.gather(1, self._seen.action.unsqueeze(1))
        parts = [self._seen.loss, taken.mean(), self._seen.norm.to(self.device), self._seen.values.max()]
        return Metrics(*torch.stack(parts).tolist())

    def samples(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the latest update's (B,) losses per sample and (B, A) action values (waits for the device)."""
        if self._seen is None:
            return np.zeros(0, np.float32), np.zeros((0, 0), np.float32)
        return self._seen.losses.cpu().numpy(), self._seen.values.cpu().numpy()

    def errors(self) -> NDArray[np.float32]:
        """Return the (B,) sizes of the latest update's TD errors, unweighted (waits for the device)."""
        return np.zeros(0, np.float32) if self._seen is None else self._seen.errors.abs().cpu().numpy()

    @property
    def learning_rate(self) -> float:
        """The optimizer's step size; may be set at any time, also after a capture."""
        return float(self._learning_rate)

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        self._learning_rate.fill_(value)

    def state(self) -> dict[str, Tensor]:
        """Return all tensors that a learner needs to go on: both networks' and the optimizer's, by name."""
        tensors = {f"online.{name}": value for name, value in self.online.state_dict().items()}
        tensors |= {f"target.{name}": value for name, value in self.target.state_dict().items()}
        for number, state in enumerate(self._optimizer.state()):
            tensors |= {f"optimizer.{number}.{name}": value for name, value in state.items()}
        return tensors

    def restore(self, tensors: dict[str, Tensor], updates: int) -> None:
        """Go on from what `state` gave when the learner had made `updates` updates. Nothing has been captured yet.

        Raises:
            ValueError: the tensors are not those of such a learner.
        """
        state: State = [{} for _ in self._parameters]
        networks: dict[str, dict[str, Tensor]] = {"online": {}, "target": {}}
        for name, value in tensors.items():
            part, _, rest = name.partition(".")
            if part == "optimizer":
                number, _, rest = rest.partition(".")
                state[int(number)][rest] = value
            elif part in networks:
                networks[part][rest] = value
            else:
                raise ValueError(f"checkpoint: {name!r} is not part of a learner")
        try:
            self.online.load_state_dict(networks["online"])
            self.target.load_state_dict(networks["target"])
        except RuntimeError as error:
            raise ValueError(f"checkpoint: does not fit the config ({str(error).splitlines()[1].strip()})") from None
        self._optimizer.restore(state)
        self._optimizer.refresh()
        self.updates = updates

    def _update(self) -> None:
        """One gradient step on the static batch. No branch on data, no host synchronisation."""
        obs, action, reward, discount, next_obs, _, weight = self._batch
        with self.policy.autocast():
            obs, next_obs = self._prepare(obs), self._prepare(next_obs)
            # With gradients first: autocast remembers its casts of the weights, and those made without gradients
            # would cut the graph (PyTorch before 2.10).
            q_tm1 = self._computing(obs)
            with torch.no_grad():
                q_t = self.target(next_obs)
                selector_t = self._computing(next_obs) if self._config.double else None
        errors = td_error(q_tm1, action, reward, discount, q_t, selector_t)
        losses = self._loss(errors)
        loss = (weight * losses).mean()
        for copy_ in self._copies:
            copy_.grad = None
        loss.backward()
        norm = self._optimizer.step(self._config.max_grad_norm or torch.inf)
        self._seen = _Seen(loss.detach(), norm, action, errors.detach(), losses.detach(), q_tm1.detach())

    # --- the CUDA graph ---

    def _upload(self, batch: Batch) -> None:
        """Copy a batch to the static tensors through pinned memory."""
        assert self._uploaded is not None
        self._uploaded.synchronize()  # the upload before may still be reading the pinned memory
        for part, host, device in zip(batch, self._host, self._batch, strict=True):
            host.copy_(torch.from_numpy(part))
            device.copy_(host, non_blocking=True)
        self._uploaded.record()

    def _record(self) -> None:
        """Capture `_update`. The warm-up updates are undone, so that capturing changes nothing."""
        changed = [
            *tensors_of(self.online),
            *(tensor for state in self._optimizer.state() for tensor in state.values()),
        ]
        before = [tensor.detach().clone() for tensor in changed]
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(_WARMUP_UPDATES):
                self._update()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        with torch.no_grad():
            # What the warm-up made begins at zero; what was there is put back.
            for state in self._optimizer.state():
                for tensor in state.values():
                    tensor.zero_()
            for tensor, value in zip(changed, before, strict=True):
                tensor.copy_(value)
            self._optimizer.refresh()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream):
            self._update()
        self._step = self._graph.replay

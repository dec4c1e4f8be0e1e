"""The learner: one update function over fixed tensors, run eagerly or captured in a CUDA graph."""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pydqn._util.cuda import CannotRecordError, DeviceToHost, Graph, HostToDevice, on, unchanged, warm_up
from pydqn.config import Config
from pydqn.learning.losses import LOSSES, td_error
from pydqn.learning.networks import tensors_of
from pydqn.learning.optimizers import Settings, State, make_optimizer
from pydqn.learning.policy import Policy, resolve_device
from pydqn.replay.frames import Batch
from pydqn.replay.lookup import look_up


class Metrics(NamedTuple):
    """What the latest update saw, as plain numbers. With a loss of one's own, values are unknown: NaN."""

    loss: float  # weighted mean of the per-sample losses
    mean_q: float  # mean over the batch of the values of the actions taken
    grad_norm: float  # before clipping
    max_q: float  # largest action value of the batch


_AS_BEFORE = "leave the settings of network and optimizer as they were, or start a new run"


class Transitions(NamedTuple):
    """What a loss of one's own sees of B transitions: tensors on the device, to be read only.

    Their importance weights are not among them: the learner multiplies the losses by them.
    """

    obs: Tensor  # (B, stack, *frame_shape), the memory's dtype; or what the network's `prepare` made of that
    action: Tensor  # (B,) int64
    reward: Tensor  # (B,) float32: sum of gamma^j r_j over the window, j < k
    discount: Tensor  # (B,) float32: gamma^k, or 0 after termination
    next_obs: Tensor  # as obs, k steps later


OwnLoss = Callable[[nn.Module, nn.Module, Transitions], Tensor]  # online, target, batch: one loss per sample, (B,)


class _Seen(NamedTuple):
    """What metrics are worked out from when someone asks; after a capture, memory that every replay writes again."""

    norm: Tensor
    action: Tensor  # (B,)
    weight: Tensor  # (B,)
    errors: Tensor  # (B,): TD errors, or what a loss of one's own gave
    values: Tensor | None  # (B, A); None where only the loss knows them


class Learner:
    """Owns the online and the target network and the optimizer.

    `update` runs one gradient step, or several in a row. On a CUDA device they are captured and replayed, one graph for
    each number of steps that occurs: batches, learning rate and step counter live on the device. The host runs ahead:
    it waits only until the batch before has left the pinned memory. On a CPU the same function runs eagerly.

    With a `loss` of one's own, the network may give anything: autograd traces the loss, the gradient is that of the
    weighted mean of its values, and all else stays as it is. The target network makes no gradients; what `online` adds
    to a target wants `torch.no_grad()`. Both networks stay in the mode (`train` or `eval`) that they are in, and random
    numbers come from PyTorch's own generator of the device: `state` holds neither. On a CUDA device, the loss and the
    network run a few times to be recorded, and never again. So they may not branch on data, wait for the device
    (`.item()`) or bring numbers there (`torch.tensor`): then a warning names the line, and updates run without a graph
    (on a CPU nobody notices). What changes from one update to the next is a buffer of the network, changed in place,
    or a random number, new at each replay. While a graph is being recorded, at the first `update` of each number of
    steps, no other thread may wait for the device: PyTorch's mode that finds such waits is one for the whole process.

    Args:
        network: takes (B, stack, *frame_shape) observations, gives (B, A) values. Any `nn.Module` will do; where it
            has a method `prepare`, observations go through that once for all the networks that see them. All that is
            learned is a parameter of it, float32. The target is a copy of it, and gets its buffers as its parameters.
        config: the fields of the loss and the optimizer, `batch_size`, `target_update_period` and `precision`.
        device: where to learn, as `resolve_device` gives it, or takes it ("auto", "cpu", "cuda", "cuda:N").
        example: the largest batch that will come, for shapes and dtypes: `replay.empty_batch(n * config.batch_size)`,
            where n is the number of steps that `update` may have to take at once.
        capture: whether to use a CUDA graph; None for wherever there is CUDA and it can be recorded: where it cannot, a
            warning says why, and updates go on without. True makes that an error.
        frames: where batches hold rows instead of observations, what they are rows of (`DeviceReplay.frames`).
        loss: gives the (B,) losses of `Transitions`, one per sample: `loss(online, target, batch)`. `config.loss` and
            `config.double` mean nothing then, and the precision "auto" is float32; with "bfloat16" it runs under
            autocast. None for the loss of TD errors that `config` names.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        network: nn.Module,
        config: Config,
        device: torch.device | str,
        example: Batch,
        capture: bool | None = None,
        frames: Tensor | None = None,
        *,
        loss: OwnLoss | None = None,
    ) -> None:
        if loss is not None and not callable(loss):
            raise ValueError(f"loss: expected a function of (online, target, batch), got {loss!r} (see Config.loss)")
        self.device = device = resolve_device(device) if isinstance(device, str) else device
        self.updates = 0
        self._config = config
        captures = device.type == "cuda" if capture is None else capture
        if captures and device.type != "cuda":
            raise ValueError(f"capture: a CUDA graph needs a CUDA device, got {device}")
        exact = loss is not None and config.precision == "auto"
        self.policy = Policy(network, device, "float32" if exact else config.precision)
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
        self._loss, self._own_loss = LOSSES[config.loss], loss
        self.frames = frames
        self._most = len(example.action) // config.batch_size  # steps at once
        self._to_device = HostToDevice(example, device, names=example._fields)
        self._seen: _Seen | None = None
        self._seen_before = Metrics(*[math.nan] * 4)  # by the run that this one goes on with
        self._errors = torch.zeros(len(example.action), device=device)
        self._to_host = DeviceToHost(device)  # of errors
        self._graphs: dict[tuple[int, int], Graph[_Seen]] = {}  # by the first step's number and how many
        self._stream = torch.cuda.Stream(device) if captures else None  # to record on
        self._insists = bool(capture)
        # One pool for all graphs, which never run at the same time; only what the latest one gave is read.
        self._pool = torch.cuda.graph_pool_handle() if captures else None

    def update(self, batch: Batch) -> None:
        """Take one gradient step for every `config.batch_size` transitions, in their order.

        The online network is copied to the target whenever that is due, also between two of them.

        Raises:
            ValueError: the batch is not some whole number of batches, longer than the `example`, or of other dtypes; or
                a `loss` of one's own gave something else than one value per sample.
        """
        size = self._config.batch_size
        count, rest = divmod(len(batch.action), size)
        if rest or not 0 < count <= self._most:
            raise ValueError(
                f"batch: expected 1 to {self._most} times {size} transitions (config.batch_size), "
                f"got {len(batch.action)}"
            )
        every = self._config.target_update_period
        with on(self.device):
            self._to_device.put(batch)
            done = 0
            while done < count:
                # All at once, unless the target network changes in between.
                until = every - self.updates % every if every else count
                number = count - done if count - done <= until and not done else 1
                self._seen = self._take(done, number)
                self.updates += number
                done += number
                if number == until and every:
                    self.update_target()
            self._to_host.put(self._errors[: count * size])

    @torch.no_grad()
    def update_target(self) -> None:
        """Copy the online network to the target network."""
        torch._foreach_copy_(tensors_of(self.target), tensors_of(self._computing))

    def metrics(self) -> Metrics:
        """Return what the latest update saw (waits for the device). Before the first one there is nothing: NaN."""
        if self._seen is None:
            return self._seen_before
        norm, action, weight, errors, values = self._seen
        norm = norm.to(self.device)
        if values is None:
            loss, norm = torch.stack([(weight * errors).mean(), norm]).tolist()
            return Metrics(loss, math.nan, norm, math.nan)
        loss = (weight * self._loss.value(errors)).mean()
        taken = values.gather(1, action.unsqueeze(1))
        return Metrics(*torch.stack([loss, taken.mean(), norm, values.max()]).tolist())

    def samples(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the latest update's (B,) losses per sample and (B, A) action values (waits for the device).

        With a loss of one's own, there are no values: (0, 0).
        """
        if self._seen is None:
            return np.zeros(0, np.float32), np.zeros((0, 0), np.float32)
        errors, values = self._seen.errors, self._seen.values
        if values is None:
            return errors.cpu().numpy().copy(), np.zeros((0, 0), np.float32)
        return self._loss.value(errors).cpu().numpy(), values.cpu().numpy()

    def diagnosis(self) -> str:
        """Say what the latest update saw, for a person who has to find out why it diverged (waits for the device)."""
        size = self._config.batch_size
        obs, _, reward, *_ = (
            tensor[:size] for tensor in self._to_device.tensors
        )  # of the first, where there were several
        with on(self.device):
            metrics = self.metrics()
            obs = obs if self.frames is None else look_up(self.frames, obs)
            odd = [name for name, value in self.online.state_dict().items() if not torch.isfinite(value).all()]
        largest = f"the largest action value {metrics.max_q:g}, " if self._own_loss is None else ""
        return (
            f"the loss of update {self.updates:,} is {metrics.loss:g}, the gradient's norm {metrics.grad_norm:g}, "
            f"{largest}rewards lie from {reward.min():g} to {reward.max():g}, "
            f"observations are {'finite' if torch.isfinite(obs).all() else 'not finite'}, "
            f"weights {'not finite in ' + ', '.join(odd) if odd else 'finite'}, "
            f"the learning rate is {self.learning_rate:g} "
            "(mostly that is too large, or rewards are: see max_grad_norm, clip_rewards, loss)"
        )

    def errors(self) -> NDArray[np.float32]:
        """Return the sizes of the TD errors, unweighted, of all transitions in the latest `update`.

        With a loss of one's own, what it gave, sign and all: a prioritized memory takes nothing below zero.
        They are on their way since then: asked for after the next actions have come, they cost no wait.
        """
        return np.zeros(0, np.float32) if self._seen is None else self._to_host.get().copy()

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

    def restore(self, tensors: dict[str, Tensor], updates: int, metrics: Metrics | None = None) -> None:
        """Go on from what `state` gave when the learner had made `updates` updates; before its first one.

        `metrics` are what was seen by then.

        Raises:
            RuntimeError: graphs have been captured, which would go on writing to what is replaced.
            ValueError: the tensors are not those of such a learner.
        """
        if self._graphs:
            raise RuntimeError("restore: expected a learner that has made no update yet")
        state: State = [{} for _ in self._parameters]
        networks: dict[str, dict[str, Tensor]] = {"online": {}, "target": {}}
        for name, value in tensors.items():
            part, _, rest = name.partition(".")
            if part == "optimizer":
                number, _, rest = rest.partition(".")
                if not number.isdecimal() or int(number) >= len(state):
                    raise ValueError(f"checkpoint: does not fit the config ({name!r} is of no parameter); {_AS_BEFORE}")
                state[int(number)][rest] = value
            elif part in networks:
                networks[part][rest] = value
            else:
                raise ValueError(f"checkpoint: {name!r} is not part of a learner")
        try:
            self.online.load_state_dict(networks["online"])
            self.target.load_state_dict(networks["target"])
        except RuntimeError as error:
            reason = str(error).splitlines()[1].strip()
            raise ValueError(f"checkpoint: does not fit the config ({reason}); {_AS_BEFORE}") from None
        self._optimizer.restore(state)
        self._optimizer.refresh()
        self.updates = updates
        self._seen_before = Metrics(*[math.nan] * 4) if metrics is None else metrics

    def _take(self, start: int, count: int) -> _Seen:
        """Take `count` steps, from the `start`th of the batches in the inbox."""
        steps = functools.partial(self._steps, start, count)
        if self._stream is None:
            return steps()
        try:
            if not self._graphs:
                self._warm_up(self._stream)
            if (start, count) not in self._graphs:
                self._graphs[start, count] = Graph(steps, self._stream, self._pool)
        except CannotRecordError as error:
            if self._insists:
                raise CannotRecordError(f"capture: the update cannot become a CUDA graph ({error})") from error
            warnings.warn(f"updates run without CUDA graphs, and slower: {error}", RuntimeWarning, stacklevel=3)
            self._stream = None
            self._graphs.clear()
            return steps()
        return self._graphs[start, count]()

    def _steps(self, start: int, count: int) -> _Seen:
        for number in range(start, start + count - 1):
            self._step(number)
        return self._step(start + count - 1)

    def _step(self, number: int) -> _Seen:
        """One gradient step on fixed tensors. No branch on data, no wait for the device."""
        size = self._config.batch_size
        part = slice(number * size, (number + 1) * size)
        obs, action, reward, discount, next_obs, _, weight = (tensor[part] for tensor in self._to_device.tensors)
        batch = Transitions(obs, action, reward, discount, next_obs)
        values: Tensor | None = None
        if self._own_loss is None:
            root, gradient, errors = self._differentiated(batch, weight)
            values = root.detach()
            torch.abs(errors, out=self._errors[part])
        else:
            root = self._traced(self._own_loss, batch)
            gradient, errors = weight / size, self._errors[part].copy_(root.detach())
        for copy_ in self._copies:
            copy_.grad = None
        root.backward(gradient)
        norm = self._optimizer.step(self._config.max_grad_norm or torch.inf)
        return _Seen(norm, action, weight, errors, values)

    def _differentiated(self, batch: Transitions, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (B, A) action values, the gradient of the weighted mean of their losses, and (B,) TD errors."""
        with self.policy.autocast():
            obs, action, reward, discount, next_obs = self._observed(batch)
            # With gradients first: autocast remembers its casts of the weights, and those made without gradients
            # would cut the graph (PyTorch before 2.10).
            q_tm1 = self._computing(obs)
            with torch.no_grad():
                q_t = self.target(next_obs)
                selector_t = self._computing(next_obs) if self._config.double else None
        values = q_tm1.detach()
        errors = td_error(values, action, reward, discount, q_t, selector_t)
        # Only the actions that were taken have a slope.
        slope = (weight * self._loss.slope(errors)).mul_(-1 / len(action)).to(values.dtype)
        return q_tm1, torch.zeros_like(values).scatter_(1, action.unsqueeze(1), slope.unsqueeze(1)), errors

    def _traced(self, own_loss: OwnLoss, batch: Transitions) -> Tensor:
        """Return the (B,) losses that `own_loss` gives."""
        kind, size = self.device.type, len(batch.action)
        # It may run a network without gradients first, so no cast may be remembered: see `_differentiated`.
        with self.policy.autocast(), torch.autocast(kind, None, torch.is_autocast_enabled(kind), cache_enabled=False):
            losses: object = own_loss(self._computing, self.target, self._observed(batch))
        found = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        if not isinstance(losses, Tensor) or losses.shape != (size,):
            raise ValueError(f"loss: expected a tensor of shape ({size},), one value per sample, got {found}")
        if not losses.requires_grad:
            raise ValueError("loss: expected values with a gradient for the network's parameters, got some without")
        return losses

    def _observed(self, batch: Transitions) -> Transitions:
        """Look up the observations, where there are rows, and prepare them."""
        obs, next_obs = batch.obs, batch.next_obs
        if self.frames is None:
            obs, next_obs = self._prepare(obs), self._prepare(next_obs)
        else:
            obs, next_obs = self._prepare(look_up(self.frames, torch.cat([obs, next_obs]))).chunk(2)
        return batch._replace(obs=obs, next_obs=next_obs)

    def _warm_up(self, stream: torch.cuda.Stream) -> None:
        """Take some steps before the first capture, and undo them, so that capturing changes nothing.

        Libraries choose their kernels meanwhile, and the optimizer makes its state.
        """
        there = [tensor for state in self._optimizer.state() for tensor in state.values()]
        try:
            with unchanged([*tensors_of(self.online), *tensors_of(self.target), *there]):
                try:
                    warm_up(functools.partial(self._step, 0), stream)
                finally:
                    # What the warm-up made begins at zero; what was there is put back behind this.
                    for state in self._optimizer.state():
                        for tensor in state.values():
                            tensor.zero_()
        finally:
            self._optimizer.refresh()

"""The learner: one update function over fixed tensors, run eagerly or captured in a CUDA graph."""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

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
from pydqn.learning.candidates import REPLAYS, Trial, choose, described, require_agreement
from pydqn.learning.forms import Form, forms_of
from pydqn.learning.gradients import Autograd, CustomLoss
from pydqn.learning.losses import LOSSES
from pydqn.learning.networks import QNetwork, tensors_of
from pydqn.learning.noise import Noise
from pydqn.learning.objectives import Gradients, Transitions
from pydqn.learning.optimizers import OptimizerSettings, OptimizerState, make_optimizer
from pydqn.learning.policy import Policy, new_generator, resolve_device
from pydqn.learning.records import MASKED
from pydqn.learning.settings import LearnerSettings
from pydqn.learning.statistics import Statistics
from pydqn.learning.values import represented
from pydqn.replay.frames import Batch
from pydqn.replay.lookup import look_up

_GENERATOR = "generator"  # in a learner's state
_WAY_ON = "leave the settings of network and optimizer as they were, or start a new run"


class _UpdateOutputs(NamedTuple):
    """Tensors of an update that its statistics are computed from. Each replay of a graph overwrites them."""

    grad_norm: Callable[[], Tensor]
    action: Tensor  # (B,)
    weight: Tensor  # (B,)
    errors: Tensor  # (B,): TD errors of scalar values; else the losses
    values: Tensor | None  # (B, A); None with a custom loss


class Learner:
    """Owns the online network, the target network and the optimizer.

    `update` takes one gradient step, or several in a row. On a CUDA device they are captured and replayed, in one graph
    for each number of steps that occurs: batches, learning rate and step counter live on the device. The host runs
    ahead and waits only until the previous batch has left the pinned memory. On a CPU the same function runs eagerly.
    Where it is captured and draws no random numbers, the first `update` on a CUDA device tries all forms that it may
    have (`settings.update`) on its batch, and stays with the fastest whose gradients agree with PyTorch's own: `form`
    is its name, `trials` what became of each. The precision "auto" lets forms round to TensorFloat-32 in matrix
    products.

    With a custom `loss`, the network may return anything: autograd differentiates the weighted mean of the losses, and
    everything else stays the same. The target network computes no gradients; what the loss computes with the online
    network for a target belongs under `torch.no_grad()`. Both networks stay in the mode (`train` or `eval`) that they
    are in, and random numbers come from PyTorch's generator of the device: `state_dict` has neither. On a CUDA device,
    the Python code of loss and network runs only until it is captured. So it may not branch on data, wait for the
    device (`.item()`) or copy numbers to it (`torch.tensor`): otherwise a warning names the line, and updates run
    without a graph. (On a CPU it may.) What has to change between updates is a buffer of the network, changed in
    place, or a random number, which each replay draws anew. During a capture, at the first `update` of each number of
    steps, no other thread may wait for the device: PyTorch's mode that detects this applies to the whole process.

    Args:
        network: takes (B, stack, *frame_shape) observations and returns (B, A) values; any `nn.Module` will do. If it
            has a method `prepare`, each batch of observations goes through it once for both networks. Everything that
            is learned is a float32 parameter. The target network is a copy, and gets the buffers with the parameters.
        settings: the loss, the optimizer, the batch size, the precision and the period of target network updates. The
            precision "auto" is float32 for networks that are not pydqn's own.
        device: where to learn; also a name as `resolve_device` takes it ("auto", "cpu", "cuda", "cuda:N").
        example: the largest batch that will come, for shapes and dtypes: `replay.empty_batch(n * batch_size)`, where n
            is the largest number of steps in one `update`.
        capture: whether to use a CUDA graph. None uses one on CUDA devices, and if the update cannot be captured, warns
            and goes on without. True makes that an error.
        frames: if batches hold row numbers instead of observations, the tensor of frames that these number
            (`DeviceReplay.frames`).
        loss: `loss(online, target, batch)` returns the (B,) losses of `Transitions`. `settings.loss` and
            `settings.double` have no effect then, precision "auto" is float32, and "bfloat16" means autocast. None for
            the loss that `settings` name.
        seed: of the noise of noisy layers, drawn anew for both networks at each step, and of the levels of implicit
            quantiles.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        network: nn.Module,
        settings: LearnerSettings,
        device: torch.device | str,
        example: Batch,
        capture: bool | None = None,
        frames: Tensor | None = None,
        *,
        loss: CustomLoss | None = None,
        seed: int = 0,
    ) -> None:
        if loss is not None and not callable(loss):
            raise ValueError(f"loss: expected a function of (online, target, batch), got {loss!r} (see Config.loss)")
        if loss is None:
            _require_representation(network, settings)
        self.device = device = resolve_device(device) if isinstance(device, str) else device
        self.updates = 0
        self._settings = settings
        captures = device.type == "cuda" if capture is None else capture
        if captures and device.type != "cuda":
            raise ValueError(f"capture: a CUDA graph needs a CUDA device, got {device}")
        if settings.target_update_rate < 1 and settings.precision == "bfloat16":
            raise ValueError(
                "target_update_rate: expected 1 with precision 'bfloat16', which would round small moves of the target "
                f"network away, got {settings.target_update_rate:g}"
            )
        exact = (loss is not None or settings.target_update_rate < 1) and settings.precision == "auto"
        self.policy = Policy(network, device, "float32" if exact else settings.precision)
        self.online, self._compute_network = self.policy.network, self.policy.compute_network
        self.target = copy.deepcopy(self._compute_network).requires_grad_(False)
        self._learning_rate = torch.tensor(settings.learning_rate, dtype=torch.float32, device=device)
        self._compute_parameters = list(self._compute_network.parameters())
        self._optimizer = make_optimizer(
            OptimizerSettings(
                settings.optimizer,
                settings.optimizer_epsilon,
                settings.rmsprop_decay,
                settings.rmsprop_momentum,
                settings.weight_decay,
            ),
            list(self.online.parameters()),
            self._compute_parameters,
            self._learning_rate,
        )
        self._loss, self._custom_loss = LOSSES[settings.loss], loss
        self._scalar = loss is None and settings.value == "scalar"
        self._noise = [Noise(network, 1, device) for network in (self._compute_network, self.target)]
        draws = any(self._noise) or (loss is None and settings.value == "implicit_quantile")
        self._generator = new_generator(device, seed) if draws else None
        self._frames = frames
        self._plain = Autograd(self.policy, self.target, settings, loss, frames, self._generator)
        self._forms = forms_of(self._plain, self.policy, self.target, settings, loss, frames)
        self.form = next(iter(self._forms))
        self.trials: list[Trial] = []  # of forms, at the first update on a GPU
        self.choice = ""  # the form that was chosen, and in brackets what became of all that were tried
        self._chooses = len(self._forms) > 1 and captures and not draws
        self._max_steps = len(example.action) // settings.batch_size  # in one `update`
        self._to_device = HostToDevice(example, device, names=example._fields)
        self._outputs: _UpdateOutputs | None = None
        self._latest = slice(0, settings.batch_size)  # the rows of the latest gradient step
        self._errors = torch.zeros(len(example.action), device=device)
        self._errors_to_host = DeviceToHost(device)
        self._graphs: dict[tuple[int, int], Graph[_UpdateOutputs]] = {}  # by the first step's number, and how many
        self._stream = torch.cuda.Stream(device) if captures else None  # to capture on
        self._must_capture = bool(capture)
        # One pool for all graphs, which never run at the same time; only the latest outputs are read.
        self._pool = torch.cuda.graph_pool_handle() if captures else None

    def update(self, batch: Batch) -> None:
        """Take one gradient step for every `batch_size` transitions, in their order.

        The target network is updated in its period, also between two of these steps.

        Raises:
            ValueError: the batch is not a whole number of batches, is longer than the `example`, or has other dtypes;
                or a custom loss did not return one value per sample.
        """
        size = self._settings.batch_size
        count, rest = divmod(len(batch.action), size)
        if rest or not 0 < count <= self._max_steps:
            raise ValueError(
                f"batch: expected 1 to {self._max_steps} times {size} transitions (batch_size), got {len(batch.action)}"
            )
        period = self._settings.target_update_period
        with on(self.device):
            self._to_device.put(batch)
            done = 0
            while done < count:
                # All at once, unless the target network changes in between.
                until_target_update = period - self.updates % period if period else count
                steps = count - done if count - done <= until_target_update and not done else 1
                self._outputs = self._run(done, steps)
                self.updates += steps
                done += steps
                if steps == until_target_update and period:
                    self.update_target()
            self._latest = slice((count - 1) * size, count * size)
            self._errors_to_host.put(self._errors[: count * size])

    @torch.no_grad()
    def update_target(self) -> None:
        """Copy the online network to the target network, or move it there by `target_update_rate` of the way.

        Buffers, such as running means, are always copied.
        """
        rate = self._settings.target_update_rate
        if rate == 1:
            torch._foreach_copy_(tensors_of(self.target), tensors_of(self._compute_network))
            return
        targets: list[Tensor] = [*self.target.parameters()]
        torch._foreach_lerp_(targets, [*self._compute_parameters], rate)
        for ours, theirs in zip(self.target.buffers(), self._compute_network.buffers(), strict=True):
            ours.copy_(theirs)

    def statistics(self) -> Statistics:
        """Return statistics of the latest gradient step (waits for the device).

        The quantiles of returns, among the samples, are those after the step, and without noise; all else is before it.
        With a custom loss, action values are unknown: NaN, and not among the samples.
        """
        if self._outputs is None:
            return Statistics.nothing()
        norm_of, action, weight, errors, values = self._outputs
        norm = norm_of().to(self.device)
        if values is None:
            loss, norm = torch.stack([(weight * errors).mean(), norm]).tolist()
            return Statistics(loss, math.nan, math.nan, norm, {"loss_per_sample": errors.cpu().numpy().copy()})
        losses = self._loss.value(errors) if self._scalar else errors
        taken = values.gather(1, action.unsqueeze(1))
        loss, mean_q, max_q, norm = torch.stack([(weight * losses).mean(), taken.mean(), values.max(), norm]).tolist()
        samples = {"loss_per_sample": losses.cpu().numpy(), "q_values": _allowed(values).float().cpu().numpy()}
        with on(self.device):
            quantiles = self.policy.quantiles_of(self._latest_obs(), action)
        if quantiles is not None:
            samples["return_quantiles"] = quantiles.cpu().numpy()
        return Statistics(loss, mean_q, max_q, norm, samples)

    def diagnosis(self) -> str:
        """Describe the latest update to a person who has to find out why it diverged (waits for the device)."""
        reward = self._to_device.tensors[2][self._latest]
        with on(self.device):
            statistics, obs = self.statistics(), self._latest_obs()
            bad = [name for name, value in self.online.state_dict().items() if not torch.isfinite(value).all()]
        largest = f"the largest action value {statistics.max_q:g}, " if self._custom_loss is None else ""
        return (
            f"the loss of update {self.updates:,} is {statistics.loss:g}, the gradient's norm "
            f"{statistics.grad_norm:g}, {largest}rewards lie from {reward.min():g} to {reward.max():g}, "
            f"observations are {'finite' if torch.isfinite(obs).all() else 'not finite'}, "
            f"weights {'not finite in ' + ', '.join(bad) if bad else 'finite'}, "
            f"the learning rate is {self.learning_rate:g} "
            "(mostly that is too large, or rewards are: see max_grad_norm, clip_rewards, loss)"
        )

    def _latest_obs(self) -> Tensor:
        """Return the observations of the latest gradient step."""
        obs = self._to_device.tensors[0][self._latest]
        return obs if self._frames is None else look_up(self._frames, obs)

    def td_errors(self) -> NDArray[np.float32]:
        """Return the absolute TD errors, unweighted, of all transitions in the latest `update`.

        These are what priorities are made of. If the setting `priority_error` says so, they are the losses or their
        square roots instead; "auto" is the loss wherever values are not scalar. What the TD error of a distribution is,
        `pydqn.learning.objectives` says.

        With a custom loss, return its losses, which may be negative; a prioritized replay buffer takes no negative
        priorities. `update` launches the copy to the host: after the next actions have arrived, this does not wait.
        """
        return np.zeros(0, np.float32) if self._outputs is None else self._errors_to_host.get().copy()

    @property
    def learning_rate(self) -> float:
        """The optimizer's step size; may be set at any time, also after a capture."""
        return float(self._learning_rate)

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        self._learning_rate.fill_(value)

    def use_form(self, name: str, choice: str) -> None:
        """Use a form that was chosen before, on this card, without trying others. Unknown names change nothing."""
        if name in self._forms:
            self.form, self.choice, self._chooses = name, choice, False

    def state_dict(self) -> dict[str, Tensor]:
        """Return all tensors that a learner needs to go on, by name, not copies of them.

        These are those of both networks and of the optimizer, and "updates", the number of gradient steps (int64); with
        noisy layers or implicit quantiles also "generator", the state of the random generator.
        """
        state = {"updates": torch.tensor(self.updates, dtype=torch.int64, device="cpu")}
        state |= {f"online.{name}": value for name, value in self.online.state_dict().items()}
        state |= {f"target.{name}": value for name, value in self.target.state_dict().items()}
        if self._generator is not None:
            state[_GENERATOR] = self._generator.get_state()
        for number, tensors in enumerate(self._optimizer.state()):
            state |= {f"optimizer.{number}.{name}": value for name, value in tensors.items()}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            RuntimeError: graphs have been captured, which would go on writing to the tensors before.
            ValueError: the tensors are not those of a learner with such a network and optimizer.
        """
        if self._graphs:
            raise RuntimeError("load_state_dict: expected a learner that has captured no CUDA graph yet")
        optimizer: OptimizerState = [{} for _ in self._compute_parameters]
        networks: dict[str, dict[str, Tensor]] = {"online": {}, "target": {}}
        for name, value in state.items():
            part, _, rest = name.partition(".")
            if part == "optimizer":
                number, _, rest = rest.partition(".")
                if not number.isdecimal() or int(number) >= len(optimizer):
                    raise ValueError(f"checkpoint: does not fit the config ({name!r} is of no parameter); {_WAY_ON}")
                optimizer[int(number)][rest] = value
            elif part in networks:
                networks[part][rest] = value
            elif name not in ("updates", _GENERATOR):
                raise ValueError(f"checkpoint: {name!r} is not part of a learner")
        if "updates" not in state or state["updates"].dim():
            raise ValueError("checkpoint: expected 'updates' to be one number")
        try:
            self.online.load_state_dict(networks["online"])
            self.target.load_state_dict(networks["target"])
        except RuntimeError as error:
            reason = str(error).splitlines()[1].strip()
            raise ValueError(f"checkpoint: does not fit the config ({reason}); {_WAY_ON}") from None
        self._optimizer.load_state(optimizer)
        self._optimizer.refresh()
        # Another kind of device has another kind of state; a run that goes on there is another run anyway.
        if self._generator is not None and _GENERATOR in state:
            drawn = state[_GENERATOR].cpu()
            if drawn.shape == self._generator.get_state().shape:
                self._generator.set_state(drawn)
        self.updates, self._outputs = int(state["updates"]), None

    def _run(self, start: int, count: int) -> _UpdateOutputs:
        """Take `count` steps, beginning with batch number `start`; with a CUDA graph where that is wanted."""
        steps = functools.partial(self._steps, start, count)
        if self._stream is None:
            return steps()
        try:
            if self._chooses:
                self._choose(self._stream)
            if not self._graphs:
                with self._rehearsal():
                    warm_up(functools.partial(self._step, 0), self._stream)
            if (start, count) not in self._graphs:
                self._graphs[start, count] = Graph(steps, self._stream, self._pool, self._generator)
        except CaptureError as error:
            if self._must_capture:
                raise CaptureError(f"capture: the update cannot become a CUDA graph ({error})") from error
            warnings.warn(f"updates run without CUDA graphs, and slower: {error}", RuntimeWarning, stacklevel=3)
            self._stream = None
            self._graphs.clear()
            return steps()
        return self._graphs[start, count]()

    def _steps(self, start: int, count: int) -> _UpdateOutputs:
        for number in range(start, start + count - 1):
            self._step(number)
        return self._step(start + count - 1)

    def _step(self, number: int, form: Form | None = None) -> _UpdateOutputs:
        """Take one gradient step on fixed tensors, without a branch on data or a wait for the device.

        In the form that is in use, if none is given.
        """
        gradients = form or self._forms[self.form]
        size = self._settings.batch_size
        part = slice(number * size, (number + 1) * size)
        obs, action, reward, discount, next_obs, _, weight = (tensor[part] for tensor in self._to_device.tensors)
        with ExitStack() as noise:
            for one in filter(None, self._noise):
                one.draw(self._generator)
                noise.enter_context(one.applied())
            found = gradients(Transitions(obs, action, reward, discount, next_obs), weight)
        errors = self._keep_errors(part, found)
        norm = self._optimizer.step(self._settings.max_grad_norm or torch.inf)
        return _UpdateOutputs(norm, action, weight, errors, found.values)

    def _keep_errors(self, part: slice, found: Gradients) -> Tensor:
        """Keep what priorities are made of, see `td_errors`; return what `_UpdateOutputs` calls errors."""
        kind = self._settings.priority_error
        if self._custom_loss is not None:
            return self._errors[part].copy_(found.errors)
        if kind == "td_error" or (kind == "auto" and self._scalar):
            torch.abs(found.td_errors, out=self._errors[part])
        else:
            losses = self._loss.value(found.errors) if self._scalar else found.errors
            self._errors[part].copy_(losses.sqrt() if kind == "root_loss" else losses)
        return found.errors

    @contextmanager
    def _rehearsal(self) -> Iterator[None]:
        """Undo at the end what steps have changed: those before a capture, in which libraries choose their kernels."""
        existing = [tensor for tensors in self._optimizer.state() for tensor in tensors.values()]
        drawn = None if self._generator is None else self._generator.get_state()
        on_gpu = self.device.type == "cuda"
        drawn_by_others = torch.cuda.get_rng_state(self.device) if on_gpu else None  # by networks of one's own
        try:
            with preserved([*tensors_of(self.online), *tensors_of(self.target), *existing]):
                try:
                    yield
                finally:
                    # New state of the optimizer starts at zero; `preserved` restores the existing one after this.
                    for tensors in self._optimizer.state():
                        for tensor in tensors.values():
                            tensor.zero_()
        finally:
            self._optimizer.refresh()
            if self._generator is not None and drawn is not None:
                self._generator.set_state(drawn)
            if drawn_by_others is not None:
                torch.cuda.set_rng_state(drawn_by_others, self.device)

    def _choose(self, stream: torch.cuda.Stream) -> None:
        """Try all forms of the update on the current batch; keep the fastest that agrees with the exact gradients.

        Raises:
            ValueError: the setting `update` asks for a form that does not work on this card.
        """
        with self._rehearsal(), tensor_float_32(products=False, convolutions=False):
            exact = self._compared(self._step(0, self._plain))
            expected = {name: None if part is None else part.clone() for name, part in exact.items()}

        def attempt(name: str, form: Form) -> float:
            step = functools.partial(self._step, 0, form)
            with self._rehearsal():
                warm_up(step, stream)
                graph = Graph(step, stream)
            with self._rehearsal():
                require_agreement(self._compared(graph()), expected)
            with self._rehearsal():
                return seconds_of(graph, REPLAYS, self.device)

        self.form, self.trials = choose(self._forms, attempt)
        self.choice, self._chooses = described(self.form, self.trials), False
        if "plain" not in self._forms and all(trial.seconds is None for trial in self.trials):
            raise ValueError(
                f"update: expected auto or plain, since no fused form works on {self.device}: {self.choice}"
            )

    def _compared(self, outputs: _UpdateOutputs) -> dict[str, Tensor | None]:
        """Return what forms of the update have to agree in: errors, values of allowed actions, and gradients."""
        assert outputs.values is not None
        values = outputs.values.masked_fill(outputs.values == MASKED, 0)
        names = [name for name, _ in self._compute_network.named_parameters()]
        gradients = (parameter.grad for parameter in self._compute_parameters)
        return {
            "errors": outputs.errors,
            "values": values,
            **{f"the gradient of {name}": gradient for name, gradient in zip(names, gradients, strict=True)},
        }


def _require_representation(network: nn.Module, settings: LearnerSettings) -> None:
    """Raise ValueError if the network represents values in another way than the settings say."""
    expected = represented(settings)
    found = network.represents if isinstance(network, QNetwork) else {"value": "scalar"}
    if found != expected:
        shown = [", ".join(f"{name}={value!r}" for name, value in one.items()) for one in (expected, found)]
        raise ValueError(
            f"network: expected one with {shown[0]}, as the settings say, got one with {shown[1]}; make_network(..., "
            "settings=settings) makes such networks, and a network of your own with another output needs a loss"
        )


def _allowed(values: Tensor) -> Tensor:
    """Return the values of allowed actions: all of them, as they are, or a list."""
    allowed = values != MASKED
    return values if bool(allowed.all()) else values[allowed]

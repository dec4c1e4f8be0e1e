"""The GPU path traced without a GPU: every operation of an update sees tensors that say they are on cuda:0.

`FakeTensorMode` gives tensors that have a shape, a dtype and a device, but no memory. It raises where devices mix, and
where a number would have to come to the host (`.item()`, `nonzero`, a branch on data). Some things of a PyTorch without
CUDA stand in the way:

* Autograd asks the C++ side for the device's guard and streams. So fake tensors are made without `dispatch_device`: in
  C++ they are on "meta", which has a guard, and only Python, where operations are dispatched, sees "cuda:0".
* `aten::_fused_adam_`, `aten::_fused_adamw_`, `aten::cudnn_convolution_relu` have no meta kernels. `Watch` answers in
  their place.
* A convolution on "meta" is not cuDNN's, whose results are channels-last where an argument is: that is told it.
* `copy.deepcopy` of a fake tensor would copy the mode, too, and `Module.to` cannot move one: both are replaced.
* Generators of random numbers cannot be made: the functions draw without one.

`Watch` is a dispatch mode above it. It raises at what the mode lets through and a capture does not: copies between host
and device (`torch.tensor(..., device=)`, `.cpu()`, `.to(device)`), and CPU scalars among CUDA tensors, which a graph
would freeze at their first value. It lists the operations.

The buffers between host and device are replaced by tensors of the same shapes on cuda, and a check of the device.
"""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pydqn import FrameReplay, Learner, LearnerSettings
from pydqn.learning import learner as learner_module
from pydqn.learning import policy as policy_module
from pydqn.learning.policy import Actor
from pydqn.replay.device import DeviceReplay
from tests.helpers.kernel_counts import kernels

CUDA, META = torch.device("cuda", 0), torch.device("meta")  # what Python sees, and what C++ sees of the same tensors
# Operations without a meta kernel, and what stands for them. The optimizers work in place and return nothing.
_WITHOUT_META_KERNEL = {
    f"aten._fused_{name}_.{kind}": lambda *_, **__: None
    for name in ("adam", "adamw")
    for kind in ("default", "tensor_lr")
}
_WITHOUT_META_KERNEL["aten.cudnn_convolution_relu.default"] = (
    lambda x, weight, bias, stride, padding, dilation, groups: torch.convolution(
        x, weight, bias, stride, padding, dilation, False, [0, 0], groups
    )
)
_REAL_GROUPS = torch._C._group_tensors_by_device_and_dtype
_REAL_MAKE = torch.Tensor._make_subclass


class Watch(TorchDispatchMode):
    """Lists operations and counts their kernels, and refuses those that a capture would refuse, or freeze."""

    def __init__(self):
        super().__init__()
        self.operations, self.kernels = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        out = _WITHOUT_META_KERNEL.get(str(func), func)(*args, **kwargs)
        outputs = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        devices = {x.device for x in (*inputs, *outputs)}
        if len(devices) > 1 or any(device.type != "cuda" for device in devices):
            raise RuntimeError(f"{func}: {[(tuple(x.shape), str(x.device)) for x in (*inputs, *outputs)]}")
        # A copy without another dtype would be a move, which only C++ sees.
        if str(func) != "aten._to_copy.default" or inputs[0].dtype != outputs[0].dtype:
            self.operations.append(str(func))
            self.kernels += kernels(func, args, kwargs, out)
        return out


class Mode(FakeTensorMode):
    """Where C++ asks for a tensor beside one of ours, it asks for "meta"."""

    def dispatch(self, func, types, args=(), kwargs=None):
        kwargs = {name: CUDA if value == META else value for name, value in (kwargs or {}).items()}
        return super().dispatch(func, types, args, kwargs)


class FakeHostToDevice:
    """Tensors on cuda of the arrays' shapes."""

    def __init__(self, examples, device, packed=None, names=None):
        self.tensors = [
            torch.empty(array.shape, dtype=getattr(torch, array.dtype.name), device=device) for array in examples
        ]


class FakeDeviceToHost:
    """Checks the device."""

    def __init__(self, device):
        pass

    def put(self, tensor):
        assert tensor.device == CUDA, tensor.device


def _later(kind):
    """Return an optimizer of PyTorch's whose constructor does not look at the learning rate, a fake tensor."""

    class Later(kind):
        def __init__(self, parameters, lr, **others):
            super().__init__(parameters, lr=1.0, **others)
            self.param_groups[0]["lr"] = lr

    return Later


def _make_subclass(cls, data, requires_grad=False, *, dispatch_device=False, **named):
    return _REAL_MAKE(cls, data, requires_grad, **named)


def _deepcopy(tensor, memo):
    if id(tensor) not in memo:
        other = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=tensor.device)
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        memo[id(tensor)] = torch.nn.Parameter(other, tensor.requires_grad) if is_parameter else other
    return memo[id(tensor)]


def _grouped(tensors, with_indices=False):
    groups = _REAL_GROUPS(tensors, with_indices)
    return {(CUDA if device == META else device, dtype): group for (device, dtype), group in groups.items()}


def _as_cudnn(images, weight, backend):
    last = any(x.is_contiguous(memory_format=torch.channels_last) for x in (images, weight))
    return torch.channels_last if last else torch.contiguous_format


@contextlib.contextmanager
def pretended():
    """Pretend that there is CUDA, as far as a trace needs it."""
    modules = (learner_module, policy_module)
    new = [(module, "HostToDevice", FakeHostToDevice) for module in modules]
    new += [(module, "DeviceToHost", FakeDeviceToHost) for module in modules]
    new += [(module, "on", lambda device: contextlib.nullcontext()) for module in modules]
    new += [(module, "new_generator", lambda device, seed: None) for module in modules]
    new += [(torch.nn.Module, "to", lambda module, device: module)]  # see `_moved`
    new += [(torch.optim, name, _later(getattr(torch.optim, name))) for name in ("Adam", "AdamW", "RMSprop")]
    new += [(torch.cuda, "Stream", lambda device: None)]
    new += [(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)]
    new += [(torch.cuda, "is_bf16_supported", lambda: True)]
    new += [(torch._C, "_group_tensors_by_device_and_dtype", _grouped)]
    new += [(torch._C, "_conv_determine_backend_memory_format", _as_cudnn)]
    mode = Mode()
    new += [(torch.Tensor, "_make_subclass", _make_subclass), (FakeTensor, "__deepcopy__", _deepcopy)]
    before = [(where, name, getattr(where, name)) for where, name, _ in new]
    try:
        for where, name, value in new:
            setattr(where, name, value)
        with mode:
            yield
    finally:
        for where, name, value in before:
            setattr(where, name, value)


def _moved(network):
    """Put fake tensors on cuda in place of a real network's, which `Module.to` cannot."""
    made = {}

    def other(tensor):
        if id(tensor) not in made:
            fake = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=CUDA)
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            made[id(tensor)] = torch.nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
        return made[id(tensor)]

    for module in network.modules():
        for own in (module._parameters, module._buffers):
            own.update({name: other(tensor) for name, tensor in own.items() if tensor is not None})
    return network


class Traced(NamedTuple):
    """What an update, the actor's forward pass and an update of the target network launch."""

    update: Watch
    act: Watch
    target: Watch


def trace(network, settings, frame_shape, dtype, storage="host", *, loss=None, stack=4):
    """Trace an update, the actor's forward pass and an update of the target network.

    Args:
        network: the network, of (B, stack, *frame_shape) observations.
        settings: `LearnerSettings`.
        frame_shape: of the frames.
        dtype: of the frames.
        storage: where frames are kept, "host" or "device".
        loss: a custom loss.
        stack: frames per observation.
    """
    assert isinstance(settings, LearnerSettings)
    kind = FrameReplay if storage == "host" else functools.partial(DeviceReplay, device="cpu")
    replay = kind(400, frame_shape, stack=stack, n_step=3, dtype=dtype, num_envs=8, prioritized=True)
    held = None if storage == "host" else (tuple(replay.frames.shape), replay.frames.dtype)
    example, latest = replay.empty_batch(2 * settings.batch_size), replay.empty_batch(8).obs
    with pretended():
        frames = None if held is None else torch.empty(held[0], dtype=held[1], device=CUDA)
        learner = Learner(_moved(network), settings, CUDA, example, False, frames, loss=loss)
        actor = Actor(learner.policy, latest, frames, False)
        with Watch():
            learner._step(0)  # as the warm-up: the optimizer makes its state
        with Watch() as update:
            outputs = learner._step(1)
        with Watch() as act:
            values = actor._forms["fused" if settings.update == "fused" else "plain"]()
        with Watch() as target:
            learner.update_target()
        tensors = [*learner.online.parameters(), *learner.target.parameters(), values]
        tensors += [part for part in outputs if isinstance(part, torch.Tensor)]
        tensors += [value for state in learner._optimizer.state() for value in state.values()]
        assert {tensor.device for tensor in tensors} == {CUDA}
    return Traced(update, act, target)

"""The forms that an update can have: PyTorch's own, and on a GPU others that may be faster."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from pydqn._util.cuda import tensor_float_32
from pydqn.learning.fused import FusedGradients, reason_against
from pydqn.learning.gradients import Autograd, CustomLoss
from pydqn.learning.networks import QNetwork
from pydqn.learning.objectives import Gradients, Transitions
from pydqn.learning.policy import Policy
from pydqn.learning.settings import LearnerSettings

Form = Callable[[Transitions, Tensor], Gradients]  # of a batch and its (B,) weights; writes the parameters' `grad`


def forms_of(
    plain: Autograd,
    policy: Policy,
    target: nn.Module,
    settings: LearnerSettings,
    loss: CustomLoss | None = None,
    frames: Tensor | None = None,
) -> dict[str, Form]:
    """Return the forms that an update may have, by name; the setting `update` may narrow them down.

    The first is to be used unless another is chosen. On a CPU it is the only one.

    Args:
        plain: PyTorch's own form, of the other arguments.
        policy: see `Autograd`.
        target: see `Autograd`.
        settings: see `Autograd`.
        loss: see `Autograd`.
        frames: see `Autograd`.

    Raises:
        ValueError: the setting asks for a form that does not fit the network or the loss.
    """
    online, on_gpu = policy.compute_network, policy.device.type == "cuda"
    reason = "the loss is not pydqn's" if loss is not None else reason_against(online, settings)
    if settings.update == "fused" and reason:
        raise ValueError(f"update: expected auto or plain, since {reason}, got 'fused'")
    if settings.update == "plain" or (settings.update == "auto" and not on_gpu):
        return {"plain": plain}
    found: dict[str, Form] = {"plain": plain} if settings.update == "auto" else {}
    if not reason:
        assert isinstance(online, QNetwork)
        assert isinstance(target, QNetwork)
        found["fused"] = FusedGradients(online, target, settings, frames)
        if on_gpu:
            found["fused, two streams"] = FusedGradients(online, target, settings, frames, two_streams=True)
    if on_gpu and loss is None and settings.precision == "auto":
        found |= {f"{name}, TF32": _rounding(form) for name, form in found.items()}
    return found


def _rounding(form: Form) -> Form:
    """Return the same form, whose matrix products may round to TensorFloat-32."""

    def rounding(batch: Transitions, weight: Tensor) -> Gradients:
        with tensor_float_32(products=True, convolutions=True):
            return form(batch, weight)

    return rounding

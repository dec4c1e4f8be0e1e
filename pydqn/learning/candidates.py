"""The forms of the update, and choosing, on this very GPU, the fastest one that agrees with PyTorch's own."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pydqn._util.cuda import tensor_float_32
from pydqn.learning.fused import FusedGradients, reason_against
from pydqn.learning.gradients import Autograd, CustomLoss, Gradients
from pydqn.learning.networks import QNetwork
from pydqn.learning.objectives import Transitions
from pydqn.learning.policy import Policy
from pydqn.learning.settings import LearnerSettings

MOST = 8  # candidates
_MOST_SECONDS = 15.0  # for all of them together
_TOLERANCE = 0.05  # TensorFloat-32, which PyTorch allows convolutions, has ten bits


class Candidate(NamedTuple):
    """A form of the update."""

    name: str
    gradients: Callable[[Transitions, Tensor], Gradients]  # writes the parameters' `grad`


class Trial(NamedTuple):
    """What became of a candidate."""

    name: str
    seconds: float | None  # per update; None if it was dropped
    reason: str = ""  # why it was dropped


class Disagreement(Exception):
    """A candidate computes something else than PyTorch."""


def candidates_for(
    policy: Policy,
    target: nn.Module,
    settings: LearnerSettings,
    loss: CustomLoss | None = None,
    frames: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> list[Candidate]:
    """Return the forms that an update can have, in the setting `update`; the arguments are those of `Autograd`.

    The first is to be used unless another is chosen. On a CPU it is the only one.

    Raises:
        ValueError: the setting asks for a form that does not fit the network or the loss.
    """
    plain = Candidate("plain", Autograd(policy, target, settings, loss, frames, generator))
    online, on_gpu = policy.compute_network, policy.device.type == "cuda"
    reason = "the loss is not pydqn's" if loss is not None else reason_against(online, settings)
    if settings.update == "fused" and reason:
        raise ValueError(f"update: expected auto or plain, since {reason}, got 'fused'")
    if settings.update == "plain" or (settings.update == "auto" and not on_gpu):
        return [plain]
    found = [plain] if settings.update == "auto" else []
    if not reason:
        assert isinstance(online, QNetwork)
        assert isinstance(target, QNetwork)
        found.append(Candidate("fused", FusedGradients(online, target, settings, frames)))
        if on_gpu:
            found.append(Candidate("fused, two streams", FusedGradients(online, target, settings, frames, True)))
    if on_gpu and loss is None and settings.precision == "auto":
        found += [Candidate(f"{name}, TF32", _rounding(gradients)) for name, gradients in found]
    return found


def _rounding(gradients: Callable[[Transitions, Tensor], Gradients]) -> Callable[[Transitions, Tensor], Gradients]:
    """Return the same form, whose matrix products may round to TensorFloat-32."""

    def rounding(batch: Transitions, weight: Tensor) -> Gradients:
        with tensor_float_32(products=True, convolutions=True):
            return gradients(batch, weight)

    return rounding


def choose(
    candidates: Sequence[Candidate],
    attempt: Callable[[Candidate], float],
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Candidate, list[Trial]]:
    """Try candidates; return the fastest of those that work, and what became of each.

    Args:
        candidates: at most `MOST`; the first is PyTorch's own form, which is taken if none works.
        attempt: returns the seconds that an update takes. Raises what it likes if the candidate is not to be taken:
            `Disagreement`, or what a library raised.
        clock: seconds.
    """
    assert 0 < len(candidates) <= MOST
    started, trials = clock(), list[Trial]()
    for candidate in candidates:
        if clock() - started > _MOST_SECONDS:
            trials.append(Trial(candidate.name, None, f"not tried after {_MOST_SECONDS:g} seconds"))
            continue
        try:
            trials.append(Trial(candidate.name, attempt(candidate)))
        except Exception as error:  # whatever a driver, a compiler or a library does not like about this machine
            lines = str(error).strip().splitlines() or [""]
            trials.append(Trial(candidate.name, None, f"{type(error).__name__}: {lines[0]}"))
    times = {trial.name: trial.seconds for trial in trials if trial.seconds is not None}
    fastest = min(times, key=times.__getitem__, default=candidates[0].name)
    return next(candidate for candidate in candidates if candidate.name == fastest), trials


def described(chosen: Candidate, trials: Sequence[Trial]) -> str:
    """Say in one line what was chosen, and what became of the others."""
    parts = [
        f"{trial.name} {trial.seconds * 1e6:,.0f} us" if trial.seconds is not None else f"{trial.name} {trial.reason}"
        for trial in trials
    ]
    return f"{chosen.name} ({'; '.join(parts)})"


def require_agreement(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> None:
    """Compare tensors, each as a whole: the norm of the difference may be a twentieth of the norm.

    Raises:
        Disagreement: it is larger, or something is not finite.
    """
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        if one is None and other is None:
            continue
        if one is None or other is None:
            raise Disagreement(f"gradient {number} is missing")
        difference, norm = torch.stack([(one - other).norm(), other.norm()]).tolist()
        if not difference <= _TOLERANCE * norm + 1e-12:
            raise Disagreement(f"gradient {number} is off by {difference / max(norm, 1e-30):.3g} of its norm")

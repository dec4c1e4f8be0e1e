"""What an update minimizes: targets and losses of each value representation, from both networks and a batch.

The functions here compose those of `losses`, `distributions` and `munchausen`. They launch operations on tensors of
fixed shapes and never branch on data, so a CUDA graph can hold them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pydqn.learning import distributions, munchausen
from pydqn.learning.networks import QNetwork
from pydqn.learning.quantile_kernel import quantile_huber_and_errors
from pydqn.learning.settings import LearnerSettings
from pydqn.learning.values import Categorical, ImplicitQuantiles, Quantiles


class Transitions(NamedTuple):
    """What a loss gets: B transitions, as tensors on the device that it must not change.

    Importance weights are not included. The learner multiplies the losses by them.
    """

    obs: Tensor  # (B, stack, *frame_shape), the replay buffer's dtype; or what the network's `prepare` made of that
    action: Tensor  # (B,) int64
    reward: Tensor  # (B,) float32: sum of gamma^j r_j over the window, j < k
    discount: Tensor  # (B,) float32: gamma^k, or 0 after termination
    next_obs: Tensor  # as obs, k steps later


class Objective(NamedTuple):
    """The losses of a batch, and what else is known of it without another pass."""

    losses: Tensor  # (B,), with a gradient for the online network
    errors: Tensor  # (B,) absolute TD errors, without a gradient: see the function that returned them
    values: Tensor  # (B, A) action values of the online network before the step, without a gradient


class Gradients(NamedTuple):
    """What an update knows of its batch once the gradients are in the parameters' `grad`."""

    errors: Tensor  # (B,): TD errors of scalar values; else the losses
    td_errors: Tensor  # (B,): of distributions, see `pydqn.learning.objectives`; with a custom loss, the losses
    values: Tensor | None  # (B, A) action values of the online network before the step; None with a custom loss


DistributionalLoss = Callable[[QNetwork, QNetwork, Transitions, LearnerSettings, torch.Generator | None], Objective]


def munchausen_target(target: nn.Module, values: Tensor, batch: Transitions, settings: LearnerSettings) -> Tensor:
    """Return (B,) targets of scalar values.

    Args:
        target: the target network.
        values: (B, A) values of the online network before the step.
        batch: the transitions.
        settings: alpha, temperature, and whose log-policy counts.
    """
    q_t = target(batch.next_obs)
    soft = munchausen.soft_value(q_t.unsqueeze(2), q_t, settings.munchausen_temperature).squeeze(1)
    return torch.addcmul(batch.reward + _bonus(target, values, batch, settings), batch.discount, soft)


def classified(
    online: QNetwork,
    target: QNetwork,
    batch: Transitions,
    settings: LearnerSettings,
    generator: torch.Generator | None = None,
) -> Objective:
    """Return the cross entropy of categorical values with the target's distribution; of "hl_gauss" with a histogram.

    The errors are the absolute differences of the means of both distributions.
    """
    representation = online.representation
    assert isinstance(representation, Categorical)
    outputs = online.outputs(batch.obs)  # with gradients first, see `Autograd._of_scalar_values`
    values = online.means(outputs.detach(), batch.obs)
    support = representation.support
    with torch.no_grad():
        outputs_t = target.outputs(batch.next_obs)
        q_t = target.means(outputs_t, batch.next_obs)
        if settings.value == "hl_gauss":
            goal = _sampled_target(online, target, q_t.unsqueeze(2), q_t, values, batch, settings).squeeze(1)
            width = (settings.value_max - settings.value_min) / settings.num_atoms
            p = distributions.histogram_of(representation.edges, goal, settings.hl_gauss_sigma * width)
        else:
            p_t = _of_action(outputs_t, _next_action(online, q_t, batch, settings)).softmax(dim=1)
            z_t = batch.reward.unsqueeze(1) + batch.discount.unsqueeze(1) * support
            p = distributions.project(support, z_t, p_t)
        errors = (p @ support - values.gather(1, batch.action.unsqueeze(1)).squeeze(1)).abs()
    return Objective(distributions.cross_entropy(_of_action(outputs, batch.action), p), errors, values)


def quantiles(
    online: QNetwork,
    target: QNetwork,
    batch: Transitions,
    settings: LearnerSettings,
    generator: torch.Generator | None = None,
) -> Objective:
    """Return the quantile Huber loss, at fixed levels or, of implicit quantiles, at levels that `generator` draws.

    The errors are sums over the estimated quantiles of the mean absolute differences from the target's.
    """
    representation, size = online.representation, len(batch.action)
    assert isinstance(representation, (Quantiles, ImplicitQuantiles))
    tau, both, count = representation.tau.expand(size, -1), None, 0
    if isinstance(representation, ImplicitQuantiles):
        count = settings.num_action_taus
        device = batch.reward.device
        drawn = torch.rand((size, settings.num_taus + settings.num_target_taus), generator=generator, device=device)
        # One pass: the levels that the next action is chosen by, and those of the target's samples.
        both = torch.cat([tau, drawn[:, settings.num_taus :]], dim=1)
        tau = drawn[:, : settings.num_taus]
    outputs = online.outputs(batch.obs, tau)  # with gradients first, see `Autograd._of_scalar_values`
    values = online.means(outputs.detach(), batch.obs)
    with torch.no_grad():
        outputs_t = target.outputs(batch.next_obs, both)
        q_t = target.means(outputs_t[..., :count] if count else outputs_t, batch.next_obs)
        goal = _sampled_target(online, target, outputs_t[..., count:], q_t, values, batch, settings)
    taken = _of_action(outputs, batch.action)
    return Objective(*quantile_huber_and_errors(taken, tau, goal, settings.quantile_kappa), values)


DISTRIBUTIONAL: dict[str, DistributionalLoss] = {
    "categorical": classified,
    "hl_gauss": classified,
    "quantile": quantiles,
    "implicit_quantile": quantiles,
}


def _sampled_target(
    online: QNetwork,
    target: QNetwork,
    samples_t: Tensor,
    q_t: Tensor,
    values: Tensor,
    batch: Transitions,
    settings: LearnerSettings,
) -> Tensor:
    """Return (B, N) samples of the target, from (B, A, N) samples of the next return and their (B, A) means."""
    reward, discount = batch.reward, batch.discount.unsqueeze(1)
    if settings.munchausen:
        reward = reward + _bonus(target, values, batch, settings)
        chosen = munchausen.soft_value(samples_t, q_t, settings.munchausen_temperature)
    else:
        chosen = _of_action(samples_t, _next_action(online, q_t, batch, settings))
    return torch.addcmul(reward.unsqueeze(1), discount, chosen)


def _bonus(target: nn.Module, values: Tensor, batch: Transitions, settings: LearnerSettings) -> Tensor:
    """Return Munchausen's (B,) share of the log-policy, that of the network which the settings name."""
    q = values if settings.munchausen_policy == "online" else target(batch.obs)
    alpha, temperature = settings.munchausen_alpha, settings.munchausen_temperature
    return munchausen.bonus(q, batch.action, alpha, temperature, settings.munchausen_least)


def _next_action(online: nn.Module, q_t: Tensor, batch: Transitions, settings: LearnerSettings) -> Tensor:
    """Return the (B,) best actions after the step, by the target's values or, with double, the online network's."""
    selector_t: Tensor = online(batch.next_obs) if settings.double else q_t
    return selector_t.argmax(dim=1)


def _of_action(outputs: Tensor, action: Tensor) -> Tensor:
    """Return the (B, N) outputs of one action each, of (B, A, N)."""
    return outputs.gather(1, action.view(-1, 1, 1).expand(-1, 1, outputs.shape[2])).squeeze(1)

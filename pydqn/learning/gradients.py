"""The gradients of an update, by autograd: of scalar values, distributions of returns, and a loss of one's own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pydqn.learning.losses import LOSSES, td_error
from pydqn.learning.networks import QNetwork
from pydqn.learning.objectives import DISTRIBUTIONAL, Gradients, Transitions, munchausen_target
from pydqn.learning.policy import Policy
from pydqn.learning.settings import LearnerSettings
from pydqn.replay.lookup import look_up

CustomLoss = Callable[[nn.Module, nn.Module, Transitions], Tensor]  # online, target, batch: one loss per sample, (B,)


class Autograd:
    """Computes the gradients of the weighted mean loss.

    Args:
        policy: of the online network.
        target: the target network, of the policy's `compute_network`'s kind.
        settings: of the learner.
        loss: a custom loss, or None.
        frames: the tensor of frames that observations are row numbers of, if they are.
        generator: of the levels of implicit quantiles.
    """

    def __init__(
        self,
        policy: Policy,
        target: nn.Module,
        settings: LearnerSettings,
        loss: CustomLoss | None = None,
        frames: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self._policy, self._online, self._target = policy, policy.compute_network, target
        self._settings, self._custom_loss, self._frames, self._generator = settings, loss, frames, generator
        self._loss = LOSSES[settings.loss]
        self._parameters = list(self._online.parameters())
        self._prepare: Callable[[Tensor], Tensor] = getattr(self._online, "prepare", lambda obs: obs)

    def __call__(self, batch: Transitions, weight: Tensor) -> Gradients:
        """Differentiate the loss of B transitions with (B,) importance weights.

        Raises:
            ValueError: a custom loss did not return one value per sample.
        """
        if self._custom_loss is not None:
            root = self._of_custom_loss(self._custom_loss, batch)
            slopes, found = weight / len(root), Gradients(root.detach(), root.detach(), None)
        elif self._settings.value == "scalar":
            root, slopes, errors = self._of_scalar_values(batch, weight)
            found = Gradients(errors, errors, root.detach())
        else:
            root, td_errors, values = self._of_distributions(batch)
            slopes, found = weight / len(root), Gradients(root.detach(), td_errors, values)
        for parameter in self._parameters:
            parameter.grad = None
        root.backward(slopes)
        return found

    def _of_scalar_values(self, batch: Transitions, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (B, A) action values, the slopes of the weighted mean of their losses, and (B,) TD errors."""
        with self._policy.autocast():
            batch = self._observe(batch)
            obs, action, reward, discount, next_obs = batch
            # With gradients first: autocast remembers its casts of the weights, and casts that were made without
            # gradients would cut the graph (PyTorch before 2.10).
            q_tm1 = self._online(obs)
            values = q_tm1.detach()
            with torch.no_grad():
                if self._settings.munchausen:
                    goal = munchausen_target(self._target, values, batch, self._settings)
                    errors = goal - values.gather(1, action.unsqueeze(1)).squeeze(1)
                else:
                    q_t = self._target(next_obs)
                    selector_t = self._online(next_obs) if self._settings.double else None
                    errors = td_error(values, action, reward, discount, q_t, selector_t)
        # Only the actions that were taken have a slope.
        slope = (weight * self._loss.slope(errors)).mul_(-1 / len(action)).to(values.dtype)
        return q_tm1, torch.zeros_like(values).scatter_(1, action.unsqueeze(1), slope.unsqueeze(1)), errors

    def _of_distributions(self, batch: Transitions) -> tuple[Tensor, Tensor, Tensor]:
        """Return (B,) losses, (B,) TD errors and (B, A) action values."""
        assert isinstance(self._online, QNetwork)
        assert isinstance(self._target, QNetwork)
        with self._policy.autocast():
            losses = DISTRIBUTIONAL[self._settings.value]
            return losses(self._online, self._target, self._observe(batch), self._settings, self._generator)

    def _of_custom_loss(self, custom_loss: CustomLoss, batch: Transitions) -> Tensor:
        """Return the (B,) losses that `custom_loss` computes."""
        kind, size = self._policy.device.type, len(batch.action)
        # It may run a network without gradients first, so no cast may be remembered: see `_of_scalar_values`.
        with self._policy.autocast(), torch.autocast(kind, None, torch.is_autocast_enabled(kind), cache_enabled=False):
            losses: object = custom_loss(self._online, self._target, self._observe(batch))
        found = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        if not isinstance(losses, Tensor) or losses.shape != (size,):
            raise ValueError(f"loss: expected a tensor of shape ({size},), one value per sample, got {found}")
        if not losses.requires_grad:
            raise ValueError("loss: expected values with a gradient for the network's parameters, got some without")
        return losses

    def _observe(self, batch: Transitions) -> Transitions:
        """Look up the observations, if the batch holds row numbers, and prepare them."""
        obs, next_obs = batch.obs, batch.next_obs
        if self._frames is None:
            obs, next_obs = self._prepare(obs), self._prepare(next_obs)
        else:
            obs, next_obs = self._prepare(look_up(self._frames, torch.cat([obs, next_obs]))).chunk(2)
        return batch._replace(obs=obs, next_obs=next_obs)

"""`LearnerSettings`: the part of a `Config` that defines the update."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from pydqn.config import Config


@dataclass(frozen=True)
class LearnerSettings:
    """What defines a learner's update. `Config` has the same fields and explains them.

    Raises:
        ValueError: a field has the wrong type or is out of range; the message names it.
    """

    batch_size: int = Config.batch_size
    loss: str = Config.loss
    double: bool = Config.double
    value: str = Config.value
    num_atoms: int = Config.num_atoms
    value_min: float = Config.value_min
    value_max: float = Config.value_max
    hl_gauss_sigma: float = Config.hl_gauss_sigma
    num_quantiles: int = Config.num_quantiles
    num_taus: int = Config.num_taus
    num_target_taus: int = Config.num_target_taus
    num_action_taus: int = Config.num_action_taus
    num_cosines: int = Config.num_cosines
    first_cosine: int = Config.first_cosine
    quantile_kappa: float = Config.quantile_kappa
    munchausen: bool = Config.munchausen
    munchausen_alpha: float = Config.munchausen_alpha
    munchausen_temperature: float = Config.munchausen_temperature
    munchausen_least: float = Config.munchausen_least
    munchausen_policy: str = Config.munchausen_policy
    priority_error: str = Config.priority_error
    max_grad_norm: float = Config.max_grad_norm
    target_update_period: int = Config.target_update_period
    target_update_rate: float = Config.target_update_rate
    precision: str = Config.precision
    learning_rate: float = Config.learning_rate
    optimizer: str = Config.optimizer
    optimizer_epsilon: float = Config.optimizer_epsilon
    weight_decay: float = Config.weight_decay
    rmsprop_decay: float = Config.rmsprop_decay
    rmsprop_momentum: float = Config.rmsprop_momentum
    update: str = Config.update

    def __post_init__(self) -> None:
        # `Config` has the checks. Its replay buffer is made large enough for any batch.
        checked = Config(**vars(self), replay_capacity_frames=2**53)
        for name in vars(self):
            object.__setattr__(self, name, getattr(checked, name))

    @classmethod
    def from_config(cls, config: Config) -> LearnerSettings:
        """Return the learner's part of `config`."""
        return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(cls)})

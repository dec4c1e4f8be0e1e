"""Releases of Stable-Baselines3 that have no n-step returns."""

from __future__ import annotations

from typing import NamedTuple

import pytest

pytest.importorskip("stable_baselines3", reason="needs Stable-Baselines3: pip install 'pydqn[adapters]'")

import torch

from pydqn.adapters import sb3
from pydqn.adapters.sb3 import PrioritizedDQN
from tests.helpers.sb3_models import learner_of, numbered


class OldSamples(NamedTuple):
    """The tuple of releases without n-step returns."""

    observations: torch.Tensor
    actions: torch.Tensor
    next_observations: torch.Tensor
    dones: torch.Tensor
    rewards: torch.Tensor


class OldPrioritizedDQN(PrioritizedDQN):
    """As if derived from a DQN without n-step returns."""

    def _setup_model(self):
        del self.n_steps
        super()._setup_model()


def test_releases_without_n_step_returns(monkeypatch):
    monkeypatch.setattr(sb3, "ReplayBufferSamples", OldSamples)
    model = learner_of(OldPrioritizedDQN).learn(200)
    assert model._n_updates > 0
    assert len(model.replay_buffer.sample(4)) == 5
    with pytest.raises(ValueError, match="^n_steps: expected 1, as this release of Stable-Baselines3 has no n-step"):
        numbered(3, 5)

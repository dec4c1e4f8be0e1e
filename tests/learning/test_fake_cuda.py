"""Updates and acting traced with fake CUDA tensors: nothing that a CUDA graph could not hold; see `helpers.fake_cuda`.

`scripts/trace` traces all combinations.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from pydqn import LearnerSettings
from pydqn.envs.frames import FrameLayout, Part
from pydqn.learning import gradients, objectives, torsos
from pydqn.learning.networks import make_network
from pydqn.learning.torsos import ImpalaSettings
from tests.helpers.fake_cuda import trace
from tests.helpers.learners import VALUES

RECORDS = FrameLayout(
    (
        Part("image", (12, 12, 3), np.dtype(np.uint8), (0, 255), "last"),
        Part("numbers", (3,), np.dtype(np.float32), (0, 1)),
    ),
    masked_actions=6,
)
# name of the torso, what make_network takes for the frames, and their shape and dtype
NETWORKS = {
    "small": ("small", (84, 84), (84, 84), "uint8"),
    "nature_7x7": ("nature_7x7", (84, 84), (84, 84), "uint8"),
    "minatar": ("minatar", (10, 10, 4), (10, 10, 4), "uint8"),
    "impala": ("impala", (84, 84), (84, 84), "uint8"),
    "mlp": ("mlp", (4,), (4,), "float32"),
    "records": ("auto", RECORDS, RECORDS.frame_shape, "uint8"),
}


def traced(variant, network="small", storage="host", *, dueling=False, noisy=0.0, plain=True, **settings):
    """Trace a learner of `variant`; unless `plain`, its network has layer normalization and a shared bias."""
    settings = LearnerSettings(**{"batch_size": 8, **variant, **settings})
    name, frames, shape, dtype = NETWORKS[network]
    units = () if name == "nature_7x7" else (32,)
    made = make_network(
        name,
        4,
        frames,
        6,
        hidden_units=units,
        dueling=dueling,
        settings=settings,
        noisy_sigma=noisy,
        layer_norm="none" if plain else "both",
        shared_bias=not plain,
        impala=ImpalaSettings(1, True, 6),
    )
    return trace(made, settings, shape, dtype, storage)


def named(variant):
    return ",".join(str(value) for name, value in variant.items() if not name.startswith(("num_", "value_")))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", VALUES, ids=named)
def test_every_value_representation(variant, precision):
    """With noise and dueling or without, frames on the host or on the device: one such combination of each."""
    combinations = list(itertools.product((0.0, 0.5), ("host", "device"), (False, True)))
    noisy, storage, dueling = combinations[(3 * VALUES.index(variant) + 5 * (precision == "bfloat16")) % 8]
    update, act, target = traced(variant, "small", storage, dueling=dueling, noisy=noisy, precision=precision)
    assert any("convolution_backward" in operation for operation in update.operations)
    assert any("convolution" in operation for operation in act.operations)
    assert target.operations


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("network", NETWORKS)
def test_every_network(network, precision):
    for value, storage in (("scalar", "device"), ("implicit_quantile", "host")):
        traced({"value": value, "num_taus": 4}, network, storage, precision=precision, double=True)
    traced({}, network, "device", precision=precision, plain=False)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "rmsprop", "rmsprop_tf", "rmsprop_centered"])
@pytest.mark.parametrize("clip", [0.0, 10.0])
def test_every_optimizer(optimizer, clip):
    for precision in ("float32", "bfloat16"):
        traced({}, optimizer=optimizer, max_grad_norm=clip, rmsprop_momentum=0.9, precision=precision)
    traced({"target_update_rate": 0.01, "priority_error": "root_loss"}, optimizer=optimizer)


def loss_with(change):
    def loss(online, target, batch):
        q = online(batch.obs).gather(1, batch.action[:, None])[:, 0]
        with torch.no_grad():
            goal = batch.reward + batch.discount * target(batch.next_obs).amax(1)
            goal = change(goal)
        return nn.functional.huber_loss(q, goal, reduction="none")

    return loss


@pytest.mark.parametrize("change", [lambda goal: goal, lambda goal: goal + torch.randn(8, device=goal.device)])
def test_losses_that_a_graph_can_hold(change):
    trace(make_network("mlp", 4, (4,), 6), LearnerSettings(batch_size=8), (4,), "float32", loss=loss_with(change))


FAULTS = {
    "item": lambda goal: goal * 2 if goal.sum().item() > 0 else goal,
    "branch": lambda goal: goal * 2 if (goal > 0).any() else goal,
    "boolean mask": lambda goal: goal + goal[goal > 0].sum(),
    "number from the host": lambda goal: goal * torch.tensor(0.99, device=goal.device),
    "scalar on the CPU": lambda goal: goal * torch.tensor(0.99),
    "vector on the CPU": lambda goal: goal * torch.ones(8),
    "to the host and back": lambda goal: goal.cpu().to(goal.device),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_refused(fault):
    """So the traces above could fail."""
    settings, loss = LearnerSettings(batch_size=8), loss_with(FAULTS[fault])
    with pytest.raises(Exception, match=r"."):
        trace(make_network("mlp", 4, (4,), 6), settings, (4,), "float32", loss=loss)


PLANTED = {
    "rows on the CPU": (
        gradients,
        "look_up",
        lambda frames, rows: frames.index_select(0, rows.flatten().cpu()).view(*rows.shape, *frames.shape[1:]),
    ),
    "pixels through NumPy": (torsos, "to_channels_last", lambda images, dtype: (images.numpy(), images.to(dtype))[1]),
    "a loss read on the host": (
        objectives.distributions,
        "cross_entropy",
        lambda logits, p: -(p * logits.log_softmax(1)).sum(1) * float(p.sum()),
    ),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_faults_in_our_own_code_are_refused(monkeypatch, fault):
    where, name, value = PLANTED[fault]
    monkeypatch.setattr(where, name, value)
    with pytest.raises(Exception, match=r"."):
        traced({"value": "categorical"}, "small", "device")

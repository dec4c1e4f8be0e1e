"""Acting and updating, in the precision that this machine would choose and in float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pydqn import FrameReplay, Learner, preset
from pydqn.networks import make_network
from pydqn.policies import resolve_device


@pytest.fixture(params=["auto", "float32"])
def precision(request):
    return request.param


def make(precision, **overrides):
    config = preset("pong", precision=precision, **overrides)
    replay = FrameReplay(5000, n_step=config.n_step, num_envs=16)
    generator = np.random.default_rng(0)
    off = np.zeros(16, bool)
    for tick in range(200):
        frame = generator.integers(0, 255, (16, 84, 84), dtype=np.uint8)
        replay.append(frame, generator.integers(6, size=16), np.ones(16), off, off, np.full(16, tick == 0))
    network = make_network(
        config.network,
        4,
        (84, 84),
        6,
        hidden_units=config.hidden_units,
        dueling=config.dueling,
        pixel_mean=config.pixel_mean,
        pixel_std=config.pixel_std,
    )
    return Learner(network, config, resolve_device("auto"), replay.empty_batch(32)), replay


NETWORKS = {
    "pong": {},
    "nature": {"network": "nature", "hidden_units": (512,), "dueling": False, "double": False, "n_step": 1},
}


@pytest.mark.parametrize("network", NETWORKS)
def bench_update_32(benchmark, network, precision):
    learner, replay = make(precision, **NETWORKS[network])
    before = [parameter.detach().clone() for parameter in learner.online.parameters()]
    batch = replay.sample(32)

    def update():
        learner.update(batch)
        if learner.device.type == "cuda":
            torch.cuda.synchronize()

    benchmark(update)
    assert learner.updates > 0
    assert not any(torch.equal(a, b) for a, b in zip(before, learner.online.parameters(), strict=True))
    assert np.isfinite(learner.metrics().loss)


@pytest.mark.parametrize("network", NETWORKS)
def bench_act_16(benchmark, network, precision):
    learner, replay = make(precision, **NETWORKS[network])
    values = benchmark(learner.policy.values, replay.latest())
    assert values.shape == (16, 6)

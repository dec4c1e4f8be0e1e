"""Acting and updating, in the precision "auto" of this machine and in float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from timing import in_turns

from pydqn import FrameReplay, Learner, LearnerSettings, preset
from pydqn.learning.networks import make_network


@pytest.fixture(params=["auto", "float32"])
def precision(request):
    return request.param


def make(precision, loss=None, **overrides):
    config = preset("pong", precision=precision, **overrides)
    shape, stack, dtype = ((4,), 1, "float32") if config.network == "mlp" else ((84, 84), 4, "uint8")
    replay = FrameReplay(5000, shape, stack=stack, dtype=dtype, n_step=config.n_step, num_envs=16)
    generator = np.random.default_rng(0)
    off = np.zeros(16, bool)
    for time_step in range(200):
        frame = generator.integers(0, 255, (16, *shape), dtype=np.uint8).astype(dtype)
        replay.append(frame, generator.integers(6, size=16), np.ones(16), off, off, np.full(16, time_step == 0))
    network = make_network(
        config.network,
        stack,
        shape,
        6,
        hidden_units=config.hidden_units,
        dueling=config.dueling,
        pixel_mean=config.pixel_mean,
        pixel_std=config.pixel_std,
    )
    return Learner(network, LearnerSettings.from_config(config), "auto", replay.empty_batch(32), loss=loss), replay


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
    assert np.isfinite(learner.statistics().loss)


def double_huber(online, target, batch):
    """The built-in loss of `pong` as a custom loss."""
    q = online(batch.obs).gather(1, batch.action[:, None])[:, 0]
    with torch.no_grad():
        chosen = online(batch.next_obs).argmax(1, keepdim=True)
        goal = batch.reward + batch.discount * target(batch.next_obs).gather(1, chosen)[:, 0]
    return torch.nn.functional.huber_loss(q, goal, reduction="none")


@pytest.mark.parametrize("network", ["pong", "mlp"])
def bench_update_own_loss(benchmark, network):
    """A custom loss, interleaved with the same built-in loss; `extra_info` of the JSON file has the ratio."""
    settings = {"mlp": {"network": "mlp", "hidden_units": (128, 128), "dueling": False}}.get(network, {})
    (built_in, replay), (own, _) = make("float32", **settings), make("float32", double_huber, **settings)
    batches = [replay.sample(32) for _ in range(20)]

    def update(learner):
        learner.update(batches[learner.updates % 20])
        if learner.device.type == "cuda":
            torch.cuda.synchronize()

    for learner in (own, built_in) * 20:
        update(learner)
    np.testing.assert_allclose(own.statistics().loss, built_in.statistics().loss, rtol=1e-2)
    times = in_turns({"own": lambda: update(own), "built in": lambda: update(built_in)}, 100, 3)
    benchmark.extra_info["ratio"] = times["own"] / times["built in"]
    benchmark(update, own)


@pytest.mark.parametrize("network", NETWORKS)
def bench_act_16(benchmark, network, precision):
    learner, replay = make(precision, **NETWORKS[network])
    values = benchmark(learner.policy.values, replay.latest())
    assert values.shape == (16, 6)

"""How observations reach a network: scaled by dtype and bounds of their space, and never changed without an error."""

from __future__ import annotations

import dataclasses
import json
import math

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from pydqn import Config, Learner, LearnerSettings, evaluate, resume, train
from pydqn.envs.discrete import StateEnv
from pydqn.envs.make import make_envs
from pydqn.envs.spaces import Encoder
from pydqn.evaluation.build import network_for
from pydqn.learning.networks import make_network, mixed_precision_copy
from pydqn.learning.policy import Actor, Policy
from pydqn.replay.frames import FrameReplay

SIDE = 36
SIDES = (SIDE, SIDE)
IMAGES = {  # name: (space, input range, description)
    "bytes": (spaces.Box(0, 255, SIDES, np.uint8), (0, 255), "uint8 / 255"),
    "few bytes": (spaces.Box(0, 10, SIDES, np.uint8), (0, 10), "uint8 / 10"),
    "bits": (spaces.Box(0, 1, SIDES, np.uint8), (0, 1), "uint8 as they are"),
    "booleans": (spaces.Box(0, 1, SIDES, np.bool_), (0, 1), "uint8 as they are"),
    "0..1": (spaces.Box(0, 1, SIDES, np.float32), (0, 1), "float32 as they are"),
    "-1..1": (spaces.Box(-1, 1, SIDES, np.float32), (0, 1), "float32 as they are"),
    "0..255": (spaces.Box(0, 255, SIDES, np.float32), (0, 255), "float32 / 255"),
    "0..255 in float64": (spaces.Box(0, 255, SIDES, np.float64), (0, 255), "float32 / 255"),
    "words": (spaces.Box(0, 65_535, SIDES, np.uint16), (0, 65_535), "float32 / 65535"),
    "-5..15": (spaces.Box(-5, 15, SIDES, np.float32), (-5, 15), "float32 from -5..15 to 0..1"),
    "channels": (
        spaces.Box(np.tile([0, -2], (SIDE, SIDE // 2)).astype(np.float32), 2, SIDES, np.float32),
        (-2, 2),
        "float32 from -2..2 to 0..1",
    ),
    "no bounds": (spaces.Box(-np.inf, np.inf, SIDES, np.float32), (0, 1), "float32 as they are"),
    "half a bound": (spaces.Box(0, np.inf, SIDES, np.float32), (0, 1), "float32 as they are"),
    "a dtype's bounds": (
        spaces.Box(0, float(np.finfo(np.float32).max), SIDES, np.float32),
        (0, 1),
        "float32 as they are",
    ),
}
VECTORS = {
    "CartPole": (spaces.Box(np.array([-4.8, -np.inf]), np.array([4.8, np.inf]), (2,), np.float64), (0, 1)),
    "MountainCar": (spaces.Box(np.array([-1.2, -0.07]), np.array([0.6, 0.07]), (2,), np.float64), (0, 1)),
    "counts": (spaces.Box(0, 100, (3,), np.int64), (0, 1)),
    "RAM": (spaces.Box(0, 255, (128,), np.uint8), (0, 255)),
}


class Cycle(gymnasium.Env):
    """Cycles through given observations. Action `steps % 2` gets the reward 1. Episodes have four steps."""

    action_space = spaces.Discrete(2)

    def __init__(self, space, observations, render_mode=None):
        self.observation_space, self._observations = space, observations

    def _observation(self):
        return self._observations[self._steps % len(self._observations)].copy()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._steps = 0
        return self._observation(), {}

    def step(self, action):
        self._steps += 1
        return self._observation(), float(action == self._steps % 2), self._steps == 4, False, {}


@pytest.fixture
def register():
    def register(space, observations):
        kwargs = {"space": space, "observations": observations}
        gymnasium.register("Cycle-v0", entry_point=Cycle, kwargs=kwargs, disable_env_checker=True)
        return Config(
            env_id="Cycle-v0",
            **{"num_envs": 1, "network": "small", "hidden_units": (16,), "stack": 2, "device": "cpu"},
            **{"torch_threads": 1, "replay_capacity_frames": 500, "checkpoint_every_steps": 0, "precision": "float32"},
        )

    yield register
    gymnasium.registry.pop("Cycle-v0", None)


def examples(space, count=3):
    space.seed(0)
    if space.is_bounded() and space.high.max() < 1e30:
        return [space.sample() for _ in range(count)]
    return [np.random.default_rng(seed).random(space.shape).astype(space.dtype) for seed in range(count)]


@pytest.mark.parametrize("name", IMAGES)
def test_ranges_of_images(name):
    space, expected, _ = IMAGES[name]
    part = Encoder("x", space).layout.parts[0]
    assert part.input_range == expected
    assert part.dtype == (np.uint8 if space.dtype in (np.uint8, np.bool_) else np.float32)
    assert part.channels == "none"


@pytest.mark.parametrize("name", VECTORS)
def test_ranges_of_vectors(name):
    space, expected = VECTORS[name]
    assert Encoder("x", space).layout.parts[0].input_range == expected


@pytest.mark.parametrize("network", ["small", "mlp"])
@pytest.mark.parametrize("name", IMAGES)
def test_the_first_layer_gets_scaled_observations(register, name, network):
    """Compared with plain PyTorch on observations that are scaled by hand, with pixel_mean and pixel_std."""
    space, (low, high), _ = IMAGES[name]
    config = register(space, examples(space))
    config = dataclasses.replace(config, network=network, pixel_mean=0.25, pixel_std=0.5)
    envs = make_envs(config, 1, 0)
    frames = np.zeros((1, *SIDES), envs.dtype)
    envs.reset(frames)
    q_network = network_for(config, envs, 3)
    by_hand = make_network(network, 2, SIDES, 2, hidden_units=(16,), input_range=(0, 1), seed=3)
    obs = torch.from_numpy(np.stack([frames, np.zeros_like(frames)], axis=1))
    scaled = (obs.double() - low) / (high - low)
    scaled = scaled if network == "mlp" else (scaled - 0.25) / 0.5
    torch.testing.assert_close(q_network(obs), by_hand(scaled.float()), rtol=1e-4, atol=1e-4)


def test_bytes_are_divided_by_255_bit_for_bit():
    obs = torch.randint(0, 256, (5, 4, 84, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    network = make_network("nature", 4, (84, 84), 6, pixel_mean=0.34, pixel_std=0.15, seed=1)
    first = network.torso.convs[0]
    weight = first.weight * (1 / (255 * 0.15))
    bias = first.bias - 0.34 / 0.15 * first.weight.sum(dim=(1, 2, 3))
    x = torch.relu(torch.nn.functional.conv2d(network.prepare(obs), weight, bias, first.stride))
    for conv in network.torso.convs[1:]:
        x = torch.relu(conv(x))
    assert torch.equal(network(obs), network.advantage(x.flatten(1)))


@pytest.mark.parametrize("name", ["bytes", "bits", "0..1", "-1..1", "0..255", "-5..15"])
def test_learning_and_acting_on_every_kind_of_image(register, tmp_path, name):
    """A run is trained, resumed and evaluated with the same scale, and describes it."""
    space, _, text = IMAGES[name]
    config = register(space, examples(space))
    config = dataclasses.replace(config, total_steps=120, learning_starts_steps=20, batch_size=8)
    assert train(config, tmp_path).updates > 0
    assert json.loads((tmp_path / "environment.json").read_text())["inputs"] == f"{SIDE}x{SIDE} {text}"
    assert resume(tmp_path, total_steps=160).steps == 160
    assert len(evaluate(tmp_path, 2)) == 2


@pytest.mark.parametrize("name", ["bytes", "0..1", "-5..15"])
def test_bfloat16_on_every_kind_of_image(name):
    """A copy in mixed precision takes prepared and unprepared frames; the first layer takes real frames as float32."""
    space, input_range, _ = IMAGES[name]
    network = make_network("small", 2, SIDES, 3, hidden_units=(16,), input_range=input_range, seed=0)
    low = mixed_precision_copy(network, torch.bfloat16)
    obs = torch.from_numpy(np.stack(examples(space, 8)).reshape(4, 2, *SIDES).astype(Encoder("x", space).layout.dtype))
    exact = network(obs)
    torch.testing.assert_close(low(obs), exact, rtol=0.1, atol=0.05)
    assert torch.equal(low(low.prepare(obs)), low(obs))
    assert low.prepare(obs).dtype == (torch.bfloat16 if name == "bytes" else torch.float32)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_learner_and_an_actor_of_real_frames(precision):
    replay = FrameReplay(200, SIDES, stack=2, num_envs=1, dtype="float32", seed=0)
    generator = np.random.default_rng(0)
    for step in range(60):
        frame = generator.random((1, *SIDES), np.float32)
        replay.append(frame, [step % 3], [1.0], [step % 9 == 8], [False], [step % 9 == 0])
    settings = LearnerSettings(batch_size=8, precision=precision)
    network = make_network("small", 2, SIDES, 3, hidden_units=(16,), input_range=(0, 1))
    batch = replay.sample(8)
    learner = Learner(network, settings, "cpu", batch)
    before = learner.policy.values(batch.obs)
    for _ in range(5):
        learner.update(replay.sample(8))
    assert math.isfinite(learner.statistics().loss)
    assert not np.array_equal(learner.policy.values(batch.obs), before)
    actor = Actor(learner.policy, replay.empty_batch(1).obs)
    np.testing.assert_allclose(actor.values(replay.latest()), learner.policy.values(replay.latest()), rtol=1e-5)


def test_a_policy_of_float64_frames():
    network = make_network("small", 2, SIDES, 3, hidden_units=(16,), input_range=(0, 1))
    obs = np.random.default_rng(0).random((2, 2, *SIDES))
    values = Policy(network, torch.device("cpu"), "float32").values(obs)
    np.testing.assert_allclose(values, network(torch.from_numpy(obs).float()).detach().numpy(), rtol=1e-5)


# --- numbers that float32 does not hold ---

LARGE = {
    "int64": (spaces.Box(-(2**40), 2**40, (3,), np.int64), [0, 2**24 + 1, 1], "16777217"),
    "int32": (spaces.Box(-(2**30), 2**30, (3,), np.int32), [0, -(2**25) - 1, 1], "-33554433"),
    "uint64": (spaces.Box(0, 2**64 - 1, (3,), np.uint64), [0, 2**64 - 1, 1], "18446744073709551615"),
    "float64": (spaces.Box(-np.inf, np.inf, (3,), np.float64), [0, 1e300, 1], "1e+300"),
}


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("name", LARGE)
def test_a_number_that_would_change_is_refused(register, name, at):
    """It is in the first observation, or in a later one."""
    space, numbers, text = LARGE[name]
    observations = [np.ones(3, space.dtype)] * 4
    observations[at] = np.array(numbers, space.dtype)
    envs = make_envs(register(space, observations), 1, 0)
    frames = np.zeros((1, 3), np.float32)
    with pytest.raises(RuntimeError) as caught:
        envs.reset(frames)
        for _ in range(2):
            envs.send(np.zeros(1, np.int64))
            envs.recv(frames)
    message = str(caught.value)
    assert message.startswith("env_id: Cycle-v0, env index 0 (seed ")
    assert f"step {at}: returned an observation: expected dtype float32" in message
    assert text in message
    assert "would change; scale it in a wrapper" in message
    assert "not finite" not in message


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.uint16, np.int32, np.int64, np.float64])
def test_numbers_that_float32_holds_stay(register, dtype):
    most = min(2**24, int(np.iinfo(dtype).max)) if np.issubdtype(dtype, np.integer) else 2**24
    space = spaces.Box(0, most, (2,), dtype)
    envs = make_envs(register(space, [np.array([most, most - 1], dtype)]), 1, 0)
    frames = np.zeros((1, 2), np.float32)
    envs.reset(frames)
    assert frames[0].tolist() == [most, most - 1]


def test_uint16_values_in_a_space_of_bytes_are_refused(register):
    envs = make_envs(register(spaces.Box(0, 255, (2,), np.uint8), [np.array([1, 300], np.uint16)]), 1, 0)
    with pytest.raises(RuntimeError, match=r"expected dtype uint8.* with the value 300, which would change"):
        envs.reset(np.zeros((1, 2), np.uint8))


@pytest.mark.parametrize("space", [spaces.Discrete(10**9), spaces.Tuple([spaces.Discrete(2**20)] * 4)])
def test_too_many_states_are_refused(register, space):
    config = register(space, [np.zeros(1)])
    with pytest.raises(ValueError, match=r"^env_id: Cycle-v0 has [\d,]+ states .* a network takes at most 65,536"):
        make_envs(config, 1, 0)
    with pytest.raises(ValueError, match=r"^env_id: Cycle-v0 has [\d,]+ states with 2 actions; a table holds at most"):
        StateEnv(config, 0)


def test_a_reward_beyond_float32_is_refused(register, monkeypatch):
    config = register(spaces.Box(0, 1, (2,), np.float32), [np.zeros(2, np.float32)])
    real = Cycle.step
    monkeypatch.setattr(Cycle, "step", lambda self, action: (real(self, action)[0], -1e300, False, False, {}))
    envs = make_envs(config, 1, 0)
    frames = np.zeros((1, 2), np.float32)
    envs.reset(frames)
    envs.send(np.zeros(1, np.int64))
    with pytest.raises(RuntimeError, match=r"env index 0 .* a reward of -1e\+300, which float32 does not hold"):
        envs.recv(frames)

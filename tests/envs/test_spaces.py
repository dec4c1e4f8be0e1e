"""Observations of all kinds of spaces become frames that hold the same values: compared with Gymnasium's `flatten`."""

from __future__ import annotations

import json
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from pydqn import Config, evaluate, preset, resume, train
from pydqn.envs.spaces import Encoder, channels_of
from pydqn.learning.networks import make_network
from pydqn.learning.records import RecordTorso, parts_of
from pydqn.learning.torsos import PixelTorso

Box = spaces.Box
CAMERA = Box(0, 255, (20, 24, 3), np.uint8)
VECTORS = {  # name: (space, length of the frame, its dtype)
    "MultiDiscrete": (spaces.MultiDiscrete([3, 4]), 7, np.uint8),
    "MultiDiscrete from 5": (spaces.MultiDiscrete([3, 4], start=[5, -2]), 7, np.uint8),
    "MultiDiscrete of two axes": (spaces.MultiDiscrete([[3, 4], [2, 2]]), 11, np.uint8),
    "Dict": (spaces.Dict(a=Box(-1, 1, (3,)), b=spaces.Discrete(4, start=2)), 7, np.float32),
    "Dict of Dict": (spaces.Dict(a=spaces.Dict(b=Box(-1, 1, (2, 2)), c=spaces.MultiBinary(3))), 7, np.float32),
    "Tuple": (spaces.Tuple((spaces.Discrete(3), Box(-5, 5, (2,)))), 5, np.float32),
    "many states": (spaces.Tuple((spaces.Discrete(400), spaces.Discrete(300))), 700, np.uint8),
    "numbers without axes": (spaces.Dict(a=Box(-1, 1, ()), b=Box(0, 1, (2,), np.bool_)), 3, np.float32),
}


def frame_of(encoder: Encoder, observation, mask=None):
    frame = np.zeros(encoder.layout.frame_shape, encoder.layout.dtype)
    encoder.write(observation, frame, mask)
    return frame


@pytest.mark.parametrize("name", VECTORS)
def test_vectors_are_gymnasiums_own_flat_ones(name):
    space, size, dtype = VECTORS[name]
    encoder = Encoder("x", space)
    assert encoder.layout.frame_shape == (size,)
    assert encoder.layout.dtype == dtype
    space.seed(0)
    for _ in range(50):
        observation = space.sample()
        if name in ("MultiDiscrete from 5", "Dict"):
            expected = np.concatenate([np.ravel(part) for part in by_hand(space, observation)])
        else:
            expected = spaces.flatten(space, observation)
        np.testing.assert_array_equal(frame_of(encoder, observation), expected.astype(dtype))


def by_hand(space, observation):
    """Return the parts, for spaces that do not start at 0 (Gymnasium's `flatten` of MultiDiscrete ignores that)."""
    if isinstance(space, spaces.Dict):
        return [part for key in space for part in by_hand(space[key], observation[key])]
    if isinstance(space, spaces.Discrete):
        return [np.eye(int(space.n))[int(observation - space.start)]]
    if isinstance(space, spaces.MultiDiscrete):
        return [np.eye(int(n))[int(v - s)] for n, s, v in zip(space.nvec, space.start, observation, strict=True)]
    return [observation]


def test_bytes_in_a_vector_are_scaled_from_their_bounds():
    space = spaces.Dict(a=Box(50, 250, (2,), np.uint8), b=Box(-50, 50, (1,)))
    observation = {"a": np.array([50, 200], np.uint8), "b": np.array([-7.0], np.float32)}
    np.testing.assert_allclose(frame_of(Encoder("x", space), observation), [0, 0.75, -7])
    np.testing.assert_array_equal(frame_of(Encoder("x", space, scaling="none"), observation), [50, 200, -7])


@pytest.mark.parametrize(
    ("shape", "given", "expected"),
    [
        ((84, 84), "auto", "none"),
        ((84, 84), "first", "none"),
        ((210, 160, 3), "auto", "last"),
        ((3, 210, 160), "auto", "first"),
        ((10, 10, 10), "auto", "last"),
        ((10, 10, 10), "first", "first"),
        ((12, 12, 16), "auto", "first"),  # 12 images of 12x16, or 16 of 12x12: the user has to say it
        ((12, 12, 16), "last", "last"),
        ((9, 84), "auto", ""),
        ((7, 7, 3), "auto", ""),
        ((84,), "auto", ""),
        ((2, 84, 84, 3), "auto", ""),
    ],
)
def test_where_channels_are(shape, given, expected):
    assert channels_of(shape, given) == expected


IMAGES = {"none": (20, 24), "first": (3, 20, 24), "last": (20, 24, 3)}


@pytest.mark.parametrize("stack", [1, 3])
@pytest.mark.parametrize("where", IMAGES)
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_channels_of_stacked_frames_reach_the_first_convolution_in_order(where, stack, dtype):
    """Frame by frame, and within a frame channel by channel: compared with plain loops."""
    torso = PixelTorso("grid", stack, IMAGES[where], channels=where, input_range=(0, 255))
    obs = torch.randint(0, 256, (2, stack, *IMAGES[where]), generator=torch.Generator().manual_seed(0))
    obs = obs.to(getattr(torch, dtype))
    planes = []
    for frame in range(stack):
        image = obs[:, frame]
        if where == "none":
            planes.append(image)
        else:
            planes += [image[:, c] if where == "first" else image[..., c] for c in range(3)]
    expected = torch.stack(planes, dim=1)
    assert torch.equal(torso.prepare(obs), expected.float())
    assert torch.equal(torso(obs), torso(torso.prepare(obs)))
    plain = torch.relu(torso.convs[0](expected / 255))
    for conv in torso.convs[1:]:
        plain = torch.relu(conv(plain))
    torch.testing.assert_close(torso(obs), plain.flatten(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "torso"),
    [((10, 10, 4), "minatar"), ((20, 20), "grid"), ((63, 90), "grid"), ((64, 64, 3), "nature"), ((84, 84), "nature")],
)
def test_the_torso_that_fits(shape, torso):
    space = Box(0, 255, shape, np.uint8)
    fitting = make_network("auto", 2, Encoder("x", space).layout, 3, hidden_units=(8,), seed=1)
    named = make_network(torso, 2, Encoder("x", space).layout, 3, hidden_units=(8,), seed=1)
    assert {name: value.shape for name, value in fitting.state_dict().items()} == {
        name: value.shape for name, value in named.state_dict().items()
    }


def test_large_images_are_pooled():
    assert make_network("nature", 4, (84, 84), 2).torso.features == 64 * 7 * 7
    large = make_network("nature", 1, Encoder("x", Box(0, 255, (210, 160, 3), np.uint8)).layout, 2, hidden_units=(8,))
    assert large.torso.features == 64 * 7 * 7
    assert large(torch.zeros(2, 1, 210, 160, 3, dtype=torch.uint8)).shape == (2, 2)


MIXED = spaces.Dict(
    camera=CAMERA,
    position=Box(-1, 1, (3,)),
    inner=spaces.Dict(map=Box(0, 1, (12, 12), np.bool_), mode=spaces.Discrete(4)),
)


def test_records_come_apart_as_they_were_put_together():
    encoder = Encoder("x", MIXED, masked_actions=11)
    assert [part.name for part in encoder.layout.parts] == ["camera", "inner.map", "vector"]
    assert encoder.layout.frame_shape == (20 * 24 * 3 + 12 * 12 + 7 * 4 + 2,)
    MIXED.seed(0)
    observations = [MIXED.sample() for _ in range(6)]
    masks = np.random.default_rng(0).random((6, 11)) < 0.5
    frames = [frame_of(encoder, *both) for both in zip(observations, masks, strict=True)]
    obs = torch.from_numpy(np.stack(frames).reshape(3, 2, -1))
    camera, grid, vector = parts_of(obs, encoder.layout)
    for number, observation in enumerate(observations):
        place = divmod(number, 2)
        np.testing.assert_array_equal(camera[place], observation["camera"])
        np.testing.assert_array_equal(grid[place], observation["inner"]["map"])
        one_hot = np.eye(4)[observation["inner"]["mode"]]
        np.testing.assert_array_equal(
            vector[place], np.concatenate([observation["position"], one_hot]).astype(np.float32)
        )
    values = make_network("auto", 2, encoder.layout, 11, hidden_units=(8,), dueling=True)(obs)
    np.testing.assert_array_equal(values.detach().numpy() > -1e9, masks[1::2])  # those of the newest frames


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (3, 1)])
def test_numbers_come_out_of_records_wherever_they_begin(shape):
    space = spaces.Dict(image=Box(0, 255, (11, 13), np.uint8), numbers=Box(-1, 1, (2,)))
    encoder = Encoder("x", space, masked_actions=3)  # 143 + 8 + 1 bytes
    observations = [space.sample() for _ in range(shape[0] * shape[1])]
    frames = np.stack([frame_of(encoder, observation, np.ones(3, bool)) for observation in observations])
    obs = torch.from_numpy(frames.reshape(*shape, -1))
    for start in (obs, torch.cat([obs, obs])[shape[0] :]):
        _, numbers = parts_of(start, encoder.layout)
        expected = np.stack([observation["numbers"] for observation in observations]).reshape(*shape, 2)
        np.testing.assert_array_equal(numbers, expected)


def test_each_part_of_a_record_goes_through_a_torso_of_its_own():
    encoder = Encoder("x", MIXED)
    network = make_network("auto", 2, encoder.layout, 5, hidden_units=(8,), seed=0)
    assert isinstance(network.torso, RecordTorso)
    obs = torch.from_numpy(np.stack([frame_of(encoder, MIXED.sample()) for _ in range(8)]).reshape(4, 2, -1))
    parts = parts_of(obs, encoder.layout)
    features = torch.cat([torso(part) for torso, part in zip(network.torso.torsos, parts, strict=True)], dim=1)
    assert torch.equal(network(obs), network.advantage(features))
    plain = make_network("mlp", 2, encoder.layout, 5, hidden_units=(8,))
    assert plain.torso.features == 2 * (20 * 24 * 3 + 12 * 12 + 7)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (
            spaces.Text(5),
            r"x has Text\(.*\) observations; expected Box, Discrete, MultiDiscrete or MultiBinary ones, or",
        ),
        (spaces.Dict(a=spaces.Dict(b=spaces.Text(5))), r"x has Text\(.*\) in observations \(a\.b\); expected Box"),
        (spaces.Discrete(70_000), "x has 70,000 states"),
    ],
)
def test_spaces_that_cannot_be_used_are_named(space, message):
    with pytest.raises(ValueError, match=f"^env_id: {message}"):
        Encoder("x", space)


def test_numbers_that_are_not_finite_are_named_with_their_part():
    encoder = Encoder("x", MIXED)
    observation = MIXED.sample()
    observation["position"] = np.array([0, np.nan, 0], np.float32)
    with pytest.raises(ValueError, match=r"^observation \(position\) that is not finite"):
        frame_of(encoder, observation)


class Sampled(gymnasium.Env):
    """Random observations of any space; episodes of nine steps."""

    action_space = spaces.Discrete(3)

    def __init__(self, space, render_mode=None):
        self.observation_space = space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed if seed is not None else int(self.np_random.integers(2**31)))
        self._steps = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self._steps += 1
        return self.observation_space.sample(), 1.0, self._steps == 9, False, {}


@pytest.mark.parametrize(
    ("space", "inputs"),
    [
        (CAMERA, "20x24x3 (channels last) uint8 / 255"),
        (Box(0, 1, (4, 10, 10), np.bool_), "4x10x10 (channels first) uint8 as they are"),
        (Box(0, 1, (10, 10, 4), np.float32), "10x10x4 (channels last) float32 as they are"),
        (spaces.MultiBinary((2, 3)), "2x3 uint8 as they are"),
        (VECTORS["Dict"][0], "7 float32 as they are"),
        (
            MIXED,
            "camera 20x24x3 (channels last) uint8 / 255, inner.map 12x12 uint8 as they are, "
            "vector 7 float32 as they are",
        ),
    ],
)
def test_a_run_is_the_same_after_a_resume(tmp_path, space, inputs):
    """Bit for bit, on each kind of observation; and it is evaluated."""
    gymnasium.register("Sampled-v0", entry_point=Sampled, kwargs={"space": space}, disable_env_checker=True)
    try:
        config = Config(
            env_id="Sampled-v0",
            **{"network": "auto", "num_envs": 2, "stack": 2, "n_step": 2, "hidden_units": (8,), "device": "cpu"},
            **{"total_steps": 160, "learning_starts_steps": 40, "batch_size": 8, "replay_capacity_frames": 300},
            **{"checkpoint_every_steps": 80, "torch_threads": 1, "double": True},
        )
        whole = train(config, tmp_path / "whole")
        train(replace(config, total_steps=80), tmp_path / "halves")
        halves = resume(tmp_path / "halves", total_steps=160)
        assert whole.updates == halves.updates > 0
        weights = [(tmp_path / name / "weights" / "last.safetensors").read_bytes() for name in ("whole", "halves")]
        assert weights[0] == weights[1]
        assert json.loads((tmp_path / "whole" / "environment.json").read_text())["inputs"] == inputs
        assert evaluate(tmp_path / "whole", 2) == [9, 9]
    finally:
        gymnasium.registry.pop("Sampled-v0")


class Colours(gymnasium.Env):
    """Episodes of one step: the number of the only bright colour is the right action; the shape says nothing."""

    action_space = spaces.Discrete(3)

    def __init__(self, first, render_mode=None):
        self._first = first
        self.observation_space = Box(0, 255, (3, 12, 12) if first else (12, 12, 3), np.uint8)

    def _seen(self):
        self._colour = int(self.np_random.integers(3))
        image = np.zeros((3, 12, 12), np.uint8)
        image[self._colour] = self.np_random.integers(100, 256, (12, 12))
        return image if self._first else image.transpose(1, 2, 0)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._seen(), {}

    def step(self, action):
        right = float(action == self._colour)
        return self._seen(), right, True, False, {}


@pytest.mark.parametrize("first", [False, True])
def test_colours_are_told_apart(tmp_path, first):
    settings = {
        "stack": 1,
        "total_steps": 2_000,
        "epsilon_decay_steps": 500,
        "learning_rate": 2e-3,
        "hidden_units": (32,),
    }
    settings |= {"learning_starts_steps": 100, "evaluation_every_steps": 0, "device": "cpu", "torch_threads": 1}
    config = preset("dqn-image", **settings, env_kwargs={"first": first}, env_id="own/Colours")
    train(config, tmp_path, make_env=Colours)
    assert np.mean(evaluate(tmp_path, 40, make_env=Colours)) > 0.95

"""What users of other trainers reported in public: each works here, or is refused with the way on.

Each case names a thread on GitHub in which somebody met it.
"""

from __future__ import annotations

import dataclasses
import re
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

import pydqn

QUICK = pydqn.Config(
    env_id="CartPole-v1",
    **{"network": "auto", "hidden_units": (16,), "stack": 1, "num_envs": 2, "device": "cpu", "torch_threads": 1},
    **{"learning_starts_steps": 20, "batch_size": 8, "replay_capacity_frames": 200, "total_steps": 40},
    **{"checkpoint_every_steps": 0},
)
BOX, THREE = spaces.Box(-1, 1, (3,)), spaces.Discrete(3)


class World(gymnasium.Env):
    """Observations are random ones of the space, and actions must be of theirs. Episodes have seven steps."""

    def __init__(self, observation_space=BOX, action_space=THREE, step=None, reset=None):
        self.observation_space, self.action_space = observation_space, action_space
        self._other_step, self._other_reset = step, reset

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self.steps = 0
        observation = self.observation_space.sample()
        return self._other_reset(observation) if self._other_reset else (observation, {})

    def step(self, action):
        assert self.action_space.contains(action), f"{action!r} is not one of {self.action_space}"
        self.steps += 1
        observation = self.observation_space.sample()
        if self._other_step:
            return self._other_step(observation, self.steps)
        return observation, 1.0, self.steps == 7, False, {}


def images(*shape, dtype=np.uint8, high=255):
    return spaces.Box(0, high, shape, dtype)


OBSERVATIONS = {
    "blackjack: a Tuple of Discrete (DLR-RM/stable-baselines3 1140)": spaces.Tuple(
        [spaces.Discrete(32), spaces.Discrete(11), spaces.Discrete(2)]
    ),
    "positions of an agent and a target (takuseno/d3rlpy 259)": spaces.Dict(
        agent=spaces.Box(0, np.array([9, 9])), target=spaces.Box(0, np.array([9, 9]))
    ),
    "color, depth and a direction (hill-a/stable-baselines 1045)": spaces.Dict(
        rgb=images(40, 40, 3), depth=images(40, 40, 1, dtype=np.float32, high=1), direction=spaces.Box(-1, 1, (3, 1))
    ),
    "Dict in Dict and Tuple (hill-a/stable-baselines 133)": spaces.Dict(
        inner=spaces.Dict(a=spaces.Box(-1, 1, (2,)), b=THREE),
        pair=spaces.Tuple([spaces.MultiBinary(4), spaces.MultiDiscrete([2, 5])]),
    ),
    "one number": spaces.Box(-1, 1, ()),
    "float64": spaces.Box(-1, 1, (3,), np.float64),
    "no bounds": spaces.Box(-np.inf, np.inf, (3,)),
    "a table of numbers (DLR-RM/stable-baselines3 1793)": spaces.Box(-np.inf, np.inf, (10, 10)),
    "MultiDiscrete with a start": spaces.MultiDiscrete([3, 4], start=[1, -2]),
    "MultiBinary with two axes": spaces.MultiBinary([2, 3]),
    "color images": images(30, 40, 3),
    "channels first": images(3, 30, 40),
    "images with channels of other numbers": images(12, 12, 7),
    "black and white images": spaces.Box(0, 1, (12, 12), np.bool_),
    "float images": images(3, 20, 20, dtype=np.float32, high=1),
    "integers that are not bytes": images(20, 20, 3, dtype=np.int64),
    "images that are too small for a convolution": images(7, 7, 3),
    "voxels": images(6, 6, 6, 2),
    "large images": images(210, 160, 3),
}
ACTIONS = {
    "a start other than 0": spaces.Discrete(3, start=1),
    "several at once": spaces.MultiDiscrete([3, 2]),
    "buttons": spaces.MultiBinary(3),
    "a Tuple (ray-project/ray 9404)": spaces.Tuple([spaces.Discrete(3), spaces.Discrete(2)]),
    "a Dict (DLR-RM/stable-baselines3 527)": spaces.Dict(gear=spaces.Discrete(3), brake=spaces.Discrete(2)),
    "one alone": spaces.Discrete(1),
}
REFUSED = {
    "continuous actions": (
        lambda: World(action_space=BOX),
        "has Box.* actions; DQN needs Discrete ones.*ActionWrapper",
    ),
    "partly continuous actions": (
        lambda: World(action_space=spaces.Tuple([THREE, BOX])),
        "has Tuple.* actions; DQN needs Discrete ones.*ActionWrapper",
    ),
    "too many combinations": (
        lambda: World(action_space=spaces.MultiDiscrete([100, 100])),
        "has 10,000 combinations of actions .*at most 4,096.*ActionWrapper",
    ),
    "text": (lambda: World(spaces.Text(5)), "has Text.* observations; expected Box, Discrete"),
    "sequences": (lambda: World(spaces.Sequence(THREE)), "has Sequence.* observations; expected Box, Discrete"),
    "graphs": (lambda: World(spaces.Graph(BOX, None)), "has Graph.* observations; expected Box, Discrete"),
    "a reset of before Gym 0.26 (Shengjiewang-Jason/EfficientZeroV2 5)": (
        lambda: World(reset=lambda observation: observation),
        r"env index 0 .*reset\(\) returned .*before Gym 0.26; expected 2: \(observation, info\)",
    ),
    "a step of before Gym 0.26 (hsahovic/poke-env 334)": (
        lambda: World(step=lambda observation, steps: (observation, 1.0, False, {})),
        r"step 1: step\(\) returned 4 values, as it did before Gym 0.26; expected 5",
    ),
    "a step without a result": (lambda: World(step=lambda *_: None), r"step\(\) returned None; expected 5"),
    "a reward of None": (
        lambda: World(step=lambda observation, steps: (observation, None, False, False, {})),
        "a reward of None, expected a number",
    ),
    "a reward that is not finite": (
        lambda: World(step=lambda observation, steps: (observation, np.nan, False, False, {})),
        "a reward that is not finite: nan",
    ),
    "an observation of another shape": (
        lambda: World(step=lambda observation, steps: (observation[:2], 1.0, False, False, {})),
        r"observation of shape \(2,\), expected \(3,\)",
    ),
    "an observation that is not finite": (
        lambda: World(step=lambda observation, steps: (observation * np.nan, 1.0, False, False, {})),
        "returned an observation that is not finite",
    ),
    "an environment in place of a function (hill-a/stable-baselines 577)": (
        World(),
        "^make_env: expected a function that returns a Gymnasium environment, got <",
    ),
    "a name in place of a function": ("CartPole-v1", "^make_env: expected a function .*got 'CartPole-v1'"),
    "a function without a result": (lambda: None, "could not be made: .*must inherit from the gymnasium.Env"),
    "a missing argument": (lambda size: World(), "missing 1 required.*'size'.*; give it in env_kwargs"),
    "a vector environment": (
        lambda: gymnasium.make_vec("CartPole-v1", num_envs=2),
        "could not be made: .*must inherit from the gymnasium.Env",
    ),
    "no spaces": (gymnasium.Env, "could not be made: .*must specify an action space"),
    "a mask of another length": (
        lambda: World(reset=lambda observation: (observation, {"action_mask": [1, 0]})),
        r"an action mask of shape \(2,\).*; expected 3 booleans",
    ),
    "a mask that allows nothing": (
        lambda: World(reset=lambda observation: (observation, {"action_mask": [0, 0, 0]})),
        "an action mask that allows no action, though the episode goes on",
    ),
    "a mask now and then": (
        lambda: World(reset=lambda observation: (observation, {"action_mask": [1, 0, 0]})),
        "gave no action mask, though it gave one at its first reset",
    ),
}


@pytest.fixture(autouse=True)
def no_warnings():
    """Gymnasium's own checker warns of some of these, too; nothing else does."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", module="gymnasium")
        warnings.filterwarnings("ignore", "updates take")
        yield


def trained(folder, make_env, **settings):
    result = pydqn.train(dataclasses.replace(QUICK, **settings), folder, make_env=make_env)
    assert result.updates > 0
    return result


@pytest.mark.parametrize("name", OBSERVATIONS)
def test_observations(tmp_path, name):
    make_env = lambda: World(OBSERVATIONS[name])  # noqa: E731
    trained(tmp_path, make_env, replay_capacity_frames=100)
    assert pydqn.evaluate(tmp_path, 1, make_env=make_env, evaluation_epsilon=0.0) == [7.0]
    policy = pydqn.load_policy(tmp_path, make_env=make_env)
    observation, _ = policy.env().reset(seed=0)
    assert policy(observation) == policy.values(observation).argmax()


@pytest.mark.parametrize("name", ACTIONS)
def test_actions(tmp_path, name):
    make_env = lambda: World(action_space=ACTIONS[name])  # noqa: E731
    trained(tmp_path, make_env)
    assert pydqn.evaluate(tmp_path, 1, make_env=make_env) == [7.0]


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(tmp_path, name):
    make_env, message = REFUSED[name]
    with pytest.raises((ValueError, RuntimeError)) as caught:
        trained(tmp_path, make_env)
    assert re.search(message, str(caught.value), re.DOTALL), caught.value
    assert str(caught.value).startswith(("env_id: own/", "make_env: "))


class Moves(World):
    """A game for one: each of eight moves may be made once (hill-a/stable-baselines 1155)."""

    def __init__(self, by_method=False):
        super().__init__(BOX, spaces.Discrete(8))
        if by_method:  # sb3-contrib's way
            self.action_masks = self._left

    def _left(self):
        return np.isin(np.arange(8), sorted(self.made), invert=True)

    def _with_mask(self, observation):
        return observation, {} if hasattr(self, "action_masks") else {"action_mask": self._left()}

    def reset(self, *, seed=None, options=None):
        self.made = set()
        observation, _ = super().reset(seed=seed)
        return self._with_mask(observation)

    def step(self, action):
        assert action not in self.made, f"move {action} is made again"
        self.made.add(int(action))
        observation, info = self._with_mask(super().step(action)[0])
        return observation, 1.0, len(self.made) == 8, False, info


@pytest.mark.parametrize("by_method", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_masks_that_grow(tmp_path, by_method, workers):
    """Also in processes (DLR-RM/stable-baselines3 1793), with n steps and priorities (1876)."""
    make_env = lambda: Moves(by_method)  # noqa: E731
    settings = {"n_step": 3, "prioritized": True, "double": True}
    assert set(trained(tmp_path, make_env, env_workers=workers, **settings).returns) == {8.0}
    assert pydqn.evaluate(tmp_path, 2, make_env=make_env) == [8.0, 8.0]
    values = pydqn.load_policy(tmp_path, make_env=make_env)
    env = values.env()
    observation, _ = env.reset()
    made = []
    for _ in range(8):
        assert set(np.flatnonzero(values.values(observation) == -np.inf)) == set(made)
        made.append(values(observation))
        observation = env.step(made[-1])[0]
    env.close()
    assert sorted(made) == list(range(8))


def test_masks_of_combined_actions_with_parts_of_observations(tmp_path):
    """Stable-Baselines-Team/stable-baselines3-contrib 149."""
    mask = np.array([1, 0, 0, 1, 1, 0])  # of (0, 0), (0, 1), (1, 0), ...

    class Both(World):
        def __init__(self):
            super().__init__(spaces.Dict(image=images(12, 12), numbers=BOX), spaces.MultiDiscrete([3, 2]))

        def reset(self, *, seed=None, options=None):
            return super().reset(seed=seed)[0], {"action_mask": mask}

        def step(self, action):
            assert mask[2 * action[0] + action[1]]
            return *super().step(action)[:4], {"action_mask": mask}

    trained(tmp_path, Both)
    assert pydqn.evaluate(tmp_path, 1, make_env=Both) == [7.0]


def test_a_mask_in_the_observation_is_explained(tmp_path):
    """RLlib's and PettingZoo's habit."""
    space = spaces.Dict(observation=BOX, action_mask=spaces.MultiBinary(3))
    with pytest.warns(UserWarning, match=r"a part 'action_mask' in its observations.*info\['action_mask'\]"):
        trained(tmp_path, lambda: World(space))


def test_functions_inside_functions_in_processes(tmp_path):
    """What pickle refuses (thu-ml/tianshou 1153, pfnet/pfrl 180)."""
    length = 5

    class Local(World):
        def step(self, action):
            return *super().step(action)[:2], self.steps == length, False, {}

    assert set(trained(tmp_path, lambda: Local(), env_workers=2).returns) == {5.0}


def test_errors_in_processes_are_those_of_the_environment(tmp_path):
    """Other trainers report the end of a pipe (DeckardAgent/deckard 1, hill-a/stable-baselines 988)."""

    def broken(observation, steps):
        raise OSError("the simulator does not answer")

    with pytest.raises(RuntimeError, match=r"env index \d .*step 1: step\(\) failed: OSError: the simulator does not"):
        trained(tmp_path, lambda: World(step=broken), env_workers=2)


def test_episodes_without_an_end(tmp_path):
    """They are learned from; evaluations end them and say so."""
    endless = lambda: World(step=lambda observation, steps: (observation, 1.0, False, False, {}))  # noqa: E731
    assert trained(tmp_path, endless).returns == []
    with pytest.warns(UserWarning, match="an evaluation cut an episode after 50; its return so far counts"):
        returns = pydqn.evaluate(tmp_path, 1, make_env=endless, evaluation_max_episode_steps=50)
    assert returns == [50.0]


def test_arguments_of_an_environment(tmp_path):
    """env_kwargs reach training, evaluation and the policy's environment."""
    lengths = []

    def make_env(length=7, shape=(3,)):
        lengths.append(length)
        return World(spaces.Box(-1, 1, tuple(shape)), step=lambda obs, steps: (obs, 1.0, steps == length, False, {}))

    trained(tmp_path, make_env, env_kwargs={"length": 3, "shape": [2, 2]})
    assert pydqn.evaluate(tmp_path, 1, make_env=make_env) == [3.0]
    assert pydqn.load_policy(tmp_path, make_env=make_env).env().reset()[0].shape == (1, 2, 2)
    assert set(lengths) == {3}


def test_weights_of_another_task(tmp_path):
    """What fits is taken over; what does not is named."""
    trained(tmp_path / "one", World)
    with pytest.warns(
        UserWarning, match=r"init_weights: 2 of 4 tensors are those of .*; not advantage.2.bias .here .5,., there .3,.."
    ):
        trained(tmp_path / "other", lambda: World(action_space=spaces.Discrete(5)), init_weights=str(tmp_path / "one"))

"""Actions of all kinds of spaces, and action masks: they reach acting, exploration and both targets."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from pydqn import Config, Learner, LearnerSettings, evaluate, resume, train
from pydqn.envs.actions import Actions
from pydqn.envs.make import make_envs
from pydqn.evaluation.build import network_for, replay_settings
from pydqn.learning.policy import Policy
from pydqn.learning.records import MASKED
from pydqn.replay.frames import FrameReplay

QUICK = Config(
    env_id="Corridor-v0",
    **{"network": "auto", "hidden_units": (32,), "stack": 1, "num_envs": 2, "device": "cpu", "torch_threads": 1},
    **{"learning_starts_steps": 50, "batch_size": 16, "replay_capacity_frames": 2_000, "checkpoint_every_steps": 0},
)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Discrete(5),
        spaces.Discrete(5, start=-2),
        spaces.MultiDiscrete([3, 1, 4]),
        spaces.MultiDiscrete([3, 2], start=[1, -5]),
        spaces.MultiDiscrete([[3, 2], [2, 2]]),
        spaces.MultiBinary(4),
        spaces.MultiBinary((2, 3)),
        spaces.Tuple((spaces.Discrete(3), spaces.Discrete(2, start=5))),
        spaces.Dict(gear=spaces.Discrete(3), keys=spaces.MultiBinary(2), more=spaces.Tuple((spaces.Discrete(2),))),
    ],
    ids=str,
)
def test_every_action_has_one_number(space):
    actions = Actions("x", space)
    found = [actions.of(np.int64(number)) for number in range(actions.count)]
    assert all(space.contains(action) for action in found)
    flat = [tuple(spaces.flatten(space, action)) for action in found]
    assert len(set(flat)) == actions.count == len(set(actions.names))
    if not isinstance(space, spaces.Discrete):
        assert flat[0] != flat[1]
        assert actions.described.startswith(f"{actions.count} combinations of ")
    if isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim == 1:
        ranges = [range(start, start + size) for start, size in zip(space.start, space.nvec, strict=True)]
        assert [tuple(action) for action in found] == list(itertools.product(*ranges))


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (spaces.MultiDiscrete([17] * 3), "x has 4,913 combinations of actions .*; a network has at most 4,096"),
        (spaces.Box(-1, 1, (2,)), "x has Box.* actions; DQN needs Discrete ones, or MultiDiscrete"),
        (spaces.Dict(a=spaces.Discrete(2), b=spaces.Box(0, 1)), "x has Dict.* actions; DQN needs"),
        (spaces.Tuple(()), "x has Tuple.* actions; DQN needs"),
        (spaces.Text(3), "x has Text.* actions; DQN needs"),
    ],
)
def test_actions_that_cannot_be_numbered(space, message):
    with pytest.raises(ValueError, match=f"^env_id: {message}.*ActionWrapper"):
        Actions("x", space)


class Corridor(gymnasium.Env):
    """Ten steps from a start to a goal. In each state one action of ten leads on, the others end the episode.

    With masks, that action and one that stays where it is are allowed.
    """

    observation_space = spaces.Box(0, 1, (10,), np.float32)
    action_space = spaces.Discrete(10)

    def __init__(self, masks="info", render_mode=None):
        self._masks = masks

    def _right(self):
        return 7 * self._place % 10

    def action_masks(self):
        mask = np.zeros(10, np.int8)
        mask[[self._right(), (self._right() + 1) % 10]] = 1
        return mask

    def _info(self):
        return {"action_mask": self.action_masks()} if self._masks == "info" else {}

    def _seen(self):
        return np.eye(11, dtype=np.float32)[self._place, :10]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._place = 0
        return self._seen(), self._info()

    def step(self, action):
        assert action in range(10)
        if self._masks and not self.action_masks()[action]:
            raise AssertionError(f"action {action} is not allowed")
        if action == self._right():
            self._place += 1
        elif action != (self._right() + 1) % 10:
            return self._seen(), 0.0, True, False, self._info()
        end = self._place == 10
        return self._seen(), float(end), end, False, self._info()


class Unmasked(Corridor):
    """The same task without masks."""

    action_masks = None

    def __init__(self, render_mode=None):
        super().__init__(masks="")


@pytest.fixture(autouse=True)
def corridors():
    gymnasium.register("Corridor-v0", entry_point=Corridor, max_episode_steps=30)
    gymnasium.register("Unmasked-v0", entry_point=Unmasked, max_episode_steps=30)
    yield
    gymnasium.registry.pop("Corridor-v0")
    gymnasium.registry.pop("Unmasked-v0")


@pytest.mark.parametrize("masks", ["info", "method"])
@pytest.mark.parametrize("dueling", [False, True])
def test_only_allowed_actions_are_taken(tmp_path, masks, dueling):
    """The environment refuses all others: in random exploration, while learning, and in evaluation."""
    config = replace(QUICK, env_kwargs={"masks": masks}, total_steps=800, dueling=dueling, double=dueling)
    assert train(config, tmp_path).steps >= 800
    assert json.loads((tmp_path / "environment.json").read_text())["inputs"].endswith(", actions masked")
    assert len(evaluate(tmp_path, 4, evaluation_epsilon=0.5)) == 4
    assert resume(tmp_path, total_steps=900).steps >= 900


def test_a_task_that_masks_make_learnable(tmp_path):
    """Random play reaches the goal about once in 10**10 episodes without masks."""
    settings = {"total_steps": 4_000, "double": True, "learning_rate": 3e-3, "train_period_steps": 1.0}
    settings |= {"epsilon_decay_steps": 2_000, "target_update_period": 50, "gamma": 0.95}
    train(replace(QUICK, **settings), tmp_path / "masked")
    train(replace(QUICK, env_id="Unmasked-v0", **settings), tmp_path / "unmasked")
    assert np.mean(evaluate(tmp_path / "masked", 10, evaluation_epsilon=0.0)) == 1
    assert np.mean(evaluate(tmp_path / "unmasked", 10, evaluation_epsilon=0.0)) == 0


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("n_step", [1, 3])
def test_targets_use_the_masks_of_their_own_states(double, n_step):
    """Against a reference that masks values by the state: with n-step returns, priorities and truncated episodes."""
    config = replace(QUICK, n_step=n_step, prioritized=True, double=double)
    envs = make_envs(config, 2, 0)
    replay = FrameReplay(400, **replay_settings(config, envs), seed=0)
    network, generator = network_for(config, envs, 3), np.random.default_rng(0)
    policy = Policy(network, torch.device("cpu"))
    slot = replay.next_slot()
    envs.reset(slot)
    no, yes, zeros = np.zeros(2, bool), np.ones(2, bool), np.zeros(2, np.int64)
    replay.append(slot, zeros, zeros, no, no, yes)
    for _ in range(150):
        action = Policy.choose(policy.values(replay.latest()), 0.5, generator)
        envs.send(action)
        slot = replay.next_slot()
        step = envs.recv(slot)
        replay.append(slot, action, step.reward, step.terminated, step.truncated, step.first)
    envs.close()
    batch = replay.sample(64)
    learner = Learner(network, LearnerSettings(batch_size=64, double=double), "cpu", batch)
    with torch.no_grad():  # another target network, else double Q-learning would make no difference
        for parameter in learner.target.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
        online = network(torch.from_numpy(batch.obs)).numpy().copy()
        target = learner.target(torch.from_numpy(batch.next_obs)).numpy().copy()
        chooser = network(torch.from_numpy(batch.next_obs)).numpy().copy()
    expected, ends = [], 0
    for i in range(64):
        seen = batch.next_obs[i, -1, :40].view(np.float32)
        right = 7 * (int(seen.argmax()) if seen.any() else 10) % 10  # the goal is place 10
        allowed = [right, (right + 1) % 10]
        by = chooser if double else target
        assert sorted(np.flatnonzero(target[i] != MASKED)) == sorted(allowed)
        best = max(allowed, key=lambda a: by[i, a])
        ends += batch.discount[i] == 0
        expected.append(abs(online[i, batch.action[i]] - batch.reward[i] - batch.discount[i] * target[i, best]))
    learner.update(batch)
    np.testing.assert_allclose(learner.td_errors(), expected, rtol=1e-4, atol=1e-6)
    statistics = learner.statistics()
    assert np.isfinite(statistics.samples["q_values"]).all()
    assert statistics.samples["q_values"].min() > -1e9


def test_random_actions_are_uniform_among_those_allowed():
    values = np.full((30_000, 4), MASKED, np.float32)
    values[:, [1, 3]] = 0
    values[10_000:, 2] = 0
    chosen = Policy.choose(values, 1.0, np.random.default_rng(0))
    np.testing.assert_allclose(np.bincount(chosen[:10_000], minlength=4) / 10_000, [0, 0.5, 0, 0.5], atol=0.02)
    np.testing.assert_allclose(np.bincount(chosen[10_000:], minlength=4) / 20_000, [0, 1 / 3, 1 / 3, 1 / 3], atol=0.02)


def test_where_no_action_is_allowed_some_action_comes():
    """As at the end of an episode, where the action has no effect."""
    assert Policy.choose(np.full((2, 3), MASKED, np.float32), 0.5, np.random.default_rng(0)).tolist() == [0, 0]


class Wrong(gymnasium.Env):
    """Gives another mask at its third step."""

    observation_space = spaces.Box(0, 1, (2,), np.float32)
    action_space = spaces.Discrete(3)

    def __init__(self, masks, render_mode=None):
        self._given = masks

    def _info(self):
        mask = self._given[min(self._steps, len(self._given) - 1)]
        return {} if mask is None else {"action_mask": np.array(mask)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._steps = 0
        return np.zeros(2, np.float32), self._info()

    def step(self, action):
        self._steps += 1
        return np.zeros(2, np.float32), 0.0, self._steps == 5, False, self._info()


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ([[1, 1, 0], [0, 0, 0]], "gave an action mask that allows no action, though the episode goes on"),
        ([[1, 1, 0], [1, 1]], r"gave an action mask of shape \(2,\), dtype int64; expected 3 booleans"),
        ([[1, 1, 0], [1, 2, 0]], r"gave an action mask of shape \(3,\).*0 or 1"),
        ([[1, 1, 0], None], "gave no action mask, though it gave one at its first reset"),
        ([None, [1, 1, 1]], "gave an action mask, though it gave none at its first reset"),
    ],
)
def test_wrong_masks_are_named(tmp_path, masks, message):
    gymnasium.register("Wrong-v0", entry_point=Wrong, kwargs={"masks": masks}, disable_env_checker=True)
    try:
        with pytest.raises(RuntimeError, match=rf"^env_id: Wrong-v0, env index 0 \(seed \d+\), step 1: {message}"):
            train(replace(QUICK, env_id="Wrong-v0", total_steps=100), tmp_path)
    finally:
        gymnasium.registry.pop("Wrong-v0")


def test_a_mask_without_actions_at_the_end_of_an_episode(tmp_path):
    masks = [[1, 1, 0], [0, 1, 1], [1, 0, 0], [1, 1, 1], [0, 1, 0], [0, 0, 0]]
    gymnasium.register("Wrong-v0", entry_point=Wrong, kwargs={"masks": masks}, disable_env_checker=True)
    try:
        assert train(replace(QUICK, env_id="Wrong-v0", total_steps=200), tmp_path).updates > 0
    finally:
        gymnasium.registry.pop("Wrong-v0")


class Keys(gymnasium.Env):
    """The reward is 1 for the combination (1, 0, 2)."""

    observation_space = spaces.Box(0, 1, (2,), np.float32)
    action_space = spaces.MultiDiscrete([2, 2, 3])

    def __init__(self, render_mode=None):
        pass

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._steps = 0
        return np.ones(2, np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self._steps += 1
        return np.ones(2, np.float32), float(tuple(action) == (1, 0, 2)), self._steps == 10, False, {}


def test_combinations_are_learned_and_recorded(tmp_path):
    gymnasium.register("Keys-v0", entry_point=Keys)
    try:
        settings = {"total_steps": 1_500, "epsilon_decay_steps": 800, "learning_rate": 3e-3, "gamma": 0.5}
        train(replace(QUICK, env_id="Keys-v0", **settings), tmp_path)
        assert np.mean(evaluate(tmp_path, 2, evaluation_epsilon=0.0)) == 10
        recorded = json.loads((tmp_path / "environment.json").read_text())["actions"]
        assert recorded.startswith("12 combinations of MultiDiscrete([2 2 3])")
    finally:
        gymnasium.registry.pop("Keys-v0")

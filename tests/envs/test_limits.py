"""Episodes end where the environment ends them, or a setting that says so; nothing is cut without a word."""

from __future__ import annotations

import warnings
from typing import ClassVar

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from pydqn import Config, evaluate, train
from pydqn.envs.tasks import episode_limit
from pydqn.evaluation.evaluate import score
from pydqn.evaluation.play import PlayedEpisode, play_episode

LATE = 12_000  # steps after which the only reward comes


class Late(gymnasium.Env):
    """One reward, when the episode ends after `end` steps; no limit of steps is registered."""

    action_space = spaces.Discrete(2)
    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 30}

    def __init__(self, end, numbered, render_mode=None):
        self.render_mode = render_mode
        self._end, self._numbered = end, numbered
        self.observation_space = spaces.Discrete(1) if numbered else spaces.Box(-1, 1, (1,), np.float32)

    def _observation(self):
        return 0 if self._numbered else np.zeros(1, np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._steps = 0
        return self._observation(), {}

    def step(self, action):
        self._steps += 1
        over = self._steps == self._end
        return self._observation(), float(over), over, False, {}

    def render(self):
        return np.zeros((8, 8, 3), np.uint8)


@pytest.fixture(autouse=True)
def registered():
    for numbered in (False, True):
        for end in (LATE, 0):
            gymnasium.register(f"Late{end}{numbered}-v0", entry_point=Late, kwargs={"end": end, "numbered": numbered})
    yield
    for env_id in [env_id for env_id in gymnasium.registry if env_id.startswith("Late")]:
        del gymnasium.registry[env_id]


def settings(end, numbered=False, **options):
    return Config(
        env_id=f"Late{end}{numbered}-v0",
        **{
            "num_envs": 1,
            "network": "mlp",
            "hidden_units": (4,),
            "stack": 1,
            "learning_starts_steps": 20_000,
            "replay_capacity_frames": 1_000,
            "checkpoint_every_steps": 0,
            "log_every_steps": 10_000,
            "evaluation_epsilon": 0.0,
            "device": "cpu",
            "torch_threads": 1,
            "agent": "tabular" if numbered else "dqn",
            **options,
        },
    )


@pytest.mark.parametrize("numbered", [False, True])
def test_a_reward_after_12_000_steps(tmp_path, numbered):
    options = {"evaluation_every_steps": LATE, "evaluation_episodes": 1} if numbered else {}
    result = train(settings(LATE, numbered, total_steps=LATE + 10, **options), tmp_path)
    assert result.returns == [1.0]
    assert evaluate(tmp_path, 1) == [1.0]


@pytest.mark.parametrize("numbered", [False, True])
def test_a_policy_that_never_ends_is_cut_by_a_setting_that_says_so(tmp_path, numbered):
    """In evaluation, in tests while training, and in an episode that is watched; training itself goes on."""
    every = {"evaluation_every_steps": 10, "evaluation_episodes": 2}
    config = settings(0, numbered, total_steps=300, evaluation_max_episode_steps=70, **every)
    message = "evaluation_max_episode_steps: .* no limit of steps of its own.* cut after 70"
    with pytest.warns(UserWarning, match=message):
        assert train(config, tmp_path).returns == []
    with pytest.warns(UserWarning, match=message):
        played = score(tmp_path, 2)
    assert played.returns == [0.0, 0.0]
    assert played.settings["max_episode_steps"] == 70
    with pytest.warns(UserWarning, match=message):
        *scenes, game = play_episode(tmp_path)
    assert len(scenes) == 70
    assert isinstance(game, PlayedEpisode)


def test_a_limit_that_somebody_set_needs_no_warning(tmp_path):
    config = settings(0, total_steps=100, max_episode_steps=30, evaluation_max_episode_steps=7)
    assert train(config, tmp_path).returns == [0.0] * 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert score(tmp_path, 1).settings["max_episode_steps"] == 30


def test_a_published_model_without_a_limit(tmp_path):
    """A table of zeros walks into the wall of CliffWalking for ever: its tests are cut, its training is not."""
    config = Config(
        **{"agent": "tabular", "env_id": "CliffWalking-v1", "num_envs": 1, "total_steps": 30, "log_every_steps": 10},
        **{"evaluation_every_steps": 1, "evaluation_episodes": 1, "evaluation_max_episode_steps": 20},
        **{"learning_rate": 1e-9, "evaluation_epsilon": 0.0, "epsilon_start": 0.0, "epsilon_end": 0.0},
    )
    with pytest.warns(UserWarning, match="evaluation_max_episode_steps: CliffWalking-v1 .* cut after 20"):
        assert train(config, tmp_path).returns == []


@pytest.mark.parametrize("numbered", [False, True])
@pytest.mark.parametrize("every", [100, 50, 20])
def test_a_game_longer_than_the_steps_between_checkpoints_is_named(tmp_path, numbered, every):
    config = settings(50, numbered, total_steps=200, checkpoint_every_steps=every)
    gymnasium.register("Late50False-v0", entry_point=Late, kwargs={"end": 50, "numbered": False})
    gymnasium.register("Late50True-v0", entry_point=Late, kwargs={"end": 50, "numbered": True})
    if every < 50:
        with pytest.warns(UserWarning, match="checkpoint_every_steps: an episode of Late50.* all 20 steps between"):
            assert train(config, tmp_path).returns == []
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert len(train(config, tmp_path).returns) >= 2


@pytest.mark.parametrize("num_envs", [1, 2])
def test_checkpoints_at_the_end_of_each_game_cut_none(tmp_path, num_envs):
    gymnasium.register("Late50False-v0", entry_point=Late, kwargs={"end": 50, "numbered": False})
    options = {"num_envs": num_envs, "learning_starts_steps": 20, "batch_size": 4}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = train(settings(50, total_steps=400, checkpoint_every_episodes=1, **options), tmp_path)
    assert len(result.returns) == 8


def test_an_environment_whose_games_are_cut_at_the_end_of_another_ones_is_told(tmp_path):
    ends = iter([50, 70])
    gymnasium.register("Late50False-v0", entry_point=lambda render_mode=None: Late(next(ends), False, render_mode))
    config = settings(50, total_steps=300, num_envs=2, checkpoint_every_episodes=1)
    with pytest.warns(UserWarning, match="^checkpoint_every_episodes: an episode of Late50.* all 50 steps between"):
        assert len(train(config, tmp_path).returns) == 3


@pytest.mark.parametrize(
    ("env_id", "options", "limit"),
    [
        ("CartPole-v1", {}, 500),
        ("CartPole-v1", {"max_episode_steps": 7}, 7),
        ("CliffWalking-v1", {}, None),
        ("ALE/Pong-v5", {}, 27_000),
        ("ALE/Pong-v5", {"max_episode_steps": 9}, 9),
        ("ALE/Pong-v5", {"max_episode_steps": 30_000}, 27_000),
        ("ALE/Pong-v5", {"max_episode_steps": 30_000, "frame_skip": 2}, 30_000),
        ("ALE/Pong-v5", {"max_episode_steps": 9, "max_episode_frames": 3}, 1),
    ],
)
def test_limits(env_id, options, limit):
    assert episode_limit(Config(env_id=env_id, **options)) == limit

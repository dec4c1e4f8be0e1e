"""Episodes end by the environment or by a setting; a warning names every episode that is cut off otherwise."""

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

LATE = 12_000  # steps before the only reward


class Late(gymnasium.Env):
    """One reward, at the end of an episode of `end` steps. No limit of steps is registered."""

    action_space = spaces.Discrete(2)
    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 30}

    def __init__(self, end, discrete, render_mode=None):
        self.render_mode = render_mode
        self._end, self._discrete = end, discrete
        self.observation_space = spaces.Discrete(1) if discrete else spaces.Box(-1, 1, (1,), np.float32)

    def _observation(self):
        return 0 if self._discrete else np.zeros(1, np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._steps = 0
        return self._observation(), {}

    def step(self, action):
        self._steps += 1
        ended = self._steps == self._end
        return self._observation(), float(ended), ended, False, {}

    def render(self):
        return np.zeros((8, 8, 3), np.uint8)


@pytest.fixture(autouse=True)
def registered():
    for discrete in (False, True):
        for end in (LATE, 50, 0):
            gymnasium.register(f"Late{end}{discrete}-v0", entry_point=Late, kwargs={"end": end, "discrete": discrete})
    yield
    for env_id in [env_id for env_id in gymnasium.registry if env_id.startswith("Late")]:
        del gymnasium.registry[env_id]


def settings(end, discrete=False, **options):
    return Config(
        env_id=f"Late{end}{discrete}-v0",
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
            "agent": "tabular" if discrete else "dqn",
            **options,
        },
    )


@pytest.mark.parametrize("discrete", [False, True])
def test_a_reward_after_12_000_steps(tmp_path, discrete):
    options = {"evaluation_every_steps": LATE, "evaluation_episodes": 1} if discrete else {}
    result = train(settings(LATE, discrete, total_steps=LATE + 10, **options), tmp_path)
    assert result.returns == [1.0]
    assert evaluate(tmp_path, 1) == [1.0]


@pytest.mark.parametrize("discrete", [False, True])
def test_a_policy_that_never_ends_an_episode_is_cut_off_with_a_warning(tmp_path, discrete):
    """In evaluation, also while training, and when an episode is played; training itself does not cut episodes."""
    every = {"evaluation_every_steps": 10, "evaluation_episodes": 2}
    config = settings(0, discrete, total_steps=300, evaluation_max_episode_steps=70, **every)
    message = "evaluation_max_episode_steps: .* no limit of steps of its own.* cut an episode after 70"
    with pytest.warns(UserWarning, match=message):
        assert train(config, tmp_path).returns == []
    with pytest.warns(UserWarning, match=message):
        played = score(tmp_path, 2)
    assert played.returns == [0.0, 0.0]
    assert played.settings["max_episode_steps"] == 70
    with pytest.warns(UserWarning, match=message):
        *steps, episode = play_episode(tmp_path)
    assert len(steps) == 70
    assert isinstance(episode, PlayedEpisode)


def test_a_limit_in_the_config_needs_no_warning(tmp_path):
    config = settings(0, total_steps=100, max_episode_steps=30, evaluation_max_episode_steps=7)
    assert train(config, tmp_path).returns == [0.0] * 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert score(tmp_path, 1).settings["max_episode_steps"] == 30


def test_a_published_model_without_a_limit(tmp_path):
    """A table of zeros walks into the wall of CliffWalking for ever: evaluation cuts episodes, training does not."""
    config = Config(
        **{"agent": "tabular", "env_id": "CliffWalking-v1", "num_envs": 1, "total_steps": 30, "log_every_steps": 10},
        **{"evaluation_every_steps": 1, "evaluation_episodes": 1, "evaluation_max_episode_steps": 20},
        **{"learning_rate": 1e-9, "evaluation_epsilon": 0.0, "epsilon_start": 0.0, "epsilon_end": 0.0},
    )
    with pytest.warns(UserWarning, match="evaluation_max_episode_steps: CliffWalking-v1 .* cut an episode after 20"):
        assert train(config, tmp_path).returns == []


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("every", [100, 50, 20])
def test_a_warning_names_episodes_longer_than_the_steps_between_checkpoints(tmp_path, discrete, every):
    config = settings(50, discrete, total_steps=200, checkpoint_every_steps=every)
    if every < 50:
        with pytest.warns(UserWarning, match="checkpoint_every_steps: an episode of Late50.* all 20 steps between"):
            assert train(config, tmp_path).returns == []
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert len(train(config, tmp_path).returns) >= 2


@pytest.mark.parametrize("num_envs", [1, 2])
def test_checkpoints_at_the_end_of_each_episode_cut_none_off(tmp_path, num_envs):
    options = {"num_envs": num_envs, "learning_starts_steps": 20, "batch_size": 4}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = train(settings(50, total_steps=400, checkpoint_every_episodes=1, **options), tmp_path)
    assert len(result.returns) == 8


def test_a_warning_names_an_environment_whose_episodes_never_end_between_checkpoints(tmp_path):
    ends = iter([50, 70])
    del gymnasium.registry["Late50False-v0"]
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

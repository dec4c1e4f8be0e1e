"""One environment as a Gymnasium environment whose observations are stacks of frames, as networks get them."""

from __future__ import annotations

from typing import Any, SupportsFloat

import gymnasium
import numpy as np
from numpy.typing import NDArray

from pydqn.config import Config
from pydqn.envs.make import make_envs
from pydqn.envs.spaces import numbers
from pydqn.evaluation.build import replay_settings
from pydqn.evaluation.play import start_episodes
from pydqn.replay.frames import FrameReplay


class FramedEnv(gymnasium.Env[NDArray[Any], Any]):
    """An environment of a config: with its preprocessing, its limit of steps, numbered actions, and stacks of frames.

    Observations are (stack, *frame_shape), the oldest frame first.

    Args:
        config: of the run.
        seed: of the first episode, and of all that are reset without a seed.
        render: whether images are needed.

    Raises:
        ValueError: see `make_envs`.
    """

    def __init__(self, config: Config, seed: int = 0, *, render: bool = False) -> None:
        self._envs = make_envs(config, 1, seed, render=render)
        self._replay = FrameReplay(config.stack + config.n_step, **replay_settings(config, self._envs))  # stacks frames
        self._seed: int | None = seed  # until the first reset
        self.render_mode = "rgb_array" if render else None
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": self._envs.fps}
        self.action_names = self._envs.action_names
        self.observation_space = numbers((config.stack, *self._envs.frame_shape), self._envs.dtype)
        self.action_space = gymnasium.spaces.Discrete(self._envs.num_actions)
        self._over = True

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[Any], dict[str, Any]]:
        """Start an episode. Later ones without a seed draw theirs from the last seed."""
        seed, self._seed = self._seed if seed is None else seed, None
        super().reset(seed=seed)
        start_episodes(self._envs, self._replay, int(self.np_random.integers(2**31)) if seed is None else seed)
        self._over = False
        return self._replay.latest()[0].copy(), {}

    def step(self, action: Any) -> tuple[NDArray[Any], SupportsFloat, bool, bool, dict[str, Any]]:
        """Take one action, given by its number."""
        if self._over:
            raise RuntimeError("step: the episode is over, or none has begun; call reset first")
        actions = np.array([action], np.int64)
        self._envs.send(actions)
        slot = self._replay.next_slot()
        step = self._envs.recv(slot)
        self._replay.append(slot, actions, step.reward, step.terminated, step.truncated, step.first)
        self._over = bool(step.episodes)  # not after a lost life
        terminated, truncated = (bool(flag[0]) and self._over for flag in (step.terminated, step.truncated))
        return self._replay.latest()[0].copy(), float(step.reward[0]), terminated, truncated, {}

    def render(self) -> NDArray[np.uint8]:
        """Return the image that people see, (H, W, 3) uint8."""
        return self._envs.image()

    def close(self) -> None:
        """Release the environment."""
        self._envs.close()

"""One environment as a Gymnasium environment whose observations are stacked frames, as networks get them."""

from __future__ import annotations

from typing import Any, SupportsFloat

import gymnasium
import numpy as np
from numpy.typing import NDArray

from pydqn.config import Config
from pydqn.envs.make import make_envs


class FramedEnv(gymnasium.Env[NDArray[Any], Any]):
    """An environment of a config: with its preprocessing, its limit of steps, numbered actions, and stacks of frames.

    Observations are (stack, *frame_shape), the oldest frame first.

    Args:
        config: of the run.
        seed: of the first episodes.
        render: whether images are needed.

    Raises:
        ValueError: see `make_envs`.
    """

    def __init__(self, config: Config, seed: int = 0, *, render: bool = False) -> None:
        self._envs = make_envs(config, 1, seed, render=render)
        self.render_mode = "rgb_array" if render else None
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": self._envs.fps}
        self.action_names = self._envs.action_names
        self._stack, self._first_padding = config.stack, config.padding == "first"
        shape, dtype = (config.stack, *self._envs.frame_shape), self._envs.dtype
        low, high = (0, 255) if dtype == np.uint8 else (-np.inf, np.inf)
        self.observation_space = gymnasium.spaces.Box(low, high, shape, dtype.type)
        self.action_space = gymnasium.spaces.Discrete(self._envs.num_actions)
        self._frames = np.zeros(shape, dtype)
        self._slot = np.zeros((1, *self._envs.frame_shape), dtype)
        self._over = True

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[Any], dict[str, Any]]:
        """Start an episode. Without a seed, it is drawn from the last one."""
        super().reset(seed=seed)
        self._envs.reset(self._slot, int(self.np_random.integers(2**31)) if seed is None else seed)
        self._start()
        return self._frames.copy(), {}

    def step(self, action: Any) -> tuple[NDArray[Any], SupportsFloat, bool, bool, dict[str, Any]]:
        """Take one action, given by its number."""
        if self._over:
            raise RuntimeError("step: the episode is over, or none has begun; call reset first")
        self._envs.send(np.array([action], np.int64))
        step = self._envs.recv(self._slot)
        if step.first[0]:  # the start of an Atari game that begins with actions of its own
            self._start()
        else:
            self._frames[:-1] = self._frames[1:]
            self._frames[-1] = self._slot[0]
        self._over = bool(step.episodes)
        ended = step.terminated[0] and self._over, step.truncated[0] and self._over
        return self._frames.copy(), float(step.reward[0]), bool(ended[0]), bool(ended[1]), {}

    def _start(self) -> None:
        self._frames[...] = self._slot[0] if self._first_padding else 0
        self._frames[-1] = self._slot[0]
        self._over = False

    def render(self) -> NDArray[np.uint8]:
        """Return the image that people see, (H, W, 3) uint8."""
        return self._envs.image()

    def close(self) -> None:
        """Release the environment."""
        self._envs.close()

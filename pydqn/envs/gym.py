"""Vectorised Gymnasium environments."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pydqn._util.checks import converted
from pydqn.config import Config
from pydqn.envs.base import Returns, Step
from pydqn.envs.single import discrete_actions, open_env
from pydqn.envs.spaces import frames_of

if TYPE_CHECKING:
    from pydqn.envs.checked import Checked

_LARGEST = float(np.finfo(np.float32).max)


class GymEnvs:
    """Gymnasium environments with Discrete actions, stepped one after the other in this thread.

    Observations are Box, or Discrete or a Tuple of Discrete (one-hot). Steps run inside `recv`: these environments hold
    the GIL, so nothing could run at the same time. Resets follow the end of an episode as in Gymnasium's
    `SyncVectorEnv`. Infos are ignored.

    Every reward must fit float32, in which replay buffers hold it. This holds for rewards that are clipped afterwards,
    too: environments do not know of clipping, and evaluation does not clip.
    """

    def __init__(self, config: Config, num_envs: int, seed: int, *, render: bool = False) -> None:
        self.num_envs = num_envs
        self._seeds = _seeds(seed, num_envs)
        self._envs: list[Any] = []
        self._checked: list[Checked] = []
        with ExitStack() as failed:
            failed.callback(self.close)
            for env_index, env_seed in enumerate(self._seeds):
                env, checked = open_env(config, env_index, num_envs, env_seed, render=render and env_index == 0)
                self._envs.append(env)
                self._checked.append(checked)
                _require_same_spaces(config.env_id, env, self._envs[0], env_index)
            self._action_start, self.num_actions = discrete_actions(config.env_id, self._envs[0].action_space)
            self.action_names = tuple(map(str, range(self.num_actions)))
            frames = frames_of(config.env_id, self._envs[0].observation_space)
            self.frame_shape, self.dtype, self.input_range, self._states = frames
            failed.pop_all()
        self.fps = self._checked[0].fps
        self._action: NDArray[np.int64] = np.zeros(num_envs, np.int64)
        self._done = np.zeros(num_envs, np.bool_)
        self._returns = Returns(num_envs)

    def reset(self, out: NDArray[Any], seed: int | None = None) -> None:
        if seed is not None:
            self._seeds = _seeds(seed, self.num_envs)
        for env_index, env in enumerate(self._envs):
            observation, _ = env.reset(seed=self._seeds[env_index])
            self._write(env_index, observation, out[env_index])
        self._require_finite(out)
        self._done = np.zeros(self.num_envs, np.bool_)
        self._returns = Returns(self.num_envs)

    def send(self, action: NDArray[np.int64]) -> None:
        self._action = action + self._action_start

    def recv(self, out: NDArray[Any]) -> Step:
        first, reward = self._done, np.zeros(self.num_envs)
        terminated, truncated = np.zeros(self.num_envs, np.bool_), np.zeros(self.num_envs, np.bool_)
        for i, env in enumerate(self._envs):
            if first[i]:
                observation, _ = env.reset()
            else:
                observation, reward[i], terminated[i], truncated[i], _ = env.step(self._action[i])
            self._write(i, observation, out[i])
        self._require_finite(out)
        if np.abs(reward).max() > _LARGEST:
            i = int(np.abs(reward).argmax())
            self._checked[i].refuse(f"step() returned a reward of {reward[i]:g}, which float32 does not hold")
        self._done = terminated | truncated
        episodes = self._returns.add(reward, first, self._done)
        return Step(reward, terminated, truncated, first, episodes, int(np.count_nonzero(~first)))

    def _write(self, env_index: int, observation: Any, out: NDArray[Any]) -> None:
        """Write one environment's observation into its frame. Integers keep their values, reals may be rounded."""
        if self._states is not None:
            out[...] = 0
            out[self._states.number(observation)] = 1
            return
        try:
            out[...] = converted("observation", observation, out.dtype, rounded=True, way_on="scale it in a wrapper")
        except ValueError as error:
            self._checked[env_index].refuse(f"returned an {error}")

    def _require_finite(self, out: NDArray[Any]) -> None:
        """Refuse observations that are not finite: the weights that learn from them would show it only much later."""
        if out.dtype.kind != "f":
            return
        finite = np.isfinite(out)
        if not finite.all():
            env_index = int(np.argmin(finite.reshape(self.num_envs, -1).all(axis=1)))
            self._checked[env_index].refuse("returned an observation that is not finite")

    def image(self) -> NDArray[np.uint8]:
        return self._checked[0].image()

    def close(self) -> None:
        from pydqn.envs.checked import close

        while self._envs:
            close(self._envs.pop(), self._checked.pop())


def _seeds(seed: int, num_envs: int) -> list[int]:
    return [int(env_seed) for env_seed in np.random.SeedSequence(seed).generate_state(num_envs)]


def _require_same_spaces(env_id: str, env: Any, first: Any, env_index: int) -> None:
    for name in ("observation_space", "action_space"):
        space, expected = getattr(env, name), getattr(first, name)
        if space != expected:
            raise ValueError(
                f"env_id: {env_id}, env index {env_index}: its {name} is {space}, that of env index 0 {expected}"
            )

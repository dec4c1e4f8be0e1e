"""Gymnasium environments that step together."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pydqn._util.checks import converted
from pydqn.config import Config
from pydqn.envs.base import Returns, Step
from pydqn.envs.spaces import frames_of

if TYPE_CHECKING:
    from pydqn.envs.checked import Checked
from pydqn.envs.single import discrete_actions, open_env

_LARGEST = float(np.finfo(np.float32).max)


class GymEnvs:
    """Gymnasium environments with Discrete actions, one after the other in this thread.

    Observations are Box, or Discrete, or a Tuple of Discrete ones (one-hot). Steps run inside `recv`: such environments
    hold the GIL, so there is nothing to overlap. An episode that ended is followed by a reset at the next step, as in
    Gymnasium's `SyncVectorEnv`; infos are not looked at.
    """

    def __init__(self, config: Config, num_envs: int, seed: int, *, render: bool = False) -> None:
        self._clip = bool(config.clip_rewards)
        self.num_envs = num_envs
        self._seeds = _seeds(seed, num_envs)
        self._envs: list[Any] = []
        self._checked: list[Checked] = []
        with ExitStack() as failed:
            failed.callback(self.close)
            for index, own in enumerate(self._seeds):
                env, checked = open_env(config, index, num_envs, own, render=render and index == 0)
                self._envs.append(env)
                self._checked.append(checked)
                _require_same_spaces(config.env_id, env, self._envs[0], index)
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
        for index, env in enumerate(self._envs):
            observation, _ = env.reset(seed=self._seeds[index])
            self._write(index, observation, out[index])
        self._require_finite(out)
        self._done = np.zeros(self.num_envs, np.bool_)
        self._returns = Returns(self.num_envs)

    def send(self, action: NDArray[np.int64]) -> None:
        self._action = action + self._action_start

    def recv(self, out: NDArray[Any]) -> Step:
        first, reward = self._done, np.zeros(self.num_envs)
        terminated, truncated = np.zeros(self.num_envs, np.bool_), np.zeros(self.num_envs, np.bool_)
        for index, env in enumerate(self._envs):
            if first[index]:
                observation, _ = env.reset()
            else:
                observation, reward[index], terminated[index], truncated[index], _ = env.step(self._action[index])
            self._write(index, observation, out[index])
        self._require_finite(out)
        if np.abs(reward).max() > _LARGEST and not self._clip:
            index = int(np.abs(reward).argmax())
            self._checked[index].refuse(f"step() returned a reward of {reward[index]:g}, which float32 does not hold")
        self._done = terminated | truncated
        episodes = self._returns.add(reward, first, self._done)
        reward = np.sign(reward) if self._clip else reward
        return Step(reward, terminated, truncated, first, episodes, int(np.count_nonzero(~first)))

    def _write(self, index: int, observation: Any, out: NDArray[Any]) -> None:
        """Write one environment's observation into its own frame; integers keep their values, reals may be rounded."""
        if self._states is not None:
            out[...] = 0
            out[self._states.number(observation)] = 1
            return
        try:
            out[...] = converted("observation", observation, out.dtype, rounded=True, way_on="scale it in a wrapper")
        except ValueError as error:
            self._checked[index].refuse(f"returned an {error}")

    def _require_finite(self, out: NDArray[Any]) -> None:
        """One that is not would spoil the memory, and the weights, long after it came."""
        if out.dtype.kind != "f":
            return
        finite = np.isfinite(out)
        if not finite.all():
            index = int(np.argmin(finite.reshape(self.num_envs, -1).all(axis=1)))
            self._checked[index].refuse("returned an observation that is not finite")

    def image(self) -> NDArray[np.uint8]:
        return self._checked[0].image()

    def close(self) -> None:
        from pydqn.envs.checked import close

        while self._envs:
            close(self._envs.pop(), self._checked.pop())


def _seeds(seed: int, num_envs: int) -> list[int]:
    return [int(own) for own in np.random.SeedSequence(seed).generate_state(num_envs)]


def _require_same_spaces(env_id: str, env: Any, first: Any, index: int) -> None:
    for name in ("observation_space", "action_space"):
        own, expected = getattr(env, name), getattr(first, name)
        if own != expected:
            raise ValueError(
                f"env_id: {env_id}, env index {index}: its {name} is {own}, that of env index 0 {expected}"
            )

"""Vectorised Gymnasium environments."""

from __future__ import annotations

import math
import time
import warnings
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pydqn.config import Config
from pydqn.envs.actions import Actions, checked_mask, mask_of
from pydqn.envs.base import Returns, Step
from pydqn.envs.single import open_env
from pydqn.envs.spaces import Encoder

if TYPE_CHECKING:
    from pydqn.envs.checked import Checked

_LARGEST = float(np.finfo(np.float32).max)


class GymEnvs:
    """Gymnasium environments, stepped one after the other in this thread.

    See `Encoder` for observations and `Actions` for actions. Steps run inside `recv`: these environments hold the GIL,
    so nothing could run at the same time. Resets follow the end of an episode as in Gymnasium's `SyncVectorEnv`. Of
    infos, only action masks are used (see `mask_of`).

    Every reward must fit float32, in which replay buffers hold it. This holds for rewards that are clipped afterwards,
    too: environments do not know of clipping, and evaluation does not clip.
    """

    stepping = ""

    def __init__(
        self,
        config: Config,
        num_envs: int,
        seed: int,
        *,
        render: bool = False,
        share: range | None = None,
        most_seconds: float = math.inf,
    ) -> None:
        """Make `num_envs` environments, or a `share` of them by index.

        If a step of the first one takes more than `most_seconds`, the others are not made: `step_seconds` says how long
        it takes, and these environments can only be closed.
        """
        self._all, self._share = num_envs, range(num_envs) if share is None else share
        self.num_envs = len(self._share)
        self._seeds = self._seeds_of(seed)
        self._envs: list[Any] = []
        self._checked: list[Checked] = []
        with ExitStack() as failed:
            failed.callback(self.close)
            self._open(config, self._share[0], render)
            self._actions = Actions(config.env_id, self._envs[0].action_space)
            self.num_actions, self.action_names = self._actions.count, self._actions.names
            self.actions_described = self._actions.described
            self._masked = False
            encoder = self._encoder(config)  # before the first reset: a space that does not fit is the first error
            # Whether there are masks is known after a reset. It is the first one: `reset` takes its observation.
            observation, info = self._envs[0].reset(seed=self._seeds[0])
            self._first_reset: tuple[Any, Any] | None = observation, info
            self._takes_masks = config.agent != "tabular"  # tables know numbered states alone
            self._masked = self._takes_masks and mask_of(self._envs[0], info) is not None
            if self._takes_masks and not self._masked and 0 in self._share:
                _warn_of_mask_in(config.env_id, self._envs[0].observation_space)
            self._write_observation = self._encoder(config) if self._masked else encoder
            self.layout = self._write_observation.layout
            self.frame_shape, self.dtype = self.layout.frame_shape, self.layout.dtype
            self.step_seconds = 0.0 if most_seconds == math.inf else self._measured(info)
            for env_index in self._share[1:] if self.step_seconds <= most_seconds else ():
                self._open(config, env_index, render)
            failed.pop_all()
        self.fps = self._checked[0].fps
        self._action: Any = self._actions.of_all(np.zeros(self.num_envs, np.int64))
        self._done = np.zeros(self.num_envs, np.bool_)
        self._returns = Returns(self.num_envs)

    def reset(self, out: NDArray[Any], seed: int | None = None) -> None:
        seeds = self._seeds if seed is None else self._seeds_of(seed)
        first = self._first_reset if seeds == self._seeds else None
        self._seeds, self._first_reset = seeds, None
        for env_index, env in enumerate(self._envs):
            observation, info = first if first is not None and not env_index else env.reset(seed=seeds[env_index])
            self._write(env_index, observation, info, out[env_index], required=True)
        self._require_finite(out)
        self._done = np.zeros(self.num_envs, np.bool_)
        self._returns = Returns(self.num_envs)

    def send(self, action: NDArray[np.int64]) -> None:
        self._action = self._actions.of_all(action)

    def recv(self, out: NDArray[Any]) -> Step:
        first, reward = self._done, np.zeros(self.num_envs)
        terminated, truncated = np.zeros(self.num_envs, np.bool_), np.zeros(self.num_envs, np.bool_)
        for i, env in enumerate(self._envs):
            if first[i]:
                observation, info = env.reset()
            else:
                observation, reward[i], terminated[i], truncated[i], info = env.step(self._action[i])
            self._write(i, observation, info, out[i], required=not terminated[i])
        self._require_finite(out)
        if np.abs(reward).max() > _LARGEST:
            i = int(np.abs(reward).argmax())
            self._checked[i].refuse(f"step() returned a reward of {reward[i]:g}, which float32 does not hold")
        self._done = terminated | truncated
        episodes = self._returns.add(reward, first, self._done)
        return Step(reward, terminated, truncated, first, episodes, int(np.count_nonzero(~first)))

    def _seeds_of(self, seed: int) -> list[int]:
        seeds = np.random.SeedSequence(seed).generate_state(self._all)
        return [int(seeds[env_index]) for env_index in self._share]

    def _open(self, config: Config, env_index: int, render: bool) -> None:
        seed = self._seeds[env_index - self._share[0]]
        env, checked = open_env(config, env_index, self._all, seed, render=render and env_index == 0)
        self._envs.append(env)
        self._checked.append(checked)
        _require_same_spaces(config.env_id, env, self._envs[0], env_index)

    def _measured(self, info: dict[str, Any]) -> float:
        """Return the median time of at most 10 random steps of the first environment, which then is reset again."""
        env, generator = self._envs[0], np.random.default_rng(0)
        seconds: list[float] = []
        terminated = truncated = False
        while not (terminated or truncated) and len(seconds) < 10 and sum(seconds) < 0.2:
            mask = self._mask(0, info, required=True)
            allowed = np.arange(self.num_actions) if mask is None else np.flatnonzero(mask)
            action = self._actions.of(generator.choice(allowed))
            started = time.perf_counter()
            _, _, terminated, truncated, info = env.step(action)
            seconds.append(time.perf_counter() - started)
        self._first_reset = None
        return float(np.median(seconds))

    def _encoder(self, config: Config) -> Encoder:
        return Encoder(
            config.env_id,
            self._envs[0].observation_space,
            channels=config.image_channels,
            scaling=config.input_scaling,
            masked_actions=self.num_actions if self._masked else 0,
        )

    def _write(self, env_index: int, observation: Any, info: dict[str, Any], out: NDArray[Any], required: bool) -> None:
        """Write one environment's observation and mask into its frame; a mask may be `required` to allow an action."""
        mask = self._mask(env_index, info, required) if self._masked or "action_mask" in info else None
        try:
            self._write_observation.write(observation, out, mask)
        except ValueError as error:
            self._checked[env_index].refuse(f"returned an {error}")

    def _require_finite(self, out: NDArray[Any]) -> None:
        """Refuse observations that are not finite: the weights that learn from them would show it only much later.

        All at once, since this costs as much as a step of CartPole if done one by one. (The encoder checks records.)
        """
        if out.dtype.kind == "f" and not np.isfinite(out).all():
            env_index = int(np.argmin(np.isfinite(out).reshape(self.num_envs, -1).all(axis=1)))
            self._checked[env_index].refuse("returned an observation that is not finite")

    def _mask(self, env_index: int, info: dict[str, Any], required: bool) -> NDArray[np.bool_] | None:
        """Return the (A,) action mask that an environment gave, or None without masks."""
        checked = self._checked[env_index]
        if self._masked:
            try:
                return checked_mask(mask_of(self._envs[env_index], info), self.num_actions, required)
            except ValueError as error:
                checked.refuse(str(error))
        if self._takes_masks and "action_mask" in info:
            checked.refuse("gave an action mask, though it gave none at its first reset; expected one every time")
        return None

    def image(self) -> NDArray[np.uint8]:
        return self._checked[0].image()

    def close(self) -> None:
        from pydqn.envs.checked import close

        while self._envs:
            close(self._envs.pop(), self._checked.pop())


def _require_same_spaces(env_id: str, env: Any, first: Any, env_index: int) -> None:
    for name in ("observation_space", "action_space"):
        space, expected = getattr(env, name), getattr(first, name)
        if space != expected:
            raise ValueError(
                f"env_id: {env_id}, env index {env_index}: its {name} is {space}, that of env index 0 {expected}"
            )


def _warn_of_mask_in(env_id: str, space: Any) -> None:
    """Say what a part of the observations is that looks like a mask, as some other trainers expect it."""
    from gymnasium import spaces

    if isinstance(space, spaces.Dict) and "action_mask" in space.spaces:
        warnings.warn(
            f"env_id: {env_id} has a part 'action_mask' in its observations, which is an input of the network like any "
            "other. To forbid actions, return the mask in info['action_mask'] or by a method action_masks()",
            stacklevel=3,
        )

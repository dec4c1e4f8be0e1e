"""Checks of what a Gymnasium environment returns; errors name the environment, the step and the wrong value."""

from __future__ import annotations

import math
import warnings
from typing import Any, NoReturn

import gymnasium
import numpy as np
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker, TimeLimit
from numpy.typing import NDArray

_INTERFACE = {
    "reset": "(observation, info)",
    "step": "(observation, reward, terminated, truncated, info)",
}
_FPS, _MAX_FPS = 30, 1_000
WITHOUT_IMAGES = "training (video_every_episodes=0), evaluation and pydqn play --no-show need no images"


class CloseWarning(RuntimeWarning):
    """An environment failed to close. Its results are complete: only closing it failed."""


class Checked(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Checks that one environment returns what Gymnasium's interface says.

    Observations of Box spaces are returned as arrays of the space's shape, rewards as finite floats. The contents of
    infos are not checked.

    Args:
        env: the environment.
        env_id: its id, for messages.
        env_index: its number among the environments, for messages.
        seed: the seed with which it will be reset, for messages.

    Raises:
        RuntimeError: in `reset`, `step` and `image`: the environment failed, or returned something else. The message
            names the id, the env index, the seed, the steps since the environment was seeded, the value and what was
            expected.
    """

    def __init__(self, env: Any, env_id: str, env_index: int, seed: int) -> None:
        super().__init__(env)
        self.steps = 0
        self._env_id, self._env_index, self._seed = env_id, env_index, seed
        self._box = self.observation_space if isinstance(self.observation_space, gymnasium.spaces.Box) else None
        space: Any = self.observation_space
        discrete = isinstance(space, gymnasium.spaces.Discrete)
        self._numbers = range(int(space.start), int(space.start + space.n)) if discrete else range(0)
        self._dtype: np.dtype[Any] | None = None  # of the observations that were accepted

    @property
    def fps(self) -> int:
        """Steps per second in a video: the environment's `render_fps`, or 30."""
        metadata = self.env.metadata
        fps: Any = metadata.get("render_fps") if isinstance(metadata, dict) else None
        known = isinstance(fps, (int, float, np.integer, np.floating)) and 0.5 < fps <= _MAX_FPS
        return round(float(fps)) if known else _FPS

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode. A seed sets the count of steps to 0."""
        if seed is not None:
            self._seed, self.steps = seed, 0
        given: dict[str, Any] = {"seed": seed} if options is None else {"seed": seed, "options": options}
        try:
            result = self.env.reset(**given)
        except (Exception, SystemExit) as error:
            self._failed("reset", error)
        observation, info = self._values("reset", result)
        self._require_info("reset", info)
        return self._observation("reset", observation), info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Take one action."""
        self.steps += 1
        try:
            result = self.env.step(action)
        except (Exception, SystemExit) as error:
            self._failed("step", error)
        observation, reward, terminated, truncated, info = self._values("step", result)
        observation = self._observation("step", observation)
        if type(reward) is not float or not math.isfinite(reward):
            reward = self._reward(reward)
        terminated, truncated = self._flag("terminated", terminated), self._flag("truncated", truncated)
        self._require_info("step", info)
        return observation, reward, terminated, truncated, info

    def image(self) -> NDArray[np.uint8]:
        """Return the rendered image, (H, W, 3) uint8."""
        try:
            image: Any = self.env.render()
        except gymnasium.error.DependencyNotInstalled as error:
            raise RuntimeError(f"render: {_one_line(error)}") from None  # Gymnasium's message has the pip command
        except (Exception, SystemExit) as error:
            self.refuse(f"render() failed: {named(error)}; {WITHOUT_IMAGES}", error)
        good = isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3
        if not good or not image.size or image.shape[2] != 3:
            self.refuse(f"render() returned {_describe(image)}, expected an image, (H, W, 3) uint8; {WITHOUT_IMAGES}")
        result: NDArray[np.uint8] = image
        return result

    def refuse(self, what: str, cause: BaseException | None = None) -> NoReturn:
        """Raise a RuntimeError that names this environment and says `what` is wrong."""
        raise RuntimeError(f"{self.where()}: {what}") from cause

    def where(self) -> str:
        """Return the id, env index, seed and step for a message."""
        return f"env_id: {self._env_id}, env index {self._env_index} (seed {self._seed}), step {self.steps:,}"

    def _failed(self, function: str, error: BaseException) -> NoReturn:
        hint = ""
        if function == "reset" and isinstance(error, TypeError) and "'seed'" in str(error):
            hint = "; expected reset(self, *, seed=None, options=None), the interface since Gym 0.26"
        self.refuse(f"{function}() failed: {named(error)}{hint}", error)

    def _values(self, function: str, result: Any) -> Any:
        """Return the tuple of a step or a reset, if it has the right number of values."""
        expected = _INTERFACE[function]
        count = expected.count(",") + 1
        if isinstance(result, tuple) and len(result) == count:
            return result
        came = f"{len(result)} values" if isinstance(result, tuple) else _describe(result)
        old = {"reset": not isinstance(result, tuple), "step": isinstance(result, tuple) and len(result) == 4}
        hint = ", as it did before Gym 0.26" if old[function] and result is not None else ""
        self.refuse(f"{function}() returned {came}{hint}; expected {count}: {expected}")

    def _observation(self, function: str, observation: Any) -> Any:
        if self._box is None:
            if type(observation) is int and observation in self._numbers:  # the usual case, and faster
                return observation
            if not self.observation_space.contains(observation):
                came = _describe(observation)
                self.refuse(f"{function}() returned an observation of {came}, expected one of {self.observation_space}")
            return observation
        try:
            array = np.asarray(observation)
        except ValueError:  # lists of different lengths
            array = np.array(None)
        if array.dtype != self._dtype:
            whole = self._box.dtype == np.uint8
            fits = np.can_cast(array.dtype, np.uint8, "same_kind") if whole else array.dtype.kind in "biuf"
            if not fits:
                came, expected = _describe(observation), f"numbers of dtype {self._box.dtype}, shape {self._box.shape}"
                self.refuse(f"{function}() returned an observation of {came}, expected {expected}")
            self._dtype = array.dtype
        if array.shape != self._box.shape:
            self.refuse(f"{function}() returned an observation of shape {array.shape}, expected {self._box.shape}")
        return array

    def _reward(self, reward: Any) -> float:
        """Return a reward of another type as a float."""
        try:
            array = np.asarray(reward)
            value = float(reward) if array.ndim == 0 and array.dtype.kind in "biufO" else None
        except (TypeError, ValueError, OverflowError):
            value = None
        if value is None:
            self.refuse(f"step() returned a reward of {_describe(reward)}, expected a number")
        if not math.isfinite(value):
            self.refuse(f"step() returned a reward that is not finite: {value}")
        return value

    def _flag(self, name: str, value: Any) -> bool:
        if value is True or value is False:
            return bool(value)
        if not isinstance(value, (np.bool_, np.ndarray)) or value.ndim or value.dtype != np.bool_:
            self.refuse(f"step() returned {name} = {_describe(value)}, expected a bool")
        return bool(value)

    def _require_info(self, function: str, info: Any) -> None:
        """Infos are not used, but one that is not a dict shows that the values are in another order."""
        if not isinstance(info, dict):
            self.refuse(f"{function}() returned an info of {_describe(info)}, expected a dict as the last value")


def check(env: Any, env_id: str, env_index: int, seed: int) -> tuple[Any, Checked]:
    """Put a `Checked` around the user's environment, inside the wrappers that `gymnasium.make` added.

    Those wrappers would fail with errors of their own if a wrong value reached them.

    Returns:
        The whole environment, and the `Checked` in it.
    """
    wrapper, inner = None, env
    while type(inner) in (TimeLimit, OrderEnforcing, PassiveEnvChecker):
        wrapper, inner = inner, inner.env
    checked = Checked(inner, env_id, env_index, seed)
    if wrapper is None:
        return checked, checked
    wrapper.env = checked
    return env, checked


def close(env: Any, checked: Checked) -> None:
    """Close an environment. A failure is only a warning, since the environment is no longer needed."""
    try:
        env.close()
    except (Exception, SystemExit) as error:
        warnings.warn(f"{checked.where()}: close() failed: {named(error)}", CloseWarning, stacklevel=2)


def named(error: BaseException) -> str:
    """Return an error's type and message on one line."""
    return f"{type(error).__name__}: {_one_line(error)}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _describe(value: Any) -> str:
    """Describe a value briefly: its type, and its shape, length or text."""
    kind = type(value).__name__
    if value is None:
        return "None"
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape}, dtype {value.dtype}"
    if isinstance(value, (bool, int, float, complex, str, np.generic)):
        text = str(value)
        return f"{text if len(text) <= 40 else text[:40] + '...'} ({kind})"
    if isinstance(value, (list, tuple, dict)):
        return f"a {kind} of {len(value)}"
    return f"a {kind}"

"""Environments as lanes: `send` actions, work on something else, `recv` frames into the replay memory's own slot.

The only room that knows gymnasium.
"""

from __future__ import annotations

import itertools
import math
import os
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pydqn.atari import AtariLanes
from pydqn.config import Config
from pydqn.ids import rom_of, spec_of
from pydqn.lanes import Lanes, Returns, Step


def make_lanes(config: Config, num_envs: int, seed: int, *, render: bool = False) -> Lanes:
    """Make `num_envs` environments of `config.env_id`, each with its own seed derived from `seed`.

    Raises:
        ValueError: no such environment (near matches are named), or its spaces do not fit DQN.
    """
    rom = rom_of(config.env_id)
    if rom is not None:
        return AtariLanes(rom, config, num_envs, seed, render=render)
    return GymLanes(config, num_envs, seed, render=render)


def episode_limit(config: Config) -> int | None:
    """Return after how many decisions an episode is truncated; None where neither the config nor Gymnasium limits it.

    (An Atari game is limited in frames: `config.max_episode_frames`.)

    Raises:
        ValueError: no such environment.
    """
    if rom_of(config.env_id) is not None:
        return config.max_episode_steps or config.max_episode_frames // config.frame_skip
    limit: int | None = config.max_episode_steps or spec_of(config.env_id).max_episode_steps
    return limit


class GymLanes:
    """Any Gymnasium environment with Discrete actions, through `make_vec`.

    Observations are Box, or Discrete, or a Tuple of Discrete ones (one-hot). Steps run inside `recv`: such environments
    hold the GIL, so there is nothing to overlap.
    """

    def __init__(self, config: Config, num_envs: int, seed: int, *, render: bool = False) -> None:
        import gymnasium

        self._env_id, self._clip = config.env_id, config.clip_rewards
        options: dict[str, Any] = {}
        if render:
            options["render_mode"] = "rgb_array"
            os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pictures are drawn in memory, and no display is missed
        self._seeds: Any = [int(seed) for seed in np.random.SeedSequence(seed).generate_state(num_envs)]
        options["wrappers"] = [_reporting(config.env_id, self._seeds)]
        self._env: Any = _made(gymnasium.make_vec, config, num_envs=num_envs, vectorization_mode="sync", **options)
        self._action_start, self.num_actions = _actions(config.env_id, self._env.single_action_space)
        self.action_names = tuple(map(str, range(self.num_actions)))
        observation = self._env.single_observation_space
        self._states = _States.of(observation)
        self.dtype: np.dtype[Any] = np.dtype(np.float32)
        if self._states is not None:
            self.frame_shape: tuple[int, ...] = (self._states.total,)
        elif isinstance(observation, gymnasium.spaces.Box) and observation.shape:
            self.frame_shape = observation.shape
            if observation.dtype == np.uint8:
                self.dtype = np.dtype(np.uint8)
        else:
            raise ValueError(f"env_id: {config.env_id} has {observation} observations; expected Box or Discrete ones")
        self.num_envs = num_envs
        self._action: NDArray[np.int64] = np.zeros(num_envs, np.int64)
        self._done = np.zeros(num_envs, np.bool_)
        self._returns = Returns(num_envs)

    def reset(self, out: NDArray[Any]) -> None:
        observation, _ = self._env.reset(seed=self._seeds)
        self._write(observation, out)
        self._require_finite("an observation", out)

    def send(self, action: NDArray[np.int64]) -> None:
        self._action = action + self._action_start

    def recv(self, out: NDArray[Any]) -> Step:
        observation, reward, terminated, truncated, _ = self._env.step(self._action)
        first, self._done = self._done, terminated | truncated
        self._write(observation, out)
        reward = np.where(first, 0.0, reward)
        self._require_finite("an observation", out)
        self._require_finite("a reward", reward)
        episodes = self._returns.add(reward, first, self._done)
        reward = np.sign(reward) if self._clip else reward
        return Step(reward, terminated, truncated, first, episodes, int(np.count_nonzero(~first)))

    def _write(self, observation: Any, out: NDArray[Any]) -> None:
        if self._states is None:
            out[...] = observation
        else:
            out[...] = 0
            out[np.arange(self.num_envs), self._states.number(observation)] = 1

    def _require_finite(self, what: str, values: NDArray[Any]) -> None:
        """One that is not would spoil the memory, and the weights, long after it came."""
        if values.dtype.kind != "f":
            return
        finite = np.isfinite(values)
        if not finite.all():
            lane = int(np.argmin(finite.reshape(self.num_envs, -1).all(axis=1)))
            raise RuntimeError(
                f"env_id: {self._env_id} gave {what} that is not finite in lane {lane} (seed {self._seeds[lane]})"
            )

    def picture(self) -> NDArray[np.uint8]:
        from gymnasium.error import DependencyNotInstalled

        try:
            pictures = self._env.render()
        except DependencyNotInstalled as error:
            raise RuntimeError(f"render: {error}") from None  # names the pip command
        assert pictures is not None
        return np.asarray(pictures[0], np.uint8)

    def close(self) -> None:
        self._env.close()


class Model(NamedTuple):
    """The transition probabilities of an environment with numbered states.

    The outcomes of action a in state s are rows `offset[s * num_actions + a]` up to the next offset.
    """

    start: NDArray[np.float64]  # (num_states,) cumulative probabilities of the first state
    offset: NDArray[np.int64]  # (num_states * num_actions + 1,)
    chance: NDArray[np.float64]  # (outcomes,) cumulative probabilities within each state and action
    next_state: NDArray[np.int64]  # (outcomes,)
    reward: NDArray[np.float64]  # (outcomes,)
    terminated: NDArray[np.bool_]  # (outcomes,)


class StateEnv:
    """One Gymnasium environment with Discrete actions and numbered states: Discrete ones, or a Tuple of them.

    Raises:
        ValueError: no such environment, or its spaces are others.
    """

    def __init__(self, config: Config, seed: int) -> None:
        import gymnasium

        if rom_of(config.env_id) is not None:
            raise ValueError(f"env_id: {config.env_id} has pixels; a table needs Discrete observations")
        self._env: Any = _reporting(config.env_id, [seed])(_made(gymnasium.make, config))
        self._action_start, self.num_actions = _actions(config.env_id, self._env.action_space)
        states = _States.of(self._env.observation_space)
        if states is None:
            raise ValueError(
                f"env_id: {config.env_id} has {self._env.observation_space} observations; a table needs Discrete ones"
            )
        self._states = states
        self.num_states = states.total
        self.most_steps: int | None = self._env.spec.max_episode_steps  # None for no limit
        self._seed: int | None = seed

    def model(self) -> Model | None:
        """Return the transition probabilities, where the environment publishes them (as `P`)."""
        bare = self._env.unwrapped
        if not isinstance(getattr(bare, "P", None), dict) or not hasattr(bare, "initial_state_distrib"):
            return None
        rows = [bare.P[state][action] for state in range(self.num_states) for action in range(self.num_actions)]
        outcomes = [outcome for row in rows for outcome in row]
        _, next_state, reward, terminated = zip(*outcomes, strict=True)
        return Model(
            start=np.cumsum(bare.initial_state_distrib, dtype=np.float64),
            offset=np.cumsum([0, *map(len, rows)], dtype=np.int64),
            chance=np.concatenate([np.cumsum([outcome[0] for outcome in row]) for row in rows]),
            next_state=np.array(next_state, np.int64),
            reward=np.array(reward, np.float64),
            terminated=np.array(terminated, np.bool_),
        )

    def reset(self) -> int:
        """Open an episode and return its first state."""
        observation, _ = self._env.reset(seed=self._seed)
        self._seed = None  # only the first time: later episodes go on with the same generator
        return int(self._states.number(observation))

    def step(self, action: int) -> tuple[int, float, bool, bool]:
        """Take one action; returns the state, the reward, and whether the episode terminated or was truncated."""
        observation, reward, terminated, truncated, _ = self._env.step(action + self._action_start)
        return int(self._states.number(observation)), float(reward), bool(terminated), bool(truncated)

    def close(self) -> None:
        """Release the environment."""
        self._env.close()


class Outline(NamedTuple):
    """What a picture of a small task's value function needs to know of the task."""

    bounds: tuple[NDArray[Any], NDArray[Any]] | None  # lowest and highest Box observation
    sizes: tuple[int, ...]  # of Discrete observations, or of the parts of a tuple of them
    letters: list[str]  # the rows of a map of states, where there is one
    directions: tuple[tuple[int, int], ...]  # (right, up) of each action on that map


def outline(config: Config) -> Outline:
    """Return the outline of a Gymnasium task."""
    import gymnasium
    from gymnasium import spaces

    env: Any = _made(gymnasium.make, config)
    try:
        space, bare = env.observation_space, env.unwrapped
        if isinstance(space, spaces.Box):
            return Outline((space.low, space.high), (), [], ())
        states = _States.of(space)
        sizes = () if states is None else states.sizes
        left, down, right, up = (-1, 0), (0, -1), (1, 0), (0, 1)
        kind = type(bare).__name__
        if kind == "FrozenLakeEnv":
            return Outline(None, sizes, [b"".join(row).decode() for row in bare.desc], (left, down, right, up))
        if kind == "CliffWalkingEnv":
            rows, columns = bare.shape
            letters = ["F" * columns] * (rows - 1) + ["S" + "C" * (columns - 2) + "G"]
            return Outline(None, sizes, letters, (up, right, down, left))
        return Outline(None, sizes, [], ())
    finally:
        env.close()


class _States(NamedTuple):
    """How Discrete observations, or tuples of them, are numbered: the last one counts fastest."""

    sizes: tuple[int, ...]
    starts: tuple[int, ...]

    @classmethod
    def of(cls, space: Any) -> _States | None:
        """Return the numbering of a space, or None where it has none."""
        from gymnasium import spaces

        parts: Any = space.spaces if isinstance(space, spaces.Tuple) else (space,)
        if not parts or not all(isinstance(part, spaces.Discrete) for part in parts):
            return None
        return cls(tuple(int(part.n) for part in parts), tuple(int(part.start) for part in parts))

    @property
    def total(self) -> int:
        return math.prod(self.sizes)

    def number(self, observation: Any) -> Any:
        """Number one observation, or a batch of them."""
        parts = observation if isinstance(observation, tuple) else (observation,)
        total: Any = 0
        for part, size, start in zip(parts, self.sizes, self.starts, strict=True):
            total = total * size + (part - start)
        return total


def _made(make: Any, config: Config, **options: Any) -> Any:
    """Make a Gymnasium environment; its episodes end by its own limit of steps, or the config's, or none."""
    import gymnasium

    spec = spec_of(config.env_id)
    if config.max_episode_steps:
        options["max_episode_steps"] = config.max_episode_steps
    try:
        return make(spec, **options)
    except (gymnasium.error.Error, ImportError) as error:
        raise ValueError(f"env_id: Gymnasium cannot make {config.env_id!r} ({str(error).splitlines()[0]})") from None


def _reporting(env_id: str, seeds: list[int]) -> Any:
    """Return a wrapper that says, when an environment fails, which it was: the nth one made is lane n."""
    import gymnasium

    lanes = itertools.count()

    class Reporting(gymnasium.Wrapper[Any, Any, Any, Any]):
        def __init__(self, env: Any) -> None:
            super().__init__(env)
            self._lane, self._steps = next(lanes), 0

        def reset(self, **options: Any) -> Any:
            return self._call(self.env.reset, **options)

        def step(self, action: Any) -> Any:
            self._steps += 1
            return self._call(self.env.step, action)

        def _call(self, function: Any, *arguments: Any, **options: Any) -> Any:
            try:
                return function(*arguments, **options)
            except Exception as error:
                raise RuntimeError(
                    f"env_id: {env_id} failed in lane {self._lane} (seed {seeds[self._lane]}) after "
                    f"{self._steps:,} steps: {type(error).__name__}: {error}"
                ) from error

    return Reporting


def _actions(env_id: str, space: Any) -> tuple[int, int]:
    """Return the first action and how many there are."""
    from gymnasium import spaces

    if not isinstance(space, spaces.Discrete):
        raise ValueError(f"env_id: {env_id} has {space} actions; DQN needs Discrete ones")
    return int(space.start), int(space.n)

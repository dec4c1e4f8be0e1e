"""Environments as lanes: `send` actions, work on something else, `recv` frames into the replay memory's own slot.

The only room that knows gymnasium.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pydqn.envs.atari import AtariLanes
from pydqn._util.checks import converted
from pydqn.config import Config
from pydqn.envs.ids import rom_of, spec_of
from pydqn.envs.base import Lanes, Returns, Step
from pydqn.envs.spaces import States, frames_of
from pydqn.envs.tasks import resolved

if TYPE_CHECKING:
    from pydqn.envs.checked import Checked


_LARGEST = float(np.finfo(np.float32).max)
_MOST_VALUES = 2**28  # in a table, of 8 bytes each


def make_lanes(config: Config, num_envs: int, seed: int, *, render: bool = False) -> Lanes:
    """Make `num_envs` environments of `config.env_id`, each with its own seed derived from `seed`.

    Raises:
        ValueError: no such environment (near matches are named), or its spaces do not fit DQN.
    """
    rom, config = rom_of(config.env_id), resolved(config)
    if rom is not None:
        return AtariLanes(rom, config, num_envs, seed, render=render)
    return GymLanes(config, num_envs, seed, render=render)


@contextmanager
def beside_learning() -> Iterator[None]:
    """Let environments for evaluation that cannot be made beside those that learn say how to train without them."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        raise (ValueError if isinstance(error, ValueError) else RuntimeError)(
            f"{error} (this one was for evaluation, beside those that learn: where no more can exist, train with "
            "--evaluation-every-steps 0, in Python evaluation_every_steps=0, and evaluate the run when it is over)"
        ) from error


class GymLanes:
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
                env, checked = _open(config, index, num_envs, own, render=render and index == 0)
                self._envs.append(env)
                self._checked.append(checked)
                _require_same_spaces(config.env_id, env, self._envs[0], index)
            self._action_start, self.num_actions = _actions(config.env_id, self._envs[0].action_space)
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

    def picture(self) -> NDArray[np.uint8]:
        return self._checked[0].image()

    def close(self) -> None:
        from pydqn.envs.checked import close

        while self._envs:
            close(self._envs.pop(), self._checked.pop())


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
        if rom_of(config.env_id) is not None:
            raise ValueError(f"env_id: {config.env_id} has pixels; a table needs Discrete observations")
        self._env, self._checked = _open(config, 0, 1, seed)
        with ExitStack() as failed:
            failed.callback(self.close)
            self._action_start, self.num_actions = _actions(config.env_id, self._env.action_space)
            self._states = self._numbered(config.env_id)
            failed.pop_all()
        self.num_states = self._states.total
        self.most_steps: int | None = self._env.spec.max_episode_steps  # None for no limit
        self._seed: int | None = seed

    def _numbered(self, env_id: str) -> States:
        """Return the states, if a table can hold their values."""
        states = States.of(self._env.observation_space)
        if states is None:
            raise ValueError(
                f"env_id: {env_id} has {self._env.observation_space} observations; a table needs Discrete ones"
            )
        if states.total * self.num_actions > _MOST_VALUES:
            raise ValueError(
                f"env_id: {env_id} has {states.total:,} states with {self.num_actions:,} actions; a table holds "
                f"at most {_MOST_VALUES:,} values"
            )
        return states

    def model(self) -> Model | None:
        """Return the transition probabilities, where the environment publishes them (as `P`).

        Raises:
            RuntimeError: they are not those of its states and actions.
        """
        bare = self._env.unwrapped
        if not isinstance(getattr(bare, "P", None), dict) or not hasattr(bare, "initial_state_distrib"):
            return None
        from pydqn.envs.checked import named

        try:
            return self._published(bare)
        except Exception as error:
            self._checked.refuse(f"publishes transition probabilities (P) that cannot be used: {named(error)}", error)

    def _published(self, bare: Any) -> Model:
        rows = [bare.P[state][action] for state in range(self.num_states) for action in range(self.num_actions)]
        outcomes = [outcome for row in rows for outcome in row]
        _, next_state, reward, terminated = zip(*outcomes, strict=True)
        model = Model(
            start=np.cumsum(bare.initial_state_distrib, dtype=np.float64),
            offset=np.cumsum([0, *map(len, rows)], dtype=np.int64),
            chance=np.concatenate([np.cumsum([outcome[0] for outcome in row]) for row in rows]),
            next_state=np.array(next_state, np.int64),
            reward=np.array(reward, np.float64),
            terminated=np.array(terminated, np.bool_),
        )
        # Compiled code looks states up without asking whether they are there.
        if not all(rows) or len(model.start) != self.num_states:
            raise ValueError("some states or actions have no outcome, or initial_state_distrib is of other states")
        low, high = model.next_state.min(), model.next_state.max()
        if low < 0 or high >= self.num_states:
            raise ValueError(f"expected next states from 0 to {self.num_states - 1}, got {low} to {high}")
        sums = np.append(model.chance[model.offset[1:] - 1], model.start[-1])
        if not np.allclose(sums, 1) or not np.isfinite(model.reward).all():
            raise ValueError("expected probabilities whose sum is 1, and finite rewards")
        return model

    def reseed(self, seed: int) -> None:
        """Let the next reset begin anew, as in an environment that is made with this seed."""
        self._seed = seed

    def reset(self) -> int:
        """Open an episode and return its first state."""
        observation, _ = self._env.reset(seed=self._seed)
        self._seed = None  # only once: later episodes go on with the same generator
        return self._states.number(observation)

    def step(self, action: int) -> tuple[int, float, bool, bool]:
        """Take one action; returns the state, the reward, and whether the episode terminated or was truncated."""
        observation, reward, terminated, truncated, _ = self._env.step(action + self._action_start)
        return self._states.number(observation), float(reward), bool(terminated), bool(truncated)

    def close(self) -> None:
        """Release the environment."""
        from pydqn.envs.checked import close

        close(self._env, self._checked)


class Outline(NamedTuple):
    """What a picture of a small task's value function needs to know of the task."""

    bounds: tuple[NDArray[Any], NDArray[Any]] | None  # lowest and highest Box observation
    sizes: tuple[int, ...]  # of Discrete observations, or of the parts of a tuple of them
    letters: list[str]  # the rows of a map of states, where there is one
    directions: tuple[tuple[int, int], ...]  # (right, up) of each action on that map


def outline(config: Config) -> Outline:
    """Return the outline of a Gymnasium task."""
    from gymnasium import spaces

    from pydqn.envs.checked import close

    env, checked = _open(config, 0, 1, 0)
    try:
        space, bare = env.observation_space, env.unwrapped
        if isinstance(space, spaces.Box):
            return Outline((space.low, space.high), (), [], ())
        states = States.of(space)
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
        close(env, checked)


def _seeds(seed: int, num_envs: int) -> list[int]:
    return [int(own) for own in np.random.SeedSequence(seed).generate_state(num_envs)]


def _open(config: Config, index: int, num_envs: int, seed: int, *, render: bool = False) -> tuple[Any, Checked]:
    """Make one environment of `num_envs`; its episodes end by its own limit of steps, or the config's, or none.

    Returns the environment, and the part of it that names its mistakes.
    """
    import gymnasium

    from pydqn.envs.checked import WITHOUT_IMAGES, check, named

    env_id = config.env_id
    options: dict[str, Any] = {}
    if config.max_episode_steps:
        options["max_episode_steps"] = config.max_episode_steps
    if render:
        options["render_mode"] = "rgb_array"
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pictures are drawn in memory, and no display is missed
    spec = spec_of(env_id)
    which = f"env index {index} of {num_envs} (seed {seed})"
    try:
        env = gymnasium.make(spec, **options)
    except (gymnasium.error.Error, ImportError) as error:
        raise ValueError(f"env_id: Gymnasium cannot make {env_id!r} ({str(error).splitlines()[0]})") from None
    except (Exception, SystemExit) as error:
        hint = f"; {WITHOUT_IMAGES}" if "'render_mode'" in str(error) else ""
        raise RuntimeError(f"env_id: {env_id}, {which} could not be made: {named(error)}{hint}") from error
    try:
        for name in ("observation_space", "action_space"):
            getattr(env, name)
        return check(env, env_id, index, seed)
    except Exception as error:
        with suppress(Exception):
            env.close()
        raise RuntimeError(f"env_id: {env_id}, {which} is no Gymnasium environment: {named(error)}") from error


def _require_same_spaces(env_id: str, env: Any, first: Any, index: int) -> None:
    for name in ("observation_space", "action_space"):
        own, expected = getattr(env, name), getattr(first, name)
        if own != expected:
            raise ValueError(
                f"env_id: {env_id}, env index {index}: its {name} is {own}, that of env index 0 {expected}"
            )


def _actions(env_id: str, space: Any) -> tuple[int, int]:
    """Return the first action and how many there are."""
    from gymnasium import spaces

    if not isinstance(space, spaces.Discrete):
        raise ValueError(f"env_id: {env_id} has {space} actions; DQN needs Discrete ones")
    return int(space.start), int(space.n)

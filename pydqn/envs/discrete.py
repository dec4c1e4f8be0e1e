"""Gymnasium environments with numbered states, for tabular learning."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pydqn.config import Config
from pydqn.envs.actions import Actions
from pydqn.envs.ids import rom_of
from pydqn.envs.single import open_env
from pydqn.envs.spaces import States

_MAX_VALUES = 2**28  # in a table, of 8 bytes each


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
    """One Gymnasium environment with numbered actions (see `Actions`) and Discrete observations, or a Tuple of them.

    Raises:
        ValueError: there is no such environment, or it has other spaces.
    """

    def __init__(self, config: Config, seed: int) -> None:
        if rom_of(config.env_id) is not None:
            raise ValueError(f"env_id: {config.env_id} has pixels; a table needs Discrete observations")
        self._env, self._checked = open_env(config, 0, 1, seed)
        with ExitStack() as failed:
            failed.callback(self.close)
            self._actions = Actions(config.env_id, self._env.action_space)
            self.num_actions = self._actions.count
            self._states = self._numbered(config.env_id)
            failed.pop_all()
        self.num_states = self._states.total
        self.most_steps: int | None = self._env.spec.max_episode_steps  # None for no limit
        self._seed: int | None = seed

    def _numbered(self, env_id: str) -> States:
        """Return the numbering of the states; a table must be able to hold their values."""
        states = States.of(self._env.observation_space)
        if states is None:
            raise ValueError(
                f"env_id: {env_id} has {self._env.observation_space} observations; a table needs Discrete ones"
            )
        if states.total * self.num_actions > _MAX_VALUES:
            raise ValueError(
                f"env_id: {env_id} has {states.total:,} states with {self.num_actions:,} actions; a table holds "
                f"at most {_MAX_VALUES:,} values"
            )
        return states

    def model(self) -> Model | None:
        """Return the transition probabilities, or None if the environment does not publish them as `P`.

        Raises:
            RuntimeError: they do not fit its states and actions.
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
        # Compiled code uses these numbers as indices and does not check them.
        if not all(rows) or len(model.start) != self.num_states:
            raise ValueError("a state or action has no outcome, or initial_state_distrib has another number of states")
        low, high = model.next_state.min(), model.next_state.max()
        if low < 0 or high >= self.num_states:
            raise ValueError(f"expected next states from 0 to {self.num_states - 1}, got {low} to {high}")
        sums = np.append(model.chance[model.offset[1:] - 1], model.start[-1])
        if not np.allclose(sums, 1) or not np.isfinite(model.reward).all():
            raise ValueError("expected probabilities with the sum 1 and finite rewards")
        return model

    def reseed(self, seed: int) -> None:
        """Continue, from the next reset on, like an environment that was made with this seed."""
        self._seed = seed

    def reset(self) -> int:
        """Start an episode and return its first state."""
        observation, _ = self._env.reset(seed=self._seed)
        self._seed = None  # only once: later episodes use the same generator
        return self._states.number(observation)

    def step(self, action: int) -> tuple[int, float, bool, bool]:
        """Take one action; returns the state, the reward, and whether the episode was terminated or truncated."""
        observation, reward, terminated, truncated, _ = self._env.step(self._actions.of(action))
        return self._states.number(observation), float(reward), bool(terminated), bool(truncated)

    def close(self) -> None:
        """Release the environment."""
        from pydqn.envs.checked import close

        close(self._env, self._checked)

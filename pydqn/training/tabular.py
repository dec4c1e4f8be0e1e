"""Q-learning on a table (Watkins 1989), for environments with numbered states and actions.

Test episodes are most of the work: the published FrozenLake agent plays twenty after every update. Where an environment
gives its transition probabilities, as Gymnasium's toy text environments do, learning and testing use these in compiled
code; any other environment is stepped.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pydqn._util.jit import kernel
from pydqn.config import Config
from pydqn.envs.base import Episode
from pydqn.envs.discrete import Model, StateEnv
from pydqn.envs.make import advise_evaluating_after_training
from pydqn.evaluation.protocols import under_protocol, warn_if_cut
from pydqn.learning.schedules import Due, epsilon
from pydqn.learning.statistics import Statistics
from pydqn.runs.checkpoint import Checkpoint
from pydqn.runs.logs import Report
from pydqn.training.base import BaseRun

_NO_LIMIT = 2**62  # steps


class Trials(NamedTuple):
    """When test episodes are played, and the mean return that they have to exceed."""

    steps_before: int
    every_steps: int  # 0 for never
    episodes: int
    best: float


class Outcome(NamedTuple):
    """The result of some steps of learning."""

    steps: int
    test_mean: float  # of the last test; NaN when there was none
    longest_test: int  # steps of the longest test episode
    episodes: list[tuple[float, int, int]]  # those that ended: return, length, and after how many of these steps


class ModelledTask:
    """A task with known transition probabilities; the environment itself is no longer needed."""

    steps_at_once = 1_000  # a request to stop the run waits for as many

    def __init__(
        self, model: Model, most_steps: int | None, config: Config, generators: list[np.random.Generator]
    ) -> None:
        # A plain tuple, because Numba's cache on the disk depends on the types of arguments, and so on our names.
        self._model = tuple(model)
        self._most_steps = most_steps or _NO_LIMIT
        self._most_test_steps = most_steps or config.evaluation_max_episode_steps or _NO_LIMIT
        self._config = config
        self.begin(generators)

    def begin(self, generators: list[np.random.Generator], seeds: tuple[int, int] | None = None) -> None:
        """Start an episode, with these generators for exploration. `seeds` are used by `SteppedTask` alone."""
        self._generators = generators
        self._state = int(_first_state(self._model[0], generators[0]))
        self.length, self._total = 0, 0.0

    def learn(self, table: NDArray[np.float64], epsilons: NDArray[np.float64], tests: Trials) -> Outcome:
        """Take up to `len(epsilons)` steps with one update each; stop early after a test that exceeds the best.

        Args:
            table: (num_states, num_actions) action values, changed in place.
            epsilons: probability of a random action at each step.
            tests: when to test.
        """
        config = self._config
        steps, test_mean, longest, self._state, self.length, self._total, *ended = _learn(
            table,
            self._model,
            self._most_steps,
            self._most_test_steps,
            config.learning_rate,
            config.gamma,
            epsilons,
            self._state,
            self.length,
            self._total,
            tuple(tests),
            config.evaluation_epsilon,
            *self._generators,
        )
        return Outcome(steps, test_mean, longest, list(zip(*(column.tolist() for column in ended), strict=True)))

    def close(self) -> None:
        """Release nothing: there is no environment."""


class SteppedTask:
    """A task that steps an environment with numbered states; tests use a second one, so as not to disturb episodes."""

    steps_at_once = 1  # if a step fails, all steps before it have been counted

    def __init__(
        self, envs: tuple[StateEnv, StateEnv | None], config: Config, generators: list[np.random.Generator]
    ) -> None:
        self._env, self._test_env = envs
        self._config = config
        self.begin(generators)

    def begin(self, generators: list[np.random.Generator], seeds: tuple[int, int] | None = None) -> None:
        """See `ModelledTask.begin`; `seeds` reset the random state of both environments."""
        self._generators = generators
        if seeds is not None:
            for env, seed in zip((self._env, self._test_env), seeds, strict=True):
                if env is not None:
                    env.reseed(seed)
        self._state = self._env.reset()
        self.length, self._total = 0, 0.0

    def learn(self, table: NDArray[np.float64], epsilons: NDArray[np.float64], tests: Trials) -> Outcome:
        """See `ModelledTask.learn`."""
        config = self._config
        episodes: list[tuple[float, int, int]] = []
        test_mean, longest = math.nan, 0
        for count, chance in enumerate(epsilons, 1):
            action = _choose(table, self._state, chance, self._generators[0])
            state, reward, terminated, truncated = self._env.step(action)
            update(table, self._state, action, reward, 0.0 if terminated else config.gamma, state, config.learning_rate)
            self._state, self.length, self._total = state, self.length + 1, self._total + reward
            if terminated or truncated:
                episodes.append((self._total, self.length, count))
                self._state, self.length, self._total = self._env.reset(), 0, 0.0
            if tests.every_steps and (tests.steps_before + count) % tests.every_steps == 0:
                played = [self._play(table) for _ in range(tests.episodes)]
                test_mean = sum(total for total, _ in played) / tests.episodes
                longest = max(longest, *(steps for _, steps in played))
                if test_mean > tests.best:
                    return Outcome(count, test_mean, longest, episodes)
        return Outcome(len(epsilons), test_mean, longest, episodes)

    def _play(self, table: NDArray[np.float64]) -> tuple[float, int]:
        """Return the return and the length of one test episode."""
        assert self._test_env is not None
        state, total, steps, over = self._test_env.reset(), 0.0, 0, False
        while not over:
            action = _choose(table, state, self._config.evaluation_epsilon, self._generators[1])
            state, reward, terminated, truncated = self._test_env.step(action)
            total, steps, over = total + reward, steps + 1, terminated or truncated
        return total, steps

    def close(self) -> None:
        """Release the environments."""
        self._env.close()
        if self._test_env is not None:
            self._test_env.close()


class TabularRun(BaseRun):
    """One training run of a table. It reports on schedule, and whenever a test mean is the best so far.

    A new episode starts at each scheduled checkpoint, so that a run resumed from it is the same run.
    """

    def _create(self, seeds: np.random.SeedSequence) -> None:
        if self.config.num_envs != 1:
            raise ValueError(f"num_envs: a table learns from 1 environment, got {self.config.num_envs}")
        if self.config.init_weights:
            raise ValueError(f"init_weights: expected none for a table, got {self.config.init_weights!r}")
        self._task, shape = self._make_task(*_drawn(seeds))
        self.table = np.zeros(shape)

    def _make_task(
        self, generators: list[np.random.Generator], seeds: tuple[int, int]
    ) -> tuple[ModelledTask | SteppedTask, tuple[int, int]]:
        """Return the task, in its first episode, and the shape of its table."""
        config = self.config
        with ExitStack() as unless_stepped:
            env = StateEnv(config, seeds[0])
            unless_stepped.callback(env.close)
            shape = env.num_states, env.num_actions
            model = env.model()
            if model is not None:
                return ModelledTask(model, env.most_steps, config, generators), shape
            test_env = None
            if config.evaluation_every_steps > 0:
                with advise_evaluating_after_training():
                    test_env = StateEnv(under_protocol(config), seeds[1])
                unless_stepped.callback(test_env.close)
            task = SteppedTask((env, test_env), config, generators)
            unless_stepped.pop_all()
            return task, shape

    def reports(self) -> Iterator[Report]:
        """Run to the end, yielding a report at each logging period and best test, and at the end."""
        config = self.config
        self._started = time.perf_counter()
        self._report()
        began = self.steps  # when an episode was last started for a checkpoint
        log, checkpoint = Due(config.log_every_steps, self.steps), Due(config.checkpoint_every_steps, self.steps)
        while not (self._stopping or self._finished()):
            end = min(config.total_steps, log.next, checkpoint.next, self.steps + self._task.steps_at_once)
            best = self._best
            self._learn(int(end) - self.steps)
            if any([log(self.steps), self._best > best]):
                yield self._report()
            if checkpoint(self.steps):
                self._checkpoint()
                if not self._finished():
                    if self._task.length >= self.steps - began:
                        self._warn_of_cut_episode(self.steps - began, "raise it")
                    began = self.steps
                    # With new generators, as in a run resumed from here.
                    self._task.begin(*_drawn(self._seeds(self.steps)))
        if self._last is not None and self._last.steps < self.steps:
            yield self._report()

    def statistics(self) -> Statistics:
        """Return the mean and the maximum over states of the table's best values."""
        values = self.table.max(axis=1)
        return Statistics(math.nan, float(values.mean()), float(values.max()), math.nan, {"q_values": self.table})

    @property
    def updates(self) -> int:
        """How many updates have been made: one with each step."""
        return self.steps

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the table."""
        return {"values": torch.from_numpy(self.table)}

    def close(self) -> None:
        """Release the environments."""
        if hasattr(self, "_task"):
            self._task.close()

    def _learn(self, steps: int) -> None:
        config = self.config
        epsilons = np.array([epsilon(config, self.steps + step) for step in range(steps)])
        tests = Trials(self.steps, config.evaluation_every_steps, config.evaluation_episodes, self._best)
        outcome = self._task.learn(self.table, epsilons, tests)
        before = self.steps
        for total, length, after in outcome.episodes:
            self.steps = before + after
            self._record_episode(Episode(0, total, length))
        self.steps = self.frames = before + outcome.steps
        warn_if_cut(config, outcome.longest_test)
        if not math.isnan(outcome.test_mean):
            self._evaluation = outcome.test_mean
            self._keep_if_best(outcome.test_mean)
        self._best_weights.write(self.steps)

    def _inputs(self) -> str:
        return f"{len(self.table):,} numbered states"

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {"online.values": torch.from_numpy(self.table)}

    def _restore(self, checkpoint: Checkpoint) -> None:
        super()._restore(checkpoint)
        table = checkpoint.tensors["online.values"].numpy()
        if table.shape != self.table.shape:
            raise ValueError(
                f"checkpoint: its table has shape {table.shape}, the environment's is {self.table.shape}; "
                "leave env_id as it was, or start a new run"
            )
        self.table[...] = table
        for name in self._changed.keys() & {"env_id", "env_kwargs"}:
            old, new = self._changed[name]
            warnings.warn(f"{name} was {old}, is {new}; the table keeps its values", stacklevel=2)


def _drawn(seeds: np.random.SeedSequence) -> tuple[list[np.random.Generator], tuple[int, int]]:
    """Return the generators for exploration, and the seeds of the environments: of learning, and of tests."""
    env_seed, test_seed, *own = (int(seed) for seed in seeds.generate_state(4))
    return [np.random.default_rng(seed) for seed in own], (env_seed, test_seed)


@kernel()
def update(table, state, action, reward, discount, next_state, learning_rate):
    """Move one entry towards its target: Q(s,a) <- (1 - alpha) Q(s,a) + alpha (r + discount max Q(s',.)).

    Args:
        table: (num_states, num_actions) float64, changed in place.
        state: s.
        action: a.
        reward: r.
        discount: gamma, or 0 after termination, where the value of the next state is not used.
        next_state: s'.
        learning_rate: alpha, from 0 to 1.
    """
    target = reward + discount * table[next_state].max() if discount else reward
    table[state, action] = (1 - learning_rate) * table[state, action] + learning_rate * target


@kernel()
def _choose(table, state, epsilon, generator):
    """Return an epsilon-greedy action; of equal values, the first."""
    if epsilon > 0 and generator.random() < epsilon:
        return np.int64(generator.random() * table.shape[1])
    return table[state].argmax()


@kernel()
def _draw(cumulative, start, end, generator):
    """Draw an index from `start` up to (not including) `end`, by cumulative probabilities."""
    chance = generator.random()
    index = start
    while index < end - 1 and chance >= cumulative[index]:
        index += 1
    return index


@kernel()
def _first_state(start, generator):
    return _draw(start, 0, start.size, generator)


@kernel()
def _test(table, model, most_steps, episodes, epsilon, generator):
    """Return the mean return of test episodes, and the length of the longest."""
    start, offset, chance, next_state, reward, terminated = model
    total, longest = 0.0, 0
    for _ in range(episodes):
        state = _first_state(start, generator)
        for steps in range(1, most_steps + 1):
            longest = max(longest, steps)
            pair = state * table.shape[1] + _choose(table, state, epsilon, generator)
            outcome = _draw(chance, offset[pair], offset[pair + 1], generator)
            total += reward[outcome]
            state = next_state[outcome]
            if terminated[outcome]:
                break
    return total / episodes, longest


@kernel()
def _learn(
    table,
    model,
    most_steps,
    most_test_steps,
    learning_rate,
    gamma,
    epsilons,
    state,
    length,
    total,
    tests,
    test_epsilon,
    generator,
    test_generator,
):
    returns = np.empty(epsilons.size)
    lengths, ends = np.empty(epsilons.size, np.int64), np.empty(epsilons.size, np.int64)
    start, offset, chance, next_states, rewards, terminal = model
    steps_before, every_steps, test_episodes, best = tests
    ended, test_mean, longest_test, count = 0, np.nan, 0, 0
    while count < epsilons.size:
        action = _choose(table, state, epsilons[count], generator)
        pair = state * table.shape[1] + action
        outcome = _draw(chance, offset[pair], offset[pair + 1], generator)
        next_state, reward, terminated = next_states[outcome], rewards[outcome], terminal[outcome]
        update(table, state, action, reward, 0.0 if terminated else gamma, next_state, learning_rate)
        state, length, total = next_state, length + 1, total + reward
        count += 1
        if terminated or length >= most_steps:
            returns[ended], lengths[ended], ends[ended] = total, length, count
            ended += 1
            state, length, total = _first_state(start, generator), 0, 0.0
        if every_steps and (steps_before + count) % every_steps == 0:
            test_mean, longest = _test(table, model, most_test_steps, test_episodes, test_epsilon, test_generator)
            longest_test = max(longest_test, longest)
            if test_mean > best:
                break
    return count, test_mean, longest_test, state, length, total, returns[:ended], lengths[:ended], ends[:ended]

"""Slow reference implementations of the fast paths, plain enough to be read as their definition; and `fill`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np


class Entry(NamedTuple):
    """What one environment returned at one time step."""

    frame: np.ndarray
    action: int
    reward: float
    terminated: bool
    truncated: bool
    first: bool


class Transition(NamedTuple):
    obs: np.ndarray
    action: int
    reward: float
    discount: float
    next_obs: np.ndarray


@dataclass
class EpisodeReplay:
    """A replay buffer that keeps all that ever happened in each environment, and finds transitions by definition."""

    capacity: int  # frames per environment
    num_envs: int
    stack: int
    n_step: int
    gamma: float
    padding: str
    limit: int | None = None  # transitions per environment, the newest
    history: list[list[Entry]] = field(default_factory=list)
    not_led_to: set[tuple[int, int]] = field(default_factory=set)  # (environment, time step)

    def __post_init__(self) -> None:
        self.history = [[] for _ in range(self.num_envs)]

    def append(self, entries: list[Entry]) -> None:
        for env_index, entry in enumerate(entries):
            self.append_to(env_index, entry)

    def append_to(self, env_index: int, entry: Entry, history: bool = False) -> None:
        if history:
            self.not_led_to.add((env_index, len(self.history[env_index])))
        self.history[env_index].append(entry)

    def transitions(self) -> dict[int, Transition]:
        """Every transition that may be sampled now, by index (time step * num_envs + environment)."""
        found = {}
        for env_index, entries in enumerate(self.history):
            of_env = {}
            for time_step in range(len(entries)):
                transition = self._transition(entries, time_step, env_index)
                if transition is not None:
                    of_env[time_step * self.num_envs + env_index] = transition
            found |= dict([*of_env.items()][-self.limit if self.limit else 0 :])
        return found

    def latest(self) -> list[np.ndarray]:
        return [self._stack(entries, len(entries) - 1)[1] for entries in self.history]

    def _is_held(self, entries: list[Entry], time_step: int) -> bool:
        return len(entries) - self.capacity <= time_step < len(entries)

    def _stack(self, entries: list[Entry], time_step: int) -> tuple[bool, np.ndarray]:
        """The observation that ends at `time_step`, and whether all its frames are still held."""
        start = time_step
        while not entries[start].first:
            start -= 1
        time_steps = [t for t in range(time_step - self.stack + 1, time_step + 1) if t >= start]
        held = all(self._is_held(entries, t) for t in time_steps)
        if not held:
            time_steps = [t for t in time_steps if self._is_held(entries, t)]
        frames = [entries[t].frame for t in time_steps]
        pad = np.zeros_like(frames[0]) if self.padding == "zero" else frames[0]
        return held, np.stack([pad] * (self.stack - len(frames)) + frames)

    def _transition(self, entries: list[Entry], time_step: int, env_index: int) -> Transition | None:
        if not self._is_held(entries, time_step):
            return None
        reward, discount, last = 0.0, 1.0, time_step
        for k in range(1, self.n_step + 1):
            if time_step + k >= len(entries):
                return None  # the window is still open
            entry = entries[time_step + k]
            if entry.first or (env_index, time_step + k) in self.not_led_to:
                break  # the episode was cut off without a flag
            reward += discount * np.float64(np.float32(entry.reward))
            discount *= self.gamma
            last = time_step + k
            if entry.terminated or entry.truncated:
                break
        if last == time_step:
            return None  # no successor in the same episode
        if entries[last].terminated:
            discount = 0.0
        held, obs = self._stack(entries, time_step)
        if not held:
            return None
        return Transition(obs, entries[time_step + 1].action, reward, discount, self._stack(entries, last)[1])


def double_q_update(q_tm1, a_tm1, r_t, discount_t, q_t, selector_t, delta):
    """The Huber loss of double Q-learning, sample by sample, in Python floats."""
    losses = []
    for row in range(len(r_t)):
        best = max(range(len(selector_t[row])), key=lambda a: selector_t[row][a])
        error = r_t[row] + discount_t[row] * q_t[row][best] - q_tm1[row][a_tm1[row]]
        losses.append(0.5 * error**2 if abs(error) <= delta else delta * (abs(error) - 0.5 * delta))
    return losses


def fill(replay, time_steps, ends=(), seed=0):
    """Append random frames in every environment; all episodes terminate at the time steps `ends`."""
    generator = np.random.default_rng(seed)
    num_envs, first = replay.num_envs, np.ones(replay.num_envs, bool)
    zeros, ones, no = np.zeros(num_envs, int), np.ones(num_envs), np.zeros(num_envs, bool)
    for time_step in range(time_steps):
        frame = generator.integers(0, 255, (num_envs, *replay.frame_shape)).astype(replay.dtype)
        end = no | (time_step in ends)
        replay.append(frame, zeros, ones, end, no, first)
        first = end
    return replay


class NaiveSumTree:
    """A list of numbers instead of a tree."""

    def __init__(self, leaves: int) -> None:
        self.values = [0.0] * leaves

    def find(self, mass: float) -> int:
        """The first leaf whose share ends beyond `mass`; the last one that has any share, if none does."""
        last = None
        for leaf, value in enumerate(self.values):
            if value:
                last = leaf
                if mass < value:
                    return leaf
                mass -= value
        assert last is not None
        return last

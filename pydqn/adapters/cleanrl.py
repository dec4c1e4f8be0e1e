"""pydqn's replay buffers for CleanRL's scripts: only the import of the buffer changes."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pydqn._util.checks import flags
from pydqn.adapters._common import check_spaces, column, make_transitions, observations, size_per_env, timeouts
from pydqn.replay.transitions import TransitionReplay


class ReplayBufferSamples(NamedTuple):
    """B transitions, as `dqn.py`, `dqn_atari.py` and other scripts of CleanRL read them."""

    observations: Tensor  # (B, *observation_space.shape)
    actions: Tensor  # (B, 1) int64
    next_observations: Tensor  # (B, *observation_space.shape)
    dones: Tensor  # (B, 1) float32: 1 where the episode was terminated
    rewards: Tensor  # (B, 1) float32


class PrioritizedBatch(NamedTuple):
    """B n-step transitions, as `rainbow_atari.py` reads them, with their discounts in addition."""

    observations: Tensor  # (B, *obs_shape)
    actions: Tensor  # (B, 1) int64
    rewards: Tensor  # (B, 1) float32: discounted sums
    next_observations: Tensor  # (B, *obs_shape)
    dones: Tensor  # (B, 1) bool
    indices: NDArray[np.int64]  # (B,)
    weights: Tensor  # (B, 1) float32
    discounts: Tensor  # (B, 1) float32: gamma^k, or 0 after termination; use it in place of gamma^n * (1 - dones)


class _Buffer:
    """Recovers from what the scripts pass what the environments did, and stores that."""

    def __init__(self, transitions: TransitionReplay, device: torch.device | str, next_step_autoreset: bool) -> None:
        self.transitions = transitions
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(auto if device == "auto" else device)
        self._next_step_autoreset = next_step_autoreset
        self._ended = np.zeros(transitions.num_envs, bool)  # the last step ended the episode
        self._jumped = np.zeros(transitions.num_envs, bool)  # the last step led to an unrelated stack, without an end

    def __len__(self) -> int:
        """Return how many transitions can be sampled now."""
        return len(self.transitions)

    def _column(self, name: str, value: ArrayLike) -> NDArray[Any]:
        return column(self.transitions.num_envs, name, value)

    def _flags(self, name: str, value: ArrayLike | None) -> NDArray[np.bool_]:
        """Return one bool per environment, (num_envs,); None stands for False."""
        return flags(name, self._column(name, np.zeros(self.transitions.num_envs, bool) if value is None else value))

    def _store(
        self,
        obs: ArrayLike,
        next_obs: ArrayLike,
        action: ArrayLike,
        reward: ArrayLike,
        terminated: NDArray[np.bool_],
        truncated: NDArray[np.bool_],
    ) -> None:
        transitions, stacks = self.transitions, self.transitions.stacks
        before, after = observations(transitions, "obs", obs), observations(transitions, "next_obs", next_obs)
        actions, rewards = self._column("action", action), self._column("reward", reward)
        moved = transitions.moved_on(before, after)
        keep = ~(self._next_step_autoreset & self._ended)
        # The scripts insert the final observation only where an episode was truncated. After a termination, `next_obs`
        # is the first observation of the next episode. No value depends on it, so its newest frame is stored in place
        # of the final frame.
        for env_index in np.flatnonzero(keep & ~moved & terminated):
            frames = stacks.split(before[env_index : env_index + 1])
            newest = stacks.split(after[env_index : env_index + 1])[:, -1:]
            after = after.copy()
            after[env_index] = stacks.join(np.concatenate([frames[:, 1:], newest], axis=1), transitions.obs_shape)[0]
        jumps = keep & ~moved & ~terminated
        if (jumps & self._jumped).any():
            raise ValueError(
                f"next_obs: expected obs moved on by one frame ({stacks.stack} frames along axis {stacks.axis}), got "
                "something else twice in a row; pass stack=1 for observations that are no stacks of successive frames"
            )
        # A step that leads to an unrelated stack is a reset that the script took for a step (Gymnasium's next-step
        # autoreset). The environment never carried out its action.
        keep &= ~jumps
        self._ended, self._jumped = (terminated | truncated) & keep, jumps
        if len(at := np.flatnonzero(keep)):
            env_indices = None if keep.all() else at
            transitions.append(
                before[at], after[at], actions[at], rewards[at], terminated[at], truncated[at], env_indices
            )

    def _tensors(self, *columns: NDArray[Any]) -> list[Tensor]:
        return [torch.as_tensor(one, device=self.device) for one in columns]


class ReplayBuffer(_Buffer):
    """The replay buffer of CleanRL's DQN scripts, with every frame stored once.

    The scripts do not pass truncations to `add`. They pass terminations, and the final observation of a truncated
    episode as `next_obs`. The buffer recognizes a truncation by the next `obs`, which is then another one.

    The buffer differs from CleanRL's own in three ways: after a termination, `next_observations` do not show the next
    episode (`dones` is 1 there, so no script uses them); a reset that the script took for a step is not stored; and
    `optimize_memory_usage` neither does harm nor is needed.

    Args:
        buffer_size: transitions over all environments. (Very short episodes may leave room for fewer; see
            `pydqn.TransitionReplay`.)
        observation_space: of one environment: a `Box` or `Discrete`.
        action_space: of one environment: a `Discrete`.
        device: where sampled tensors are put: a device of PyTorch, or "auto" for CUDA where there is a GPU.
        n_envs: how many environments step together.
        optimize_memory_usage: accepted and ignored.
        handle_timeout_termination: whether `infos[i]["TimeLimit.truncated"]`, where `infos` is a list, turns a `done`
            into a truncation.
        next_step_autoreset: whether the step after an end is a reset (Gymnasium's `AutoresetMode.NEXT_STEP`) that is
            not to be stored. Stacks of frames show this by themselves. For vector observations, set it and pass
            `truncated` to `add`.
        settings: all other arguments of `pydqn.TransitionReplay`: stack, padding, seed. Without `seed`, one is drawn
            from NumPy's global generator, which the scripts seed.

    Raises:
        ValueError: an argument is out of range, or a space does not fit; the message names it.
    """

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        device: torch.device | str = "auto",
        n_envs: int = 1,
        optimize_memory_usage: bool = False,
        handle_timeout_termination: bool = True,
        *,
        next_step_autoreset: bool = False,
        **settings: Any,
    ) -> None:
        check_spaces(observation_space, action_space)
        self.buffer_size = size_per_env(buffer_size, n_envs)
        self.n_envs = n_envs
        self.handle_timeout_termination = handle_timeout_termination
        shape, settings = observation_space.shape or (), {"gamma": 1.0, **settings}
        transitions = make_transitions(
            self.buffer_size * n_envs, shape, observation_space.dtype, num_envs=n_envs, **settings
        )
        super().__init__(transitions, device, next_step_autoreset)

    def size(self) -> int:
        """Return how many transitions can be sampled now, per environment."""
        return len(self) // self.n_envs

    def add(
        self,
        obs: NDArray[Any],
        next_obs: NDArray[Any],
        action: NDArray[Any],
        reward: NDArray[Any],
        done: NDArray[Any],
        infos: Any = (),
        truncated: ArrayLike | None = None,
    ) -> None:
        """Store one transition of each environment.

        Args:
            obs: (n_envs, *shape): the observations for which the actions were chosen. Reals are rounded to the
                observation space's dtype.
            next_obs: (n_envs, *shape): the observations that followed; the final ones where an episode was truncated.
            action: (n_envs,) integers.
            reward: (n_envs,) real numbers, rounded to float32.
            done: (n_envs,) terminations: booleans, or numbers that are 0 or 1.
            infos: a list of one dictionary per environment, or Gymnasium's dictionary, which is not read.
            truncated: (n_envs,) booleans, if known.

        Raises:
            ValueError: an argument has the wrong shape, dtype or range, or stacks do not follow one another.
        """
        ends, cuts = self._flags("done", done), self._flags("truncated", truncated)
        if self.handle_timeout_termination and isinstance(infos, (list, tuple)) and len(infos) == self.n_envs:
            timeout = timeouts(infos)
            ends, cuts = ends & ~timeout, cuts | timeout
        self._store(obs, next_obs, action, reward, ends, cuts)

    def sample(self, batch_size: int, env: None = None) -> ReplayBufferSamples:
        """Draw `batch_size` transitions uniformly; returns tensors on the device.

        Raises:
            RuntimeError: nothing has been stored yet.
        """
        batch = self.transitions.sample(batch_size, apart=True)
        dones = (batch.discount == 0).astype(np.float32)
        columns = (batch.obs, batch.action[:, None], batch.next_obs, dones[:, None], batch.reward[:, None])
        return ReplayBufferSamples(*self._tensors(*columns))


class PrioritizedReplayBuffer(_Buffer):
    """The replay buffer of CleanRL's `rainbow_atari.py`, with every frame stored once and priorities in a C++ sum tree.

    Import it in place of the class of that name in the script. It differs from that class in two ways:

    * After a termination, the script's class forgets the last n - 1 transitions of the episode. This buffer samples
      them, with their shorter returns. The script's windows may cross a truncation; these never do.
    * A window that a truncation cuts short is discounted by gamma^k, k < n. The script always multiplies by
      gamma^n * (1 - dones); `discounts` holds the right factor.

    Args:
        capacity: transitions over all environments.
        obs_shape: shape of one observation.
        device: where sampled tensors are put: a device of PyTorch, or "auto".
        n_step: steps in a return.
        gamma: discount per step.
        alpha: exponent of the priorities, from 0 to 1.
        beta: exponent of the importance weights, from 0 to 1; the script raises it.
        eps: added to each priority.
        settings: all other arguments of `pydqn.TransitionReplay`: dtype (uint8), stack, padding, num_envs, seed.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    def __init__(
        self,
        capacity: int,
        obs_shape: tuple[int, ...],
        device: torch.device | str,
        n_step: int,
        gamma: float,
        alpha: float = 0.6,
        beta: float = 0.4,
        eps: float = 1e-6,
        **settings: Any,
    ) -> None:
        self.capacity = capacity
        self.n_step, self.gamma, self.alpha, self.eps = n_step, gamma, alpha, eps
        settings = {"dtype": np.uint8, **settings, "n_step": n_step, "gamma": gamma, "alpha": alpha, "beta": beta}
        super().__init__(make_transitions(capacity, obs_shape, prioritized=True, **settings), device, False)

    @property
    def beta(self) -> float:
        """Exponent of the importance weights, from 0 to 1."""
        return self.transitions.frame_replay.beta

    @beta.setter
    def beta(self, value: float) -> None:
        self.transitions.frame_replay.beta = value

    def add(
        self,
        obs: NDArray[Any],
        action: NDArray[Any],
        reward: NDArray[Any],
        next_obs: NDArray[Any],
        done: NDArray[Any],
        truncated: ArrayLike | None = None,
    ) -> None:
        """Store one transition of each environment: see `ReplayBuffer.add`, whose arguments have another order."""
        ends, cuts = self._flags("done", done), self._flags("truncated", truncated)
        self._store(obs, next_obs, action, reward, ends, cuts)

    def sample(self, batch_size: int) -> PrioritizedBatch:
        """Draw `batch_size` transitions in proportion to their priorities; returns tensors on the device.

        Raises:
            RuntimeError: nothing can be sampled yet.
        """
        batch = self.transitions.sample(batch_size, apart=True)
        ends = self.transitions.windows(batch.index).terminated
        columns = (batch.action, batch.reward, ends, batch.weight, batch.discount)
        obs, next_obs = self._tensors(batch.obs, batch.next_obs)
        action, reward, done, weight, discount = self._tensors(*(one[:, None] for one in columns))
        return PrioritizedBatch(obs, action, reward, next_obs, done, batch.index, weight, discount)

    def update_priorities(self, indices: ArrayLike, priorities: ArrayLike) -> None:
        """Set the priorities of sampled transitions.

        Args:
            indices: (B,) as in `PrioritizedBatch.indices`.
            priorities: (B,) TD errors or losses; their absolute values count.
        """
        self.transitions.update_priorities(indices, np.abs(np.asarray(priorities)) + self.eps)

"""pydqn's replay buffer in CleanRL's scripts: only the import of the buffer changes."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pydqn._util.checks import converted, flags
from pydqn.replay.transitions import TransitionReplay


class ReplayBufferSamples(NamedTuple):
    """B transitions, as `dqn.py`, `dqn_atari.py` and others of CleanRL read them."""

    observations: Tensor  # (B, *observation_space.shape)
    actions: Tensor  # (B, 1) int64
    next_observations: Tensor  # (B, *observation_space.shape)
    dones: Tensor  # (B, 1) float32: 1 where the episode was terminated
    rewards: Tensor  # (B, 1) float32


class PrioritizedBatch(NamedTuple):
    """B n-step transitions, as `rainbow_atari.py` reads them, and one thing more."""

    observations: Tensor
    actions: Tensor  # (B, 1) int64
    rewards: Tensor  # (B, 1) float32: discounted sums
    next_observations: Tensor
    dones: Tensor  # (B, 1) bool
    indices: NDArray[np.int64]  # (B,)
    weights: Tensor  # (B, 1) float32
    discounts: Tensor  # (B, 1) float32: gamma^k, or 0 after termination; use it in place of gamma^n * (1 - dones)


class _Steps:
    """Makes of a script's transitions what they were in the environments, and stores them."""

    def __init__(self, transitions: TransitionReplay, next_step_autoreset: bool) -> None:
        self.transitions = transitions
        self._over = np.zeros(transitions.num_envs, bool)  # the step before ended the episode
        self._jumped = np.zeros(transitions.num_envs, bool)  # the step before led elsewhere, unannounced
        self._next_step = next_step_autoreset

    def add(
        self, obs: ArrayLike, next_obs: ArrayLike, action: ArrayLike, reward: ArrayLike, terminated: Any, truncated: Any
    ) -> None:
        ours = self.transitions
        before, after = self._observations("obs", obs), self._observations("next_obs", next_obs)
        columns = {"action": action, "reward": reward, "done": terminated, "truncated": truncated}
        actions, rewards, ends, cuts = (self._column(name, column) for name, column in columns.items())
        moved = ours.moved_on(before, after)
        keep = ~(self._next_step & self._over)
        # Scripts put in the final observation only where an episode was truncated. After a termination the first one
        # of the next episode stands there, which no value depends on: its newest frame takes the final frame's place.
        for env_index in np.flatnonzero(keep & ~moved & ends):
            frames = ours.stacks.split(before[env_index : env_index + 1])
            newest = ours.stacks.split(after[env_index : env_index + 1])[:, -1:]
            after = after.copy()
            after[env_index] = ours.stacks.join(np.concatenate([frames[:, 1:], newest], axis=1), ours.shape)[0]
        jumps = keep & ~moved & ~ends
        if (jumps & self._jumped).any():
            raise ValueError(
                f"next_obs: expected obs moved on by one frame ({ours.stacks.stack} frames along axis "
                f"{ours.stacks.axis}), got something else twice in a row; pass stack=1 for observations that are no "
                "stacks of successive frames"
            )
        # A step that leads to another stack altogether is a reset that was taken for a step (Gymnasium's next-step
        # autoreset): its action was never carried out.
        keep &= ~jumps
        self._over, self._jumped = (ends | cuts) & keep, jumps
        env_indices = np.flatnonzero(keep)
        if len(env_indices):
            obs, next_obs, action, reward, ended, cut = (
                column[env_indices] for column in (before, after, actions, rewards, ends, cuts)
            )
            ours.add(obs, next_obs, action, reward, ended, cut, None if keep.all() else env_indices)

    def flags(self, name: str, value: ArrayLike) -> NDArray[np.bool_]:
        """Return one bool per environment, (num_envs,), whatever shape they come in."""
        return flags(name, self._column(name, value))

    def _observations(self, name: str, value: ArrayLike) -> NDArray[Any]:
        ours, array = self.transitions, np.asarray(value)
        expected = (ours.num_envs, *ours.shape)
        if array.shape == ours.shape and ours.num_envs == 1:
            array = array[None]
        if array.shape != expected:
            raise ValueError(f"{name}: expected shape {expected}, got shape {array.shape}")
        return converted(name, array, ours.frame_replay.dtype, rounded=True)

    def _column(self, name: str, value: ArrayLike) -> NDArray[Any]:
        array, count = np.asarray(value), self.transitions.num_envs
        if array.size != count:
            raise ValueError(f"{name}: expected shape ({count},), got shape {array.shape}")
        return array.reshape(count)


class ReplayBuffer:
    """What CleanRL's DQN scripts call, every frame stored once.

    Truncations never reach its `add`: the scripts pass terminations, and the final observation of a truncated episode
    as `next_obs`. They are recovered, since the next `obs` is then another one.

    Differs from CleanRL's own buffer in this: after a termination `next_observations` are not the first ones of the
    next episode (nobody reads them: `dones` is 1); a reset that was taken for a step is not stored; and
    `optimize_memory_usage` neither does harm nor is needed.

    Args:
        buffer_size: transitions, over all environments (see `pydqn.TransitionReplay` on very short episodes).
        observation_space: of one environment: a `Box` or `Discrete`.
        action_space: of one environment: a `Discrete`.
        device: where samples go; PyTorch's name, or "auto".
        n_envs: environments that step together.
        optimize_memory_usage: accepted and not needed.
        handle_timeout_termination: whether `infos[i]["TimeLimit.truncated"]`, where `infos` is a list, makes a `done`
            no termination.
        next_step_autoreset: that the step after an end is a reset (Gymnasium's `AutoresetMode.NEXT_STEP`) and not to
            be stored. Only vector observations need to be told, and then `truncated`, too.
        settings: all others of `pydqn.TransitionReplay`: stack, padding, seed (drawn from NumPy's global generator
            otherwise, which the scripts seed).

    Raises:
        ValueError: an argument is out of range, or a space is not one that fits.
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
        if not isinstance(action_space, spaces.Discrete):
            raise ValueError(f"action_space: expected Discrete, got {action_space}")
        if observation_space.shape is None:
            raise ValueError(f"observation_space: expected one array, got {observation_space}")
        self.buffer_size = max(buffer_size // n_envs, 1)
        self.n_envs = n_envs
        self.device = _device(device)
        self.handle_timeout_termination = handle_timeout_termination
        settings.setdefault("seed", int(np.random.randint(2**31)))  # noqa: NPY002
        self.transitions = TransitionReplay(
            self.buffer_size * n_envs,
            observation_space.shape,
            observation_space.dtype or np.float32,
            num_envs=n_envs,
            **{"gamma": 1.0, **settings},
        )
        self._steps = _Steps(self.transitions, next_step_autoreset)

    def __len__(self) -> int:
        """Return how many transitions can be sampled now."""
        return len(self.transitions)

    def size(self) -> int:
        """Return how many transitions can be sampled now, per environment."""
        return len(self.transitions) // self.n_envs

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
        """Store a transition of each environment; leading axis n_envs on all.

        Args:
            obs: what the actions were chosen for. Reals are rounded to the observation space's dtype.
            next_obs: what they led to: the final observation where an episode was truncated.
            action: (n_envs,) integers.
            reward: (n_envs,).
            done: (n_envs,) terminations.
            infos: Gymnasium's dictionary, which is not read, or a list of one each.
            truncated: (n_envs,), where it is known.
        """
        done, cuts = self._steps.flags("done", done), np.zeros(self.n_envs, bool)
        if truncated is not None:
            cuts = self._steps.flags("truncated", truncated)
        if self.handle_timeout_termination and isinstance(infos, (list, tuple)) and len(infos) == self.n_envs:
            timeout = np.array([bool(info.get("TimeLimit.truncated", False)) for info in infos])
            done, cuts = done & ~timeout, cuts | timeout
        self._steps.add(obs, next_obs, action, reward, done, cuts)

    def sample(self, batch_size: int, env: None = None) -> ReplayBufferSamples:
        """Draw `batch_size` transitions: tensors on the device."""
        batch = self.transitions.sample(batch_size, apart=True)
        columns = (
            batch.obs,
            batch.action[:, None],
            batch.next_obs,
            _column(batch.discount == 0),
            batch.reward[:, None],
        )
        return ReplayBufferSamples(*(torch.as_tensor(column, device=self.device) for column in columns))


class PrioritizedReplayBuffer:
    """What CleanRL's `rainbow_atari.py` calls, every frame stored once, priorities in a C++ sum tree.

    Replace the class of that name in the script by this import. It differs from that class in this:

    * After a termination the script's class forgets the last n - 1 transitions of the episode; here they are sampled,
      with the shorter returns that belong to them. Windows never cross a truncation; there they do.
    * A window that a truncation cuts short is discounted by gamma^k, k < n. The script multiplies by gamma^n * (1 -
      dones) whatever happened; `discounts` has the right factor.

    Args:
        capacity: transitions.
        obs_shape: of one observation.
        device: where samples go.
        n_step: steps in a return.
        gamma: discount per step.
        alpha: exponent of the priorities.
        beta: exponent of the importance weights; the script raises it.
        eps: added to priorities.
        settings: all others of `pydqn.TransitionReplay`: dtype (uint8), stack, padding, num_envs, seed.

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
        self.device = _device(device)
        self.n_step, self.gamma, self.alpha, self.eps = n_step, gamma, alpha, eps
        settings.setdefault("seed", int(np.random.randint(2**31)))  # noqa: NPY002
        self.transitions = TransitionReplay(
            capacity, obs_shape, n_step=n_step, gamma=gamma, prioritized=True, alpha=alpha, beta=beta, **settings
        )
        self._steps = _Steps(self.transitions, next_step_autoreset=False)

    def __len__(self) -> int:
        """Return how many transitions can be sampled now."""
        return len(self.transitions)

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
        """Store a transition of each environment (see `ReplayBuffer.add`; mind the order)."""
        done = self._steps.flags("done", done)
        cuts = np.zeros_like(done) if truncated is None else self._steps.flags("truncated", truncated)
        self._steps.add(obs, next_obs, action, reward, done, cuts)

    def sample(self, batch_size: int) -> PrioritizedBatch:
        """Draw `batch_size` transitions by their priorities: tensors on the device."""
        batch = self.transitions.sample(batch_size, apart=True)
        ends = self.transitions.windows(batch.index).terminated
        obs, action, reward, next_obs, done, weight, discount = (
            torch.as_tensor(column, device=self.device)
            for column in (
                batch.obs,
                batch.action[:, None],
                batch.reward[:, None],
                batch.next_obs,
                ends[:, None],
                batch.weight[:, None],
                batch.discount[:, None],
            )
        )
        return PrioritizedBatch(obs, action, reward, next_obs, done, batch.index, weight, discount)

    def update_priorities(self, indices: ArrayLike, priorities: ArrayLike) -> None:
        """Set the priorities of sampled transitions: sizes of TD errors, or losses."""
        self.transitions.update_priorities(indices, np.abs(np.asarray(priorities)) + self.eps)


def _column(flags: NDArray[np.bool_]) -> NDArray[np.float32]:
    return flags.astype(np.float32)[:, None]


def _device(device: torch.device | str) -> torch.device:
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)

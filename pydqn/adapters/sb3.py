"""pydqn's replay buffer in Stable-Baselines3: `DQN(..., replay_buffer_class=ReplayBuffer)`."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import ArrayLike, NDArray
from torch.nn import functional as F

from pydqn._util.checks import converted, flags, integer
from pydqn.replay.frames import Batch
from pydqn.replay.transitions import TransitionReplay

try:
    from stable_baselines3 import DQN
    from stable_baselines3.common.buffers import BaseBuffer
    from stable_baselines3.common.buffers import ReplayBuffer as TheirBuffer
    from stable_baselines3.common.type_aliases import ReplayBufferSamples
    from stable_baselines3.common.vec_env import VecNormalize
except ImportError as error:
    raise ImportError("pydqn.adapters.sb3 needs Stable-Baselines3: pip install 'pydqn[adapters]'") from error


class _Step(NamedTuple):
    """What `ReplayBuffer.add` was given."""

    obs: NDArray[Any]  # (n_envs, *obs_shape)
    next_obs: NDArray[Any]
    action: NDArray[Any]  # (n_envs,)
    reward: NDArray[Any]


class ReplayBuffer(TheirBuffer):
    """Stable-Baselines3's replay buffer with every frame stored once, and time limits told from terminations.

    Give it to `DQN` or sb3-contrib's `QRDQN` as `replay_buffer_class`. What `sample` returns is SB3's own tuple and
    equals what SB3's buffers return for the same transitions, but for this:

    * With `n_steps`, a transition is sampled once its whole window is known, while SB3 cuts the newest windows short.
      (As long as no window is whole, they are cut short here, too.)
    * With `n_steps` and a `VecNormalize` that normalizes rewards, it is their discounted sum that is normalized (and
      clipped), not each of them.
    * SB3's `optimize_memory_usage=True` cannot tell time limits and returns, after the end of each episode, the first
      observation of the next; here it changes nothing.

    `save_replay_buffer` and `load_replay_buffer` work; the file is SB3's: a pickle, to be loaded only from those whom
    you trust. `buffer.save(folder)` and `buffer.restore(folder)` use pydqn's own format, which never runs code.

    Args:
        buffer_size: transitions, over all environments (see `pydqn.TransitionReplay` on very short episodes).
        observation_space: anything that SB3 makes one array of; images as (C, H, W) or (H, W, C). No `Dict`.
        action_space: a `Discrete`.
        device: where samples go; PyTorch's name, or "auto".
        n_envs: environments that step together.
        optimize_memory_usage: accepted and not needed.
        handle_timeout_termination: whether `infos[i]["TimeLimit.truncated"]` makes a `done` no termination.
        n_steps: steps in a return (SB3 wants it here, in `replay_buffer_kwargs`, together with `gamma`).
        gamma: discount per step of n-step returns, that of the model; needed with `n_steps` above 1.
        stack: frames in an observation; None to tell by its shape (`pydqn.replay.transitions.Stacks.of`).
        settings: all others of `pydqn.TransitionReplay`: prioritized, alpha, beta, padding, seed (drawn from NumPy's
            global generator otherwise, which SB3 seeds).

    Raises:
        ValueError: an argument is out of range, or a space is not one that fits.
    """

    transitions: TransitionReplay
    pos: int
    full: bool

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
        n_steps: int = 1,
        gamma: float | None = None,
        stack: int | None = None,
        **settings: Any,
    ) -> None:
        if not isinstance(action_space, spaces.Discrete):
            raise ValueError(f"action_space: expected Discrete, got {action_space}")
        if isinstance(observation_space, spaces.Dict):
            raise ValueError("observation_space: expected one array, got Dict (use SB3's DictReplayBuffer for those)")
        if integer("n_steps", n_steps, 1) > 1 and gamma is None:
            given = f'replay_buffer_kwargs={{"n_steps": {n_steps}, "gamma": ...}}'
            raise ValueError(f"gamma: expected the model's discount, since n_steps is {n_steps}, got None ({given})")
        if n_steps > 1 and "discounts" not in ReplayBufferSamples._fields:
            raise ValueError(
                f"n_steps: expected 1, as this release of Stable-Baselines3 has no n-step returns, got {n_steps}; "
                "update it: pip install -U stable-baselines3"
            )
        # Not TheirBuffer's, which takes memory for two stacks per transition.
        BaseBuffer.__init__(self, buffer_size, observation_space, action_space, device, n_envs)
        self.buffer_size = max(buffer_size // n_envs, 1)
        self.optimize_memory_usage = optimize_memory_usage
        self.handle_timeout_termination = handle_timeout_termination
        self._num_actions = int(action_space.n)
        self.n_steps = n_steps
        self.gamma = 1.0 if gamma is None else gamma
        self._open: list[_Step] = []  # as long as no window is whole, of which SB3 samples nevertheless
        settings.setdefault("seed", int(np.random.randint(2**31)))  # noqa: NPY002
        self.transitions = TransitionReplay(
            self.buffer_size * n_envs,
            self.obs_shape,
            observation_space.dtype or np.float32,
            num_envs=n_envs,
            stack=stack,
            n_step=n_steps,
            gamma=self.gamma if n_steps > 1 else 1.0,  # then 0 says terminated, whatever SB3's gamma
            **settings,
        )
        # SB3 writes to `dones` when `learn` is called again; `timeouts` go with them. Neither is read here.
        self.dones = np.zeros((self.buffer_size, n_envs), np.float32)
        self.timeouts = np.zeros((self.buffer_size, n_envs), np.float32)

    def __len__(self) -> int:
        """Return how many transitions can be sampled now, over all environments."""
        return len(self.transitions)

    def add(
        self,
        obs: NDArray[Any],
        next_obs: NDArray[Any],
        action: NDArray[Any],
        reward: NDArray[Any],
        done: NDArray[Any],
        infos: list[dict[str, Any]],
    ) -> None:
        """Store a transition of each environment; leading axis n_envs on all.

        Args:
            obs: what the actions were chosen for, stacks and all. Reals are rounded to the observation space's dtype.
            next_obs: what they led to: the terminal observation where `done`.
            action: (n_envs,) or (n_envs, 1) integers of the action space.
            reward: (n_envs,), rounded to float32.
            done: (n_envs,) whether the episode is over: booleans, or numbers that are 0 or 1.
            infos: one each; "TimeLimit.truncated" tells that it was cut off.

        Raises:
            ValueError: an argument has the wrong shape, dtype or range (see `pydqn.TransitionReplay.add`).
        """
        step = _Step(
            self._observations("obs", obs),
            self._observations("next_obs", next_obs),
            self._column("action", action),
            self._column("reward", reward),
        )
        ends, timeout = flags("done", self._column("done", done)), np.zeros(self.n_envs, bool)
        if step.action.dtype.kind in "iu" and max(step.action.tolist()) >= self._num_actions:
            raise ValueError(f"action: expected integers of {self.action_space}, got {step.action}")
        if self.handle_timeout_termination:
            timeout = self._column("infos", [bool(info.get("TimeLimit.truncated", False)) for info in infos])
        self.transitions.add(*step, ends & ~timeout, timeout)
        if self.n_steps > 1:
            self._open = [] if len(self.transitions) else [*self._open, _Step(*(column.copy() for column in step))]
        self.dones[self.pos], self.timeouts[self.pos] = ends, timeout
        self.pos += 1
        if self.pos == self.buffer_size:
            self.full, self.pos = True, 0

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> ReplayBufferSamples:
        """Draw transitions: SB3's tuple of tensors on the device, (batch_size, ...).

        Args:
            batch_size: how many.
            env: normalizes observations and rewards.

        Raises:
            RuntimeError: nothing has been added yet.
        """
        if self._open:
            return self._cut_short(*self._draw_open(batch_size), env)
        return self._tensors(self.transitions.sample(batch_size, apart=True), env)

    def sample_weighted(
        self, batch_size: int, env: VecNormalize | None = None
    ) -> tuple[ReplayBufferSamples, torch.Tensor, NDArray[np.int64]]:
        """Draw transitions, with their importance weights, (batch_size, 1), and their indices for their priorities.

        Indices are -1 as long as no window is whole: transitions have no priorities of their own then.
        """
        if self._open:
            samples = self._cut_short(*self._draw_open(batch_size), env)
            return samples, torch.ones(batch_size, 1, device=self.device), np.full(batch_size, -1)
        batch = self.transitions.sample(batch_size, apart=True)
        weight = torch.as_tensor(batch.weight[:, None], device=self.device)
        return self._tensors(batch, env), weight, batch.index

    def update_priorities(self, index: ArrayLike, priority: ArrayLike) -> None:
        """Set the priorities of sampled transitions: positive numbers (see `pydqn.FrameReplay.update_priorities`)."""
        known = np.asarray(index) != -1
        self.transitions.update_priorities(np.asarray(index)[known], np.asarray(priority)[known])

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.transitions.clear()
        self._open = []

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to a folder for `restore`, without pickle (see `pydqn.FrameReplay.save`)."""
        self.transitions.save(path)

    def restore(self, path: str | os.PathLike[str]) -> None:
        """Take over what `save` wrote, in a buffer that was made with the same arguments.

        Episodes that were going on when it was saved end there (see `pydqn.TransitionReplay.restore`).

        Raises:
            ValueError: the folder is damaged, or was written by a buffer with other arguments.
        """
        self.transitions.restore(path)
        held = len(self.transitions) // self.n_envs
        self.pos, self.full = held % self.buffer_size, held >= self.buffer_size
        self._open = []

    def _observations(self, name: str, value: NDArray[Any]) -> NDArray[Any]:
        array, shape = np.asarray(value), (self.n_envs, *self.obs_shape)
        if array.shape == (self.n_envs,) and self.obs_shape == (1,):  # Discrete
            array = array[:, None]
        if array.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got shape {array.shape}")
        return converted(name, array, self.transitions.frame_replay.dtype, rounded=True)

    def _column(self, name: str, value: ArrayLike) -> NDArray[Any]:
        array = np.asarray(value)
        if array.shape == (self.n_envs,):
            return array
        if array.size != self.n_envs:
            raise ValueError(f"{name}: expected shape ({self.n_envs},), got shape {array.shape}")
        return array.reshape(self.n_envs)

    def _get_samples(self, batch_inds: NDArray[Any], env: VecNormalize | None = None) -> ReplayBufferSamples:
        """Return the named transitions; the indices are those of `transitions`."""
        return self._tensors(self.transitions.gather(batch_inds, apart=True), env)

    def _draw_open(self, batch_size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Draw steps, and environments, from those that no window is whole of."""
        size = integer("batch_size", batch_size, 1)
        return np.random.randint(len(self._open), size=size), np.random.randint(self.n_envs, size=size)  # noqa: NPY002

    def _cut_short(
        self, start: NDArray[np.int64], env_index: NDArray[np.int64], env: VecNormalize | None
    ) -> ReplayBufferSamples:
        """Return transitions whose windows end at the newest step, as SB3 does."""
        obs, next_obs, action, reward = (np.stack(column) for column in zip(*self._open, strict=True))
        discounts = self.gamma ** np.arange(len(self._open) + 1)
        steps = len(self._open) - start
        window = np.arange(len(self._open)) - start[:, None]
        weight = np.where(window >= 0, discounts[np.maximum(window, 0)], 0)
        total = (weight * reward[:, env_index].T.astype(np.float32)).sum(axis=1, dtype=np.float64)
        return ReplayBufferSamples(
            self._tensor(self._normalize_obs(obs[start, env_index], env)),
            self._tensor(action[start, env_index].astype(self.action_space.dtype, copy=False)[:, None]),
            self._tensor(self._normalize_obs(next_obs[-1, env_index], env)),
            self._tensor(np.zeros((len(start), 1), np.float32)),  # an episode's end would make windows whole
            self._tensor(self._normalize_reward(total.astype(np.float32)[:, None], env)),
            self._tensor(discounts[steps].astype(np.float32)[:, None]),
        )

    def _tensors(self, batch: Batch, env: VecNormalize | None) -> ReplayBufferSamples:
        dones, discounts = batch.discount == 0, None
        if self.n_steps > 1:
            windows = self.transitions.windows(batch.index)
            dones = windows.terminated
            discounts = (self.gamma ** windows.steps.astype(np.float64)).astype(np.float32)[:, None]
        return ReplayBufferSamples(
            self._tensor(self._normalize_obs(batch.obs, env)),
            self._tensor(batch.action.astype(self.action_space.dtype, copy=False)[:, None]),
            self._tensor(self._normalize_obs(batch.next_obs, env)),
            self._tensor(dones.astype(np.float32)[:, None]),
            self._tensor(self._normalize_reward(batch.reward[:, None], env)),
            *([] if discounts is None else [self._tensor(discounts)]),
        )

    def _tensor(self, array: NDArray[Any]) -> torch.Tensor:
        return torch.as_tensor(array, device=self.device)  # the memory is the batch's own: nobody writes to it again


class PrioritizedDQN(DQN):
    """SB3's `DQN` with prioritized replay (Schaul et al. 2016, https://arxiv.org/abs/1511.05952).

    The losses are weighted, the sizes of the TD errors become the priorities, and beta rises from where the buffer has
    it (`replay_buffer_kwargs={"beta": 0.4, "alpha": 0.6}`) to 1 at the end of training. All arguments are `DQN`'s.
    `n_steps` and `gamma` are those of the returns that the buffer makes, too.

    Raises:
        ValueError: `replay_buffer_class` is not `ReplayBuffer` (or made of it), or `replay_buffer_kwargs` contradict an
            argument of the model.
    """

    replay_buffer: ReplayBuffer
    replay_buffer_class: type[TheirBuffer] | None
    replay_buffer_kwargs: dict[str, Any]
    n_steps: int

    def _setup_model(self) -> None:
        kind = self.replay_buffer_class or ReplayBuffer
        if not issubclass(kind, ReplayBuffer):
            raise ValueError(
                f"replay_buffer_class: expected pydqn's ReplayBuffer, got {kind.__name__} of {kind.__module__}"
            )
        given, n_steps = self.replay_buffer_kwargs, getattr(self, "n_steps", 1)  # older releases have none
        ours: dict[str, Any] = {"prioritized": True, "gamma": self.gamma}
        if n_steps > 1:  # 1 may be what nobody said
            ours["n_steps"] = n_steps
        for name in [name for name in ours if name in given and given[name] != ours[name]]:
            instead = "use SB3's DQN" if name == "prioritized" else f"give {name} to the model"
            expected = f"expected {name}={ours[name]!r}, as of the model, got {given[name]!r}"
            raise ValueError(f"replay_buffer_kwargs: {expected}; {instead}")
        self.priority_beta = float(given.get("beta", 0.4))
        # SB3 says that a buffer of another class ignores `n_steps`. This one does not.
        self.replay_buffer_class, self.replay_buffer_kwargs, self.n_steps = kind, {**given, **ours}, 1
        try:
            super()._setup_model()
        finally:
            self.replay_buffer_kwargs, self.n_steps = given, n_steps

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        """Take gradient steps, as SB3's `DQN` does, weighted."""
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        buffer, losses = self.replay_buffer, []
        progress = min(max(1 - self._current_progress_remaining, 0.0), 1.0)
        buffer.transitions.frame_replay.beta = self.priority_beta + (1 - self.priority_beta) * progress
        for _ in range(gradient_steps):
            batch, weight, index = buffer.sample_weighted(batch_size, self._vec_normalize_env)
            with torch.no_grad():
                following = self.q_net_target(batch.next_observations).amax(dim=1, keepdim=True)
                discounts = getattr(batch, "discounts", None)  # older releases have none
                discount = self.gamma if discounts is None else discounts
                target = batch.rewards + (1 - batch.dones) * discount * following
            values = self.q_net(batch.observations).gather(1, batch.actions.long())
            loss = (weight * F.smooth_l1_loss(values, target, reduction="none")).mean()
            self.policy.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
            self.policy.optimizer.step()
            errors = (target - values.detach()).abs().squeeze(1)
            buffer.update_priorities(index, (errors + 1e-6).cpu().numpy())
            losses.append(loss.item())
        self._n_updates += gradient_steps
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("train/loss", np.mean(losses))
        self.logger.record("train/priority_beta", buffer.transitions.frame_replay.beta)

"""pydqn's replay buffer for Stable-Baselines3: `DQN(..., replay_buffer_class=ReplayBuffer)`."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import ArrayLike, NDArray
from torch.nn import functional as F

from pydqn._util.checks import flags, integer
from pydqn.adapters._common import check_spaces, column, make_transitions, observations, size_per_env, timeouts
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
    """One step of all environments."""

    obs: NDArray[Any]  # (n_envs, *obs_shape)
    next_obs: NDArray[Any]  # (n_envs, *obs_shape)
    action: NDArray[Any]  # (n_envs,)
    reward: NDArray[Any]  # (n_envs,)


class ReplayBuffer(TheirBuffer):
    """Stable-Baselines3's replay buffer with every frame stored once, and time limits told from terminations.

    Pass it to `DQN` or sb3-contrib's `QRDQN` as `replay_buffer_class`. `sample` returns SB3's own tuple. Its contents
    equal what SB3's buffers return for the same transitions, with these differences:

    * With `n_steps`, a transition is sampled once its whole window is known, while SB3 cuts the newest windows short.
      (Until the first window is whole, this buffer cuts them short, too.)
    * With `n_steps` and a `VecNormalize` that normalizes rewards, the discounted sum of the rewards is normalized (and
      clipped), not each reward.
    * SB3's `optimize_memory_usage=True` ignores time limits and returns, after the end of each episode, the first
      observation of the next one. Here the argument changes nothing.

    `save_replay_buffer` and `load_replay_buffer` work. They write SB3's format, a pickle: load it only from people whom
    you trust. `buffer.save(folder)` and `buffer.restore(folder)` use pydqn's own format, which never runs code.

    Args:
        buffer_size: transitions over all environments. (Very short episodes may leave room for fewer; see
            `pydqn.TransitionReplay`.)
        observation_space: any space whose observations SB3 turns into one array; images as (C, H, W) or (H, W, C). A
            `Dict` is refused.
        action_space: a `Discrete`.
        device: where sampled tensors are put: a device of PyTorch, or "auto".
        n_envs: how many environments step together.
        optimize_memory_usage: accepted and ignored.
        handle_timeout_termination: whether `infos[i]["TimeLimit.truncated"]` turns a `done` into a truncation.
        n_steps: steps in a return. SB3 passes it here by `replay_buffer_kwargs`, together with `gamma`.
        gamma: discount per step of n-step returns, equal to the model's; required with `n_steps` above 1.
        stack: frames in an observation; None to tell by its shape (see `pydqn.TransitionReplay`).
        settings: all other arguments of `pydqn.TransitionReplay`: prioritized, alpha, beta, padding, seed. Without
            `seed`, one is drawn from NumPy's global generator, which SB3 seeds.

    Raises:
        ValueError: an argument is out of range, or a space does not fit; the message names it.
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
        self._num_actions = check_spaces(observation_space, action_space, " (SB3's DictReplayBuffer takes a Dict)")
        if integer("n_steps", n_steps, 1) > 1 and gamma is None:
            given = f'replay_buffer_kwargs={{"n_steps": {n_steps}, "gamma": ...}}'
            raise ValueError(f"gamma: expected the model's discount, since n_steps is {n_steps}, got None ({given})")
        if n_steps > 1 and "discounts" not in ReplayBufferSamples._fields:
            raise ValueError(
                f"n_steps: expected 1, as this release of Stable-Baselines3 has no n-step returns, got {n_steps}; "
                "update it: pip install -U stable-baselines3"
            )
        # SB3's ReplayBuffer.__init__ would allocate two stacks per transition.
        BaseBuffer.__init__(self, buffer_size, observation_space, action_space, device, n_envs)
        self.buffer_size = size_per_env(buffer_size, n_envs)
        self.optimize_memory_usage = optimize_memory_usage
        self.handle_timeout_termination = handle_timeout_termination
        self.n_steps = n_steps
        self.gamma = 1.0 if gamma is None else gamma
        self._open: list[_Step] = []  # the steps until the first window is whole: SB3 samples them already
        self.transitions = make_transitions(
            self.buffer_size * n_envs,
            self.obs_shape,
            observation_space.dtype,
            num_envs=n_envs,
            stack=stack,
            n_step=n_steps,
            gamma=self.gamma if n_steps > 1 else 1.0,  # so that a discount of 0 always means terminated
            **settings,
        )
        # SB3 writes to `dones` and `timeouts` when `learn` is called again. This class does not read them.
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
        """Store one transition of each environment.

        Args:
            obs: (n_envs, *obs_shape): the observations for which the actions were chosen. Reals are rounded to the
                observation space's dtype.
            next_obs: (n_envs, *obs_shape): the observations that followed; the terminal ones where `done`.
            action: (n_envs,) or (n_envs, 1) integers of the action space.
            reward: (n_envs,) real numbers, rounded to float32.
            done: (n_envs,) whether the episode is over: booleans, or numbers that are 0 or 1.
            infos: n_envs dictionaries; "TimeLimit.truncated" says that a time limit cut the episode off.

        Raises:
            ValueError: an argument has the wrong shape, dtype or range (see `pydqn.TransitionReplay.append`).
        """
        step = _Step(
            observations(self.transitions, "obs", obs),
            observations(self.transitions, "next_obs", next_obs),
            column(self.n_envs, "action", action),
            column(self.n_envs, "reward", reward),
        )
        ends, timeout = flags("done", column(self.n_envs, "done", done)), np.zeros(self.n_envs, bool)
        if step.action.dtype.kind in "iu" and max(step.action.tolist()) >= self._num_actions:
            raise ValueError(f"action: expected integers of {self.action_space}, got {step.action}")
        if self.handle_timeout_termination:
            timeout = column(self.n_envs, "infos", timeouts(infos))
        self.transitions.append(*step, ends & ~timeout, timeout)
        if self.n_steps > 1:
            self._open = [] if len(self.transitions) else [*self._open, _Step(*(part.copy() for part in step))]
        self.dones[self.pos], self.timeouts[self.pos] = ends, timeout
        self.pos += 1
        if self.pos == self.buffer_size:
            self.full, self.pos = True, 0

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> ReplayBufferSamples:
        """Draw transitions, by priority if the buffer is prioritized.

        Args:
            batch_size: how many.
            env: normalizes observations and rewards; None to return them as they are.

        Returns:
            SB3's tuple of tensors on the device, (batch_size, ...) each.

        Raises:
            RuntimeError: nothing has been added yet.
        """
        if self._open:
            return self._cut_short(*self._draw_open(batch_size), env)
        return self._tensors(self.transitions.sample(batch_size, apart=True), env)

    def sample_weighted(
        self, batch_size: int, env: VecNormalize | None = None
    ) -> tuple[ReplayBufferSamples, torch.Tensor, NDArray[np.int64]]:
        """Draw transitions as `sample` does.

        Returns:
            The samples; float32 importance weights, (batch_size, 1); and int64 indices for `update_priorities`,
            (batch_size,). Until the first window is whole, transitions have no priorities, and indices are -1.
        """
        if self._open:
            samples = self._cut_short(*self._draw_open(batch_size), env)
            return samples, torch.ones(batch_size, 1, device=self.device), np.full(batch_size, -1)
        batch = self.transitions.sample(batch_size, apart=True)
        weight = torch.as_tensor(batch.weight[:, None], device=self.device)
        return self._tensors(batch, env), weight, batch.index

    def update_priorities(self, index: ArrayLike, priority: ArrayLike) -> None:
        """Set the priorities of sampled transitions to positive numbers (see `pydqn.FrameReplay.update_priorities`)."""
        known = np.asarray(index) != -1
        self.transitions.update_priorities(np.asarray(index)[known], np.asarray(priority)[known])

    def reset(self) -> None:
        """Forget all transitions."""
        super().reset()
        self.transitions.clear()
        self._open = []

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to a folder for `restore`, without pickle (see `pydqn.FrameReplay.save`)."""
        self.transitions.save(path)

    def restore(self, path: str | os.PathLike[str]) -> None:
        """Take over what `save` wrote, into a buffer that was made with the same arguments.

        Episodes that had not ended when it was saved end there, as environments are not saved.

        Raises:
            ValueError: the folder is damaged, or was written by a buffer with other arguments.
        """
        self.transitions.restore(path)
        held = len(self.transitions) // self.n_envs
        self.pos, self.full = held % self.buffer_size, held >= self.buffer_size
        self._open = []

    def _get_samples(self, batch_inds: NDArray[Any], env: VecNormalize | None = None) -> ReplayBufferSamples:
        """Return the transitions with these indices, which are those of `transitions`."""
        return self._tensors(self.transitions.gather(batch_inds, apart=True), env)

    def _draw_open(self, batch_size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Draw steps and environments, (batch_size,) each, before the first window is whole."""
        size = integer("batch_size", batch_size, 1)
        return np.random.randint(len(self._open), size=size), np.random.randint(self.n_envs, size=size)  # noqa: NPY002

    def _cut_short(
        self, start: NDArray[np.int64], env_index: NDArray[np.int64], env: VecNormalize | None
    ) -> ReplayBufferSamples:
        """Return transitions whose windows end at the newest step, as SB3 cuts them."""
        obs, next_obs, action, reward = (np.stack(parts) for parts in zip(*self._open, strict=True))
        discounts = self.gamma ** np.arange(len(self._open) + 1)
        steps = len(self._open) - start
        window = np.arange(len(self._open)) - start[:, None]
        weight = np.where(window >= 0, discounts[np.maximum(window, 0)], 0)
        total = (weight * reward[:, env_index].T.astype(np.float32)).sum(axis=1, dtype=np.float64)
        return ReplayBufferSamples(
            self._tensor(self._normalize_obs(obs[start, env_index], env)),
            self._tensor(action[start, env_index].astype(self.action_space.dtype, copy=False)[:, None]),
            self._tensor(self._normalize_obs(next_obs[-1, env_index], env)),
            self._tensor(np.zeros((len(start), 1), np.float32)),  # the end of an episode would have made a window whole
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
        return torch.as_tensor(array, device=self.device)  # may share the array, which belongs to this batch alone


class PrioritizedDQN(DQN):
    """SB3's `DQN` with prioritized replay (Schaul et al. 2016, https://arxiv.org/abs/1511.05952).

    Losses are weighted, absolute TD errors become the priorities, and beta rises from the buffer's initial value
    (`replay_buffer_kwargs={"beta": 0.4, "alpha": 0.6}`) to 1 at the end of training. All arguments are those of `DQN`;
    `n_steps` and `gamma` also apply to the returns that the buffer makes.

    Raises:
        ValueError: `replay_buffer_class` is not `ReplayBuffer` or a subclass, or `replay_buffer_kwargs` contradict an
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
        given, n_steps = self.replay_buffer_kwargs, getattr(self, "n_steps", 1)  # older releases lack it
        ours: dict[str, Any] = {"prioritized": True, "gamma": self.gamma}
        if n_steps > 1:  # 1 is the default, which replay_buffer_kwargs may replace
            ours["n_steps"] = n_steps
        for name in [name for name in ours if name in given and given[name] != ours[name]]:
            instead = "use SB3's DQN" if name == "prioritized" else f"give {name} to the model"
            expected = f"expected {name}={ours[name]!r}, as in the model, got {given[name]!r}"
            raise ValueError(f"replay_buffer_kwargs: {expected}; {instead}")
        self.priority_beta = float(given.get("beta", 0.4))
        # SB3 warns that a buffer of another class ignores `n_steps`. This one does not, so SB3 is told 1.
        self.replay_buffer_class, self.replay_buffer_kwargs, self.n_steps = kind, {**given, **ours}, 1
        try:
            super()._setup_model()
        finally:
            self.replay_buffer_kwargs, self.n_steps = given, n_steps

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        """Take gradient steps as SB3's `DQN` does, on weighted losses."""
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        buffer, losses = self.replay_buffer, []
        progress = min(max(1 - self._current_progress_remaining, 0.0), 1.0)
        buffer.transitions.frame_replay.beta = self.priority_beta + (1 - self.priority_beta) * progress
        for _ in range(gradient_steps):
            batch, weight, index = buffer.sample_weighted(batch_size, self._vec_normalize_env)
            with torch.no_grad():
                following = self.q_net_target(batch.next_observations).amax(dim=1, keepdim=True)
                discounts = getattr(batch, "discounts", None)  # older releases lack them
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

"""`load_policy`: the policy of a run, for programs of one's own."""

from __future__ import annotations

import os
import re
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from pydqn.config import Config
from pydqn.envs.base import Envs
from pydqn.envs.frames import FrameLayout
from pydqn.envs.make import make_envs
from pydqn.envs.own import MakeEnv, registered
from pydqn.evaluation.build import MakeNetwork, trained_policy
from pydqn.evaluation.framed import FramedEnv
from pydqn.evaluation.protocols import under_protocol
from pydqn.learning.policy import Policy
from pydqn.learning.records import MASKED, ActionMask, parts_of
from pydqn.runs.layout import env_id_of, load_run

_MASK = "action_mask"


class RunPolicy:
    """A run's policy: `policy(obs)` chooses actions, `policy.values(obs)` values them.

    Observations are stacks of frames as `policy.env()` gives them, (stack, *frame_shape), or a batch of stacks,
    (B, stack, *frame_shape).
    """

    def __init__(self, policy: Policy, config: Config, envs: Envs, make_env: MakeEnv | None) -> None:
        self.config = config
        self.network = policy.network
        self.num_actions, self.action_names = envs.num_actions, envs.action_names
        self.obs_shape, self.dtype = (config.stack, *envs.frame_shape), envs.dtype
        self._policy, self._make_env, self._layout = policy, make_env, envs.layout
        self._generator = np.random.default_rng(config.seed)

    def values(self, obs: ArrayLike) -> NDArray[np.float32]:
        """Return (A,) action values, or (B, A) of a batch; minus infinity for actions that are masked.

        Raises:
            ValueError: the observations have another shape or dtype than `policy.env()` gives.
        """
        values = self._policy.values(self._batch(obs))
        values = np.where(values == MASKED, -np.inf, values).astype(np.float32)
        return values if np.ndim(obs) > len(self.obs_shape) else values[0]

    def _batch(self, obs: ArrayLike) -> NDArray[Any]:
        """Return observations, or one, as a batch."""
        array = np.asarray(obs)
        batched = array.ndim == len(self.obs_shape) + 1
        if array.shape[batched:] != self.obs_shape or array.dtype != self.dtype:
            raise ValueError(
                f"obs: expected {self.dtype} of shape {self.obs_shape}, as policy.env() gives them, or a batch, "
                f"got {array.dtype} of shape {array.shape}"
            )
        return np.ascontiguousarray(array if batched else array[None])

    def __call__(self, obs: ArrayLike, epsilon: float = 0.0) -> Any:
        """Return the number of the best action, or (B,) numbers; with probability `epsilon`, of a random one."""
        values = self.values(obs)
        chosen = Policy.choose(np.maximum(np.atleast_2d(values), MASKED), epsilon, self._generator)
        return chosen if values.ndim == 2 else int(chosen[0])

    def parts(self, obs: ArrayLike) -> dict[str, NDArray[Any]]:
        """Take observations apart: one array (B, stack, *shape) per part, and "action_mask", (B, num_actions) booleans.

        These are the inputs of exported files. Observations that are one array are just "obs".
        """
        array = self._batch(obs)
        if not self._layout.is_record:
            return {"obs": array}
        tensor = torch.from_numpy(array)
        found = [values.numpy() for values in parts_of(tensor, self._layout)]
        named = dict(zip(_input_names(self._layout), found, strict=True))
        if self._layout.masked_actions:
            named[_MASK] = ActionMask(self.num_actions).allowed(tensor).numpy()
        return named

    def env(self, *, seed: int = 0, render: bool = False) -> FramedEnv:
        """Make the run's environment, with its preprocessing, as a Gymnasium environment of such observations.

        Episodes are limited as in the run's evaluations.
        """
        with registered(self._make_env, self.config.env_id):
            return FramedEnv(under_protocol(self.config), seed, render=render)


def _input_names(layout: FrameLayout) -> list[str]:
    """Return a name for each part that a program can use, all different."""
    names: list[str] = []
    for part in layout.parts:
        name = re.sub(r"\W", "_", part.name) or "obs"
        while name in (*names, _MASK):
            name += "_"
        names.append(name)
    return names


def load_policy(
    run: str | os.PathLike[str],
    *,
    weights: str | None = None,
    make_env: MakeEnv | None = None,
    network: MakeNetwork | None = None,
    **overrides: Any,
) -> RunPolicy:
    """Load the policy of a run.

    Args:
        run: folder of the run.
        weights: "best", "last" or "checkpoint"; None for the best ones, or if the run has none yet, the newest.
        make_env: see `pydqn.train`. A run whose environment or network a function made needs that function again.
        network: see `pydqn.train`.
        overrides: fields of the run's `Config` to replace, such as device="cpu".

    Raises:
        ValueError: `run` is not the folder of a run with weights, or an argument is out of range.
    """
    with registered(make_env, env_id_of(run)) as environment:
        config = load_run(run, **overrides, **environment)
        envs = make_envs(under_protocol(config), 1, config.seed)
        try:
            policy, _ = trained_policy(run, config, envs, weights, network)
        finally:
            envs.close()
    policy.network.eval()
    policy.compute_network.eval()
    return RunPolicy(policy, config, envs, make_env)

"""Environments, stepped by hand."""

from __future__ import annotations

import numpy as np

from pydqn import preset
from pydqn.envs.make import make_envs


def reset_envs(num_envs=1, seed=0, **overrides):
    """Make the environments of the pong preset with these fields replaced; returns them and their first frames."""
    envs = make_envs(preset("pong", **{"noop_max_frames": 0, **overrides}), num_envs, seed)
    frames = np.zeros((num_envs, *envs.frame_shape), envs.dtype)
    envs.reset(frames)
    return envs, frames


def step(envs, frames, action):
    """Take one step; writes the frames to `frames`."""
    envs.send(np.asarray(action))
    return envs.recv(frames)

"""What the tests of the Gymnasium wrappers share."""

from __future__ import annotations

import ale_py
import cv2
import gymnasium
import numpy as np

gymnasium.register_envs(ale_py)


def make(game="Breakout", frameskip=1, **options):
    return gymnasium.make(f"ALE/{game}-v5", frameskip=frameskip, **options)


def shrink(gray):
    return cv2.resize(gray, (84, 84), interpolation=cv2.INTER_AREA)


def same(ours, theirs):
    """Compare what `reset` or `step` returned, infos included, for one environment or for many."""
    assert type(ours) is type(theirs)
    if isinstance(ours, tuple):
        assert len(ours) == len(theirs)
        for parts in zip(ours, theirs, strict=True):
            same(*parts)
    elif isinstance(ours, dict):
        assert set(ours) == set(theirs)
        for key in ours:
            same(ours[key], theirs[key])
    elif isinstance(ours, np.ndarray) and ours.dtype == object:
        same(tuple(ours), tuple(theirs))
    elif isinstance(ours, np.ndarray):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    else:
        assert ours == theirs

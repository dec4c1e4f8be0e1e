"""TorchRL's tests of replay buffers with our buffer (see `scripts/upstream-tests`)."""

from __future__ import annotations

PACKAGES, NEEDS, TESTS_IN = ["torchrl"], ["torchrl"], "test"

# The names of tests, in which * and ? stand for anything: why they fail with our buffer, and why with any.
ON_PURPOSE: dict[str, str] = {}
MAY_FAIL: dict[str, str] = {}


def selection(root):
    """Return what pytest is given to choose the tests, which are in the checkout `root`."""
    return [str(root / "test"), "-k", "TensorDictReplayBuffer"]


def substitute():
    """Give TorchRL's names of buffers to ours, before a test imports them."""
    from torchrl import data

    from pydqn.adapters import torchrl as ours

    data.TensorDictReplayBuffer = ours.ReplayBuffer

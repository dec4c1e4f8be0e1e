"""TorchRL's tests of replay buffers with our buffer (see `scripts/upstream-tests`)."""

from __future__ import annotations

PACKAGES, NEEDS, TESTS_IN = ["torchrl"], ["torchrl"], "test"

# Patterns of test names, with the reasons why they fail with our buffer, or with any buffer.
EXPECTED_TO_FAIL: dict[str, str] = {}
MAY_FAIL: dict[str, str] = {}


def selection(root):
    """Return the arguments with which pytest chooses the tests of the checkout `root`."""
    return [str(root / "test"), "-k", "TensorDictReplayBuffer"]


def substitute():
    """Give TorchRL's names of buffers to ours, before a test imports them."""
    from torchrl import data

    from pydqn.adapters import torchrl as ours

    data.TensorDictReplayBuffer = ours.ReplayBuffer

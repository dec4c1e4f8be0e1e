"""Tianshou's tests of buffers and of value-based algorithms with our buffers (see `scripts/upstream-tests`)."""

from __future__ import annotations

PACKAGES, NEEDS, TESTS_IN = ["tianshou"], ["tianshou"], "test"

# The name of a test, in which * stands for anything: why it fails with our buffer.
ON_PURPOSE = {}


def selection(root):
    """Return what pytest is given to choose the tests, which are in the checkout `root`."""
    return [str(root / "test" / "discrete"), "-k", "dqn or c51 or qrdqn or rainbow"]


def substitute():
    """Give Tianshou's names of buffers to ours, before a test imports them."""
    from tianshou import data

    from pydqn.adapters import tianshou as ours

    for name in ours.__all__:
        setattr(data, name, getattr(ours, name))

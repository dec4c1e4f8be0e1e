"""Tianshou's tests of buffers and of value-based algorithms with our buffers (see `scripts/upstream-tests`)."""

from __future__ import annotations

PACKAGES, NEEDS, TESTS_IN = ["tianshou"], ["tianshou"], "test"

# Patterns of test names, with the reasons why they fail with our buffer, or with any buffer.
EXPECTED_TO_FAIL: dict[str, str] = {}
MAY_FAIL: dict[str, str] = {}


def selection(root):
    """Return the arguments with which pytest chooses the tests of the checkout `root`."""
    return [str(root / "test" / "discrete"), "-k", "dqn or c51 or qrdqn or rainbow"]


def substitute():
    """Give Tianshou's names of buffers to ours, before a test imports them."""
    from types import SimpleNamespace

    from tianshou import data

    from pydqn.adapters import tianshou as ours

    ours.theirs = SimpleNamespace(**vars(data))  # ours derive from Tianshou's own classes
    for name in ours.__all__:
        setattr(data, name, getattr(ours, name))

"""Tianshou's tests of buffers and of value-based algorithms with our buffers (see `scripts/upstream-tests`)."""

from __future__ import annotations

PACKAGES, NEEDS, TESTS_IN = ["tianshou"], ["tianshou"], "test"

# The names of tests, in which * and ? stand for anything: why they fail with our buffer, and why with any.
ON_PURPOSE: dict[str, str] = {}
MAY_FAIL: dict[str, str] = {}


def selection(root):
    """Return what pytest is given to choose the tests, which are in the checkout `root`."""
    return [str(root / "test" / "discrete"), "-k", "dqn or c51 or qrdqn or rainbow"]


def substitute():
    """Give Tianshou's names of buffers to ours, before a test imports them."""
    from types import SimpleNamespace

    from tianshou import data

    from pydqn.adapters import tianshou as ours

    ours.theirs = SimpleNamespace(**vars(data))  # ours are made of Tianshou's own
    for name in ours.__all__:
        setattr(data, name, getattr(ours, name))

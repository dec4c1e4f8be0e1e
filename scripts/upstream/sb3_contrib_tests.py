"""sb3-contrib's tests of QR-DQN with our buffer (see `scripts/upstream-tests`)."""

from __future__ import annotations

from sb3_tests import put_in_place

PACKAGES, NEEDS, TESTS_IN = ["sb3-contrib", "stable-baselines3"], ["sb3_contrib"], "tests"
EXPECTED_TO_FAIL = {
    "*test_save_load.py::test_save_load_replay_buffer?QRDQN?": "reads the array buffer.observations",
}
MAY_FAIL: dict[str, str] = {}


def selection(root):
    """Return the arguments with which pytest chooses the tests of the checkout `root`."""
    return [str(root / "tests"), "-k", "qrdqn"]


def substitute():
    """Let QR-DQN make our buffer wherever it would make SB3's own for arrays."""
    from sb3_contrib import QRDQN

    put_in_place(QRDQN)

"""Stable-Baselines3's tests of DQN with our buffer (see `scripts/upstream-tests`)."""

from __future__ import annotations

PACKAGES, NEEDS, TESTS_IN = ["stable-baselines3"], ["stable_baselines3"], "tests"

# Patterns of test names, with the reasons why they fail with our buffer.
EXPECTED_TO_FAIL = {
    "*test_n_step_replay.py::test_run?DQN?": "asks for SB3's own class of n-step buffers; ours is one class for all n",
    "*test_save_load.py::test_save_load_replay_buffer?DQN?": "reads the array buffer.observations, which ours lacks",
}
# The same for tests that fail with any buffer, on some machines.
MAY_FAIL = {
    "*test_callbacks.py::test_callbacks?DQN?": "needs tqdm and rich: pip install 'stable-baselines3[extra]'",
    "*test_logger.py::test_fps_logger?DQN?": "measures speed, which fails on a busy machine",
}


def selection(root):
    """Return the arguments with which pytest chooses the tests of the checkout `root`."""
    return [str(root / "tests"), "-k", "dqn"]


def substitute():
    """Let DQN make our buffer wherever it would make SB3's own for arrays."""
    from stable_baselines3 import DQN

    put_in_place(DQN)


def put_in_place(algorithm):
    """Let an algorithm of SB3 make our buffer."""
    from gymnasium import spaces

    from pydqn.adapters.sb3 import ReplayBuffer

    setup = algorithm._setup_model

    def with_ours(self):
        n_steps = self.n_steps
        if self.replay_buffer_class is None and not isinstance(self.observation_space, spaces.Dict):
            self.replay_buffer_class = ReplayBuffer
            if n_steps > 1:
                self.replay_buffer_kwargs |= {"n_steps": n_steps, "gamma": self.gamma}
                self.n_steps = 1  # SB3 would warn that a buffer of another class ignores it
        setup(self)
        self.n_steps = n_steps

    algorithm._setup_model = with_ours

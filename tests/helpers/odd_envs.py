"""Environments for tests that return wrong values on demand and count themselves."""

from __future__ import annotations

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete

from pydqn import preset

ID = "pydqn-test/Odd-v0"


class Odd(gymnasium.Env):
    """Episodes of five steps; from step 3 of env index 1 on, `reset_answer` and `step_answer` change results."""

    action_space = Discrete(2)
    metadata = {"render_modes": ["rgb_array"], "render_fps": 12}  # noqa: RUF012
    made = 0
    rendered: list[int] = []  # noqa: RUF012
    space = Box(-10, 10, (3,), np.float32)
    good = np.zeros(3, np.float32)
    step_answer = reset_answer = None
    image = np.zeros((8, 10, 3), np.uint8)
    wrong_index, wrong_step = 1, 3

    def __init__(self, render_mode=None):
        self.render_mode, self.observation_space = render_mode, self.space
        self.index, Odd.made = Odd.made, Odd.made + 1
        self.steps = 0

    def wrong(self, answer, good):
        now = self.index == self.wrong_index and self.steps >= self.wrong_step
        return answer(*good) if answer is not None and now else good

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.wrong(type(self).reset_answer, (self.good, {}))

    def step(self, action):
        self.steps += 1
        return self.wrong(type(self).step_answer, (self.good, 1.0, False, self.steps % 5 == 0, {}))

    def render(self):
        Odd.rendered.append(self.index)
        return self.image


class Counted(Odd):
    """Counts the environments that are not closed. Rewards and ends of episodes are random."""

    made = alive = most = 0
    limit = 1_000
    close_fails = False

    def __init__(self, render_mode=None):
        super().__init__(render_mode)
        if Counted.alive >= self.limit:
            raise OSError(f"there are {self.limit} already")
        self.closed = False
        Counted.alive += 1
        Counted.made, Counted.most = Counted.made + 1, max(Counted.most, Counted.alive)

    def step(self, action):
        self.steps += 1
        observation = self.np_random.random(3).astype(np.float32) if isinstance(self.observation_space, Box) else 1
        return observation, float(self.np_random.random()), bool(self.np_random.random() < 0.1), False, {}

    def close(self):
        if not self.closed:
            Counted.alive -= 1
        self.closed = True
        if self.close_fails:
            raise ConnectionError("the simulator\nhas gone")


def config_of(**settings):
    small = {"network": "mlp", "hidden_units": (8,), "stack": 1, "num_envs": 3, "total_steps": 60, "batch_size": 4}
    free = {"learning_starts_steps": 20, "replay_capacity_frames": 100, "stop_return": float("inf"), "device": "cpu"}
    return preset("pong", **{**small, **free, "torch_threads": 1, "env_id": ID, **settings})


def lines_of(capsys):
    out, err = capsys.readouterr()
    return out.splitlines(), [line for line in err.splitlines() if line.startswith("pydqn: ")]

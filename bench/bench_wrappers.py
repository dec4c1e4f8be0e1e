"""Steps of Breakout through Gymnasium wrappers: ours, Gymnasium's pair, and ALE's own 84x84 stacks.

`python bench/bench_wrappers.py` runs them in turns and prints ratios; `--quick` is a short trial.
"""

from __future__ import annotations

import sys
import time

import ale_py
import gymnasium
import numpy as np
import pytest
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv
from gymnasium.wrappers import AtariPreprocessing as TheirPreprocessing
from gymnasium.wrappers import FrameStackObservation
from timing import rates_in_turns

from pydqn.adapters.gymnasium import AtariPreprocessing, AtariVectorFrames

gymnasium.register_envs(ale_py)
NUM_ENVS, STEPS = 8, 50
ACTIONS = np.random.default_rng(0).integers(4, size=(STEPS, NUM_ENVS))
NATIVE = {"img_height": 210, "img_width": 160, "stack_num": 1}


def bare(obs_type="rgb"):
    return gymnasium.make("ALE/Breakout-v5", frameskip=1, repeat_action_probability=0.0, obs_type=obs_type)


def ours(obs_type="ram"):
    return AtariPreprocessing(bare(obs_type), noop_max=0, stack=4)


def gymnasiums():
    return FrameStackObservation(TheirPreprocessing(bare(), noop_max=0), 4)


def ales(**options):
    return AtariVectorEnv("breakout", NUM_ENVS, noop_max=0, use_fire_reset=False, reward_clipping=False, **options)


SINGLE = {"ours": ours, "ours_over_rgb": lambda: ours("rgb"), "gymnasium": gymnasiums}
VECTOR = {
    "ours_over_ale": lambda: AtariVectorFrames(ales(**NATIVE), stack=4),
    "ours_sync": lambda: SyncVectorEnv([ours] * NUM_ENVS),
    "gymnasium_sync": lambda: SyncVectorEnv([gymnasiums] * NUM_ENVS),
    "ale_84x84": ales,
}


def play(env):
    """Take STEPS steps; return the observations."""
    if isinstance(env, gymnasium.vector.VectorEnv):
        return [env.step(actions)[0] for actions in ACTIONS]
    observations = []
    for action in ACTIONS[:, 0]:
        observation, _, terminated, truncated, _ = env.step(action)
        observations.append(observation)
        if terminated or truncated:
            env.reset()
    return observations


def checked(cases, name):
    """Return an environment whose observations equal Gymnasium's as long as no episode ends."""
    env, reference = cases[name](), cases.get("gymnasium", cases.get("gymnasium_sync"))()
    observation, expected = env.reset(seed=0)[0], reference.reset(seed=0)[0]
    if name != "ale_84x84":  # which pads with zeros
        np.testing.assert_array_equal(observation, expected)
        np.testing.assert_array_equal(play(env), play(reference))
    return env


@pytest.mark.parametrize("name", SINGLE)
def bench_one(benchmark, name):
    assert len(benchmark(play, checked(SINGLE, name))) == STEPS


@pytest.mark.parametrize("name", VECTOR)
def bench_eight(benchmark, name):
    assert len(benchmark(play, checked(VECTOR, name))) == STEPS


def main(rounds):
    cases = VECTOR | {"gymnasium_async": lambda: AsyncVectorEnv([gymnasiums] * NUM_ENVS)}
    for kind, num_envs in ((SINGLE, 1), (cases, NUM_ENVS)):

        def rate(env, num_envs=num_envs):
            started = time.perf_counter()
            play(env)
            return num_envs * STEPS / (time.perf_counter() - started)

        envs = {name: checked(kind, name) for name in kind}
        rates = rates_in_turns({name: lambda env=env: rate(env) for name, env in envs.items()}, rounds)
        first = next(iter(rates.values()))
        for name, value in rates.items():
            print(
                f"{num_envs} environments, {name:16s} {value:8,.0f} steps/s; ours: {first / value:.2f} times that",
                flush=True,
            )
        for env in envs.values():
            env.close()


if __name__ == "__main__":
    main(3 if "--quick" in sys.argv else 31)

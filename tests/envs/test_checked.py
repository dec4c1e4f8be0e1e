"""Errors of environments name the env index, the seed, the step, the value and what was expected."""

from __future__ import annotations

import csv
import re

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete, Tuple

from pydqn import preset, train
from pydqn.cli.main import main
from pydqn.envs.discrete import StateEnv
from pydqn.envs.make import make_envs
from tests.helpers.odd_envs import ID, Odd, config_of

# Gymnasium's own checker warns of some of these errors, too.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore:updates take")


def play(steps=12):
    """Step three environments as training does; returns their frames and steps."""
    envs = make_envs(config_of(), 3, 7)
    out = np.zeros((3, *envs.frame_shape), envs.dtype)
    try:
        envs.reset(out)
        results = []
        for _ in range(steps):
            envs.send(np.zeros(3, np.int64))
            results.append((out.copy(), envs.recv(out)))
        return results
    finally:
        envs.close()


class Strange:
    """A type that no space has."""


def step_with(**changes):
    names = ("observation", "reward", "terminated", "truncated", "info")

    def answer(*good):
        return tuple(changes.get(name, value) for name, value in zip(names, good, strict=True))

    return answer


BOX, BYTE_RANGE, PAIR = Box(-10, 10, (3,), np.float32), Box(0, 255, (3,), np.uint8), Tuple((Discrete(3), Discrete(2)))
HUGE = 10**400
# Wrong steps: the observation space, the step's result, and the end of the error.
STEPS = {
    "shape": (BOX, step_with(observation=np.zeros(2)), "observation of shape (2,), expected (3,)"),
    "a matrix": (BOX, step_with(observation=np.zeros((3, 1))), "observation of shape (3, 1), expected (3,)"),
    "a number": (BOX, step_with(observation=1.0), "observation of shape (), expected (3,)"),
    "none": (BOX, step_with(observation=None), "observation of None, expected numbers of dtype float32, shape (3,)"),
    "dict": (BOX, step_with(observation={"a": 1}), "observation of a dict of 1, expected numbers"),
    "text": (BOX, step_with(observation="abc"), "observation of abc (str), expected numbers"),
    "type": (BOX, step_with(observation=Strange()), "observation of a Strange, expected numbers"),
    "ragged": (BOX, step_with(observation=[[1.0], [2.0, 3.0], 4.0]), "observation of a list of 3, expected numbers"),
    "complex": (BOX, step_with(observation=np.zeros(3, complex)), "shape (3,), dtype complex128, expected numbers"),
    "objects": (BOX, step_with(observation=np.array([None] * 3)), "shape (3,), dtype object, expected numbers"),
    "not finite": (BOX, step_with(observation=[0, np.nan, 0]), "returned an observation that is not finite"),
    "floats for bytes": (
        BYTE_RANGE,
        step_with(observation=np.ones(3)),
        "dtype float64, expected numbers of dtype uint8",
    ),
    "signed for bytes": (BYTE_RANGE, step_with(observation=[1, 2, 3]), "a list of 3, expected numbers of dtype uint8"),
    "state too large": (Discrete(4), step_with(observation=4), "observation of 4 (int), expected one of Discrete(4)"),
    "state negative": (Discrete(4), step_with(observation=-1), "observation of -1 (int), expected one of Discrete(4)"),
    "state a float": (Discrete(4), step_with(observation=1.0), "observation of 1.0 (float), expected one of Discrete"),
    "state short": (PAIR, step_with(observation=(1,)), "observation of a tuple of 1, expected one of Tuple(Discrete"),
    "reward none": (BOX, step_with(reward=None), "a reward of None, expected a number"),
    "reward array": (
        BOX,
        step_with(reward=np.ones(1)),
        "a reward of an array of shape (1,), dtype float64, expected",
    ),
    "reward list": (BOX, step_with(reward=[1.0]), "a reward of a list of 1, expected a number"),
    "reward text": (BOX, step_with(reward="1.5"), "a reward of 1.5 (str), expected a number"),
    "reward complex": (BOX, step_with(reward=1j), "a reward of 1j (complex), expected a number"),
    "reward dict": (BOX, step_with(reward={}), "a reward of a dict of 0, expected a number"),
    "reward huge": (BOX, step_with(reward=HUGE), "a reward of 1000"),
    "reward infinite": (BOX, step_with(reward=-np.inf), "a reward that is not finite: -inf"),
    "reward float32 nan": (BOX, step_with(reward=np.float32("nan")), "a reward that is not finite: nan"),
    "terminated none": (BOX, step_with(terminated=None), "terminated = None, expected a bool"),
    "terminated number": (BOX, step_with(terminated=1), "terminated = 1 (int), expected a bool"),
    "terminated array": (
        BOX,
        step_with(terminated=np.array([True])),
        "terminated = an array of shape (1,), dtype bool",
    ),
    "truncated dict": (BOX, step_with(truncated={}), "truncated = a dict of 0, expected a bool"),
    "info none": (BOX, step_with(info=None), "step() returned an info of None, expected a dict as the last value"),
    "info list": (BOX, step_with(info=[]), "step() returned an info of a list of 0, expected a dict"),
    "old step": (
        BOX,
        lambda o, r, e, t, i: (o, r, e, i),
        "step() returned 4 values, as it did before Gym 0.26; expected 5",
    ),
    "three values": (
        BOX,
        lambda o, r, e, t, i: (o, r, e),
        "step() returned 3 values; expected 5: (observation, reward,",
    ),
    "six values": (BOX, lambda *all: (*all, 1), "step() returned 6 values; expected 5"),
    "a list": (BOX, lambda *all: list(all), "step() returned a list of 5; expected 5"),
    "nothing": (
        BOX,
        lambda *all: None,
        "step() returned None; expected 5: (observation, reward, terminated, truncated",
    ),
    "an error": (BOX, lambda *all: {}["no\nkey"], r"step() failed: KeyError: 'no\nkey'"),
    "an error of lines": (BOX, lambda *all: np.zeros(3) @ np.zeros(2), "step() failed: ValueError: matmul"),
    "an exit": (BOX, lambda *all: exit(3), "step() failed: SystemExit: 3"),
}
RESETS = {
    "alone": (BOX, lambda o, i: o, "reset() returned an array of shape (3,), dtype float32, as it did before Gym 0.26"),
    "alone, of two": (PAIR, lambda o, i: (1, 1), "reset() returned an info of 1 (int), expected a dict"),
    "none": (BOX, lambda o, i: None, "reset() returned None; expected 2: (observation, info)"),
    "three values": (BOX, lambda o, i: (o, i, i), "reset() returned 3 values; expected 2: (observation, info)"),
    "shape": (BOX, lambda o, i: (o[:2], i), "reset() returned an observation of shape (2,), expected (3,)"),
    "info": (BOX, lambda o, i: (o, None), "reset() returned an info of None, expected a dict"),
    "an error": (BOX, lambda o, i: 1 / 0, "reset() failed: ZeroDivisionError: division by zero"),
}


def good_of(space):
    return next(
        (np.zeros(3, kind.dtype) for kind in (BOX, BYTE_RANGE) if space == kind), (1, 1) if space == PAIR else 0
    )


def prepare(odd, space, **answers):
    odd.space, odd.good = space, good_of(space)
    for name, answer in answers.items():
        setattr(odd, name, staticmethod(answer))


def seed_of(index):
    return np.random.SeedSequence(7).generate_state(3)[index]


@pytest.mark.parametrize("name", STEPS)
def test_a_wrong_step_is_named(odd, name):
    space, answer, message = STEPS[name]
    prepare(odd, space, step_answer=answer)
    with pytest.raises(RuntimeError) as raised:
        play()
    assert str(raised.value).startswith(f"env_id: {ID}, env index 1 (seed {seed_of(1)}), step 3: ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize("name", RESETS)
def test_a_wrong_reset_is_named(odd, name):
    """The wrong reset is the second one, after an episode of five steps."""
    space, answer, message = RESETS[name]
    prepare(odd, space, reset_answer=answer)
    with pytest.raises(RuntimeError) as raised:
        play()
    assert str(raised.value).startswith(f"env_id: {ID}, env index 1 (seed {seed_of(1)}), step 5: ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_error_of_a_reset_without_a_seed_names_the_signature(odd):
    odd.reset = lambda self: (self.good, {})
    with pytest.raises(RuntimeError, match=r"env index 0 .*TypeError.*expected reset\(self, \*, seed=None"):
        play()


@pytest.mark.parametrize(
    "infos",
    [
        lambda env: {"number": np.zeros(2 + env.index)},
        lambda env: {"number": np.zeros(3) if env.index else "text"},
        lambda env: {"_number": 1, "number": 2} if env.index else {"number": None},
        lambda env: {str(env.index): {"deep": [env.index] * env.index}},
        lambda env: {env.index: Strange()},
    ],
)
def test_infos_may_have_any_contents(odd, infos):
    step = Odd.step
    odd.step = lambda self, action: (*step(self, action)[:4], infos(self))
    odd.reset = lambda self, *, seed=None, options=None: (self.good, infos(self))
    assert len(play()) == 12


@pytest.mark.parametrize(
    ("reward", "value"),
    [(2, 2.0), (np.float32(0.5), 0.5), (np.int64(-3), -3.0), (True, 1.0), (np.array(1.5), 1.5), (np.bool_(False), 0.0)],
)
def test_rewards_may_be_numbers_of_any_type(odd, reward, value):
    prepare(odd, BOX, step_answer=step_with(reward=reward, terminated=np.bool_(False), truncated=np.array(False)))
    odd.wrong_step = 0
    envs = make_envs(config_of(clip_rewards=False), 3, 7)
    out = np.zeros((3, 3), np.float32)
    envs.reset(out)
    envs.send(np.zeros(3, np.int64))
    np.testing.assert_array_equal(envs.recv(out).reward, [1.0, value, 1.0])


@pytest.mark.parametrize(
    ("space", "observation", "frame"),
    [
        (BOX, [1, 2, 3], [1, 2, 3]),
        (BOX, np.array([1.5, 2, 3]), [1.5, 2, 3]),
        (BOX, np.array([True, False, True]), [1, 0, 1]),
        (BYTE_RANGE, np.array([True, False, True]), [1, 0, 1]),
        (Discrete(4), np.int64(2), [0, 0, 1, 0]),
        (Discrete(4), np.array(3), [0, 0, 0, 1]),
        (Discrete(3, start=-1), -1, [1, 0, 0]),
        (PAIR, (2, 0), [0, 0, 0, 0, 1, 0]),
        (PAIR, [2, 0], [0, 0, 0, 0, 1, 0]),  # Gymnasium accepts lists and arrays as tuples
        (PAIR, np.array([2, 0]), [0, 0, 0, 0, 1, 0]),
    ],
)
def test_observations_that_fit_are_accepted(odd, space, observation, frame):
    prepare(odd, space, step_answer=step_with(observation=observation))
    odd.good = -1 if space == Discrete(3, start=-1) else odd.good
    odd.wrong_step = 0
    (_, _), (seen, _) = play(2)
    assert seen[1].tolist() == frame


def test_environments_step_as_those_of_gymnasium_do():
    """In lockstep with Gymnasium's SyncVectorEnv, bit for bit, across the ends of episodes."""
    for env_id, count in (("CartPole-v1", 3), ("MountainCar-v0", 2), ("FrozenLake-v1", 4)):
        envs = make_envs(preset("pong", env_id=env_id, clip_rewards=False), count, 3)
        theirs = gymnasium.make_vec(env_id, num_envs=count, vectorization_mode="sync")
        out = np.zeros((count, *envs.frame_shape), np.float32)
        generator, done, ends = np.random.default_rng(0), np.zeros(count, bool), 0
        envs.reset(out)
        expected, _ = theirs.reset(seed=[int(seed) for seed in np.random.SeedSequence(3).generate_state(count)])
        for _ in range(450):
            shown = np.eye(16, dtype=np.float32)[expected] if expected.ndim == 1 else expected
            np.testing.assert_array_equal(out, shown)
            action = generator.integers(envs.num_actions, size=count)
            envs.send(action)
            step = envs.recv(out)
            expected, reward, terminated, truncated, _ = theirs.step(action)
            np.testing.assert_array_equal(step.first, done)
            np.testing.assert_array_equal(step.reward, reward)
            np.testing.assert_array_equal(step.terminated, terminated)
            np.testing.assert_array_equal(step.truncated, truncated)
            done = terminated | truncated
            ends += int(done.sum())
        assert ends >= 4
        envs.close()
        theirs.close()


def test_a_reset_with_a_seed_equals_new_environments():
    config = preset("pong", env_id="CartPole-v1")

    def trace(envs, seed):
        out = np.zeros((2, 4), np.float32)
        envs.reset(out, seed)
        seen, generator = [out.copy()], np.random.default_rng(0)
        for _ in range(60):
            envs.send(generator.integers(2, size=2))
            step = envs.recv(out)
            seen.append((out.copy(), step.first, step.episodes))
        return repr(seen)

    used = make_envs(config, 2, 5)
    first = trace(used, None)
    assert trace(used, 6) == trace(make_envs(config, 2, 6), None) != first
    assert trace(used, 5) == first


def test_environments_of_one_run_have_the_same_spaces(odd):
    init = Odd.__init__

    def other(self, render_mode=None):
        init(self, render_mode)
        if self.index == 2:
            self.observation_space = Box(-10, 10, (4,), np.float32)

    odd.__init__ = other
    with pytest.raises(ValueError, match=r"env index 2: its observation_space is Box\(.*\(4,\).*env index 0 Box"):
        make_envs(config_of(), 3, 0)


def test_a_constructor_that_fails_is_named_and_the_others_are_closed(odd):
    closed, init = [], Odd.__init__

    def limited(self, render_mode=None):
        init(self, render_mode)
        if self.index == 2:
            raise OSError("all licenses\nare in use")

    odd.__init__ = limited
    odd.close = lambda self: closed.append(self.index)
    with pytest.raises(RuntimeError) as raised:
        make_envs(config_of(), 3, 7)
    assert str(raised.value) == (
        f"env_id: {ID}, env index 2 of 3 (seed {seed_of(2)}) could not be made: OSError: all licenses are in use"
    )
    assert sorted(closed) == [0, 1]


class Bare(gymnasium.Env):
    """Registered without Gymnasium's checker, which would report the missing space."""

    closed = 0

    def close(self):
        Bare.closed += 1


@pytest.mark.parametrize("name", ["observation_space", "action_space"])
@pytest.mark.parametrize("make", [lambda config: make_envs(config, 2, 7), lambda config: StateEnv(config, 7)])
def test_an_environment_without_a_space_is_named_and_closed(monkeypatch, name, make):
    spaces = {"observation_space": Discrete(4), "action_space": Discrete(2)}
    kind = type("Bare", (Bare,), {other: space for other, space in spaces.items() if other != name})
    gymnasium.register("pydqn-test/Bare-v0", kind, disable_env_checker=True)
    monkeypatch.setattr(Bare, "closed", 0)
    try:
        with pytest.raises(RuntimeError, match=rf"Bare-v0, env index 0 .*: AttributeError: .*'{name}'"):
            make(preset("pong", env_id="pydqn-test/Bare-v0"))
    finally:
        del gymnasium.registry["pydqn-test/Bare-v0"]
    assert Bare.closed == 1


def test_tabular_environments_are_checked(odd):
    prepare(odd, Discrete(4), step_answer=step_with(observation=9))
    odd.wrong_index = 0
    env = StateEnv(config_of(agent="tabular", num_envs=1), 5)
    env.reset()
    env.step(0)
    env.step(0)
    with pytest.raises(RuntimeError, match=r"env index 0 \(seed 5\), step 3: step\(\) returned an observation of 9"):
        env.step(0)


@pytest.mark.parametrize("name", ["shape", "old step", "reward none"])
def test_the_command_line_prints_the_error_as_one_line(odd, name, tmp_path, capsys):
    """The steps before the error are saved."""
    space, answer, message = STEPS[name]
    prepare(odd, space, step_answer=answer)
    odd.wrong_step = 15
    options = ["--env-id", ID, "--num-envs", "2", "--network", "mlp", "--stack", "1", "--device", "cpu"]
    run = tmp_path / "run"
    assert main(["train", "pong", *options, "--total-steps", "100", "--logdir", str(run)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pydqn: error: ")]
    assert len(lines) == 1
    assert re.match(rf"pydqn: error: env_id: {ID}, env index 1 \(seed \d+\), step 15: ", lines[0])
    assert message in lines[0]
    with open(run / "progress.csv") as file:
        assert int(list(csv.DictReader(file))[-1]["steps"]) > 20


def test_training_raises_the_error(odd, tmp_path):
    prepare(odd, BOX, reset_answer=lambda o, i: o)
    with pytest.raises(RuntimeError, match=r"env index 1 \(seed \d+\), step 5: reset\(\) returned an array"):
        train(config_of(), tmp_path)

"""How many environments a flattened batch comes from: told by the data where they tell, asked for where they do not."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pydqn.adapters._torchrl.orders import block_names, environments

ASKS = "num_envs: expected to be given, as the first batch of [0-9]+ rows does not tell"


def steps(envs, count, ends=0.0, resets=0.0, seed=0):
    """Steps of environments whose observations never come again, [E, T]: obs, next_obs, done, names of episodes."""
    random = np.random.default_rng(seed)
    new, names = iter(range(10**9)), iter(range(10**9))
    columns = [np.zeros((envs, count), kind) for kind in (np.float32, np.float32, bool, int)]
    for env in range(envs):
        now, name = next(new), next(names)
        for step in range(count):
            after = next(new)
            done = bool(random.random() < ends)
            for column, value in zip(columns, (now, after, done, name), strict=True):
                column[env, step] = value
            now = after
            if done or random.random() < resets:  # a reset that nobody has told of
                now, name = next(new), next(names)
    return columns


def flat(columns, order):
    """Return (n, 1) observations, and so on, as `environments` takes them."""
    obs, after, done, names = (column.T.ravel() if order == "steps" else column.ravel() for column in columns)
    return obs[:, None], after[:, None], done, names


def fits(obs, after, done, names, envs, order):
    """Whether rows are so many environments' steps in this order, looked at one by one."""
    count = len(obs) // envs
    for env in range(envs):
        of = [step * envs + env if order == "steps" else env * count + step for step in range(count)]
        for one, other in pairwise(of):
            same = names[one] == names[other] if names is not None else (after[one] == obs[other]).all()
            if not done[one] and not same:
                return False
    return True


def expected(obs, after, done, names):
    """The least number that fits and says anything, by trying all."""
    count = len(obs)
    for envs in range(1, count + 1):
        told = count % envs == 0 and (envs < count or count == 1)
        if told and any(fits(obs, after, done, names, envs, order) for order in ("blocks", "steps")):
            return envs
    return count if names is not None and len({*names.tolist()}) == count else None


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("order", ["blocks", "steps"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (2, 100), (3, 2), (7, 6), (100, 2), (4, 300)])
def test_both_orders_tell(shape, order, named):
    obs, after, done, names = flat(steps(*shape), order)
    assert environments(obs, after, done, names if named else None) == shape[0]


@settings(max_examples=400, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 8),
    st.sampled_from(["blocks", "steps"]),
    st.booleans(),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    st.sampled_from([0.0, 0.2]),
    st.integers(0, 2**32),
)
def test_as_by_trying_all(envs, count, order, named, ends, resets, seed):
    obs, after, done, names = flat(steps(envs, count, ends, resets, seed), order)
    names = names if named else None
    wanted = expected(obs, after, done, names)
    if wanted is None:
        with pytest.raises(ValueError, match=ASKS):
            environments(obs, after, done, names)
        return
    assert environments(obs, after, done, names) == wanted
    if resets == 0:
        assert wanted <= envs  # more would lose transitions; fewer show later
        assert wanted == envs or done.any()


def test_what_does_not_tell():
    one_step = flat(steps(4, 1), "blocks")
    for columns in (one_step, flat(steps(1, 12, resets=1.0), "blocks"), flat(steps(3, 7, resets=0.4), "steps")):
        obs, after, done, _ = columns
        with pytest.raises(ValueError, match=ASKS):
            environments(obs, after, done)
    assert environments(*one_step) == 4  # four episodes that go on are those of four environments
    obs, after, done, _ = flat(steps(1, 12), "blocks")
    with pytest.raises(ValueError, match=ASKS):
        environments(obs, after, done, np.array([0] * 7 + [1] * 5))
    alike = np.ones((6, 2), np.float32)
    assert environments(alike, alike, np.zeros(6, bool)) == 1


def test_time_comes_last():
    columns = steps(3, 5, ends=0.2, seed=1)
    for named in (False, True):
        obs, after, done, names = flat(columns, "blocks")
        names = names if named else None
        found = block_names((3, 5), obs, after, done, names)
        assert found.tolist() == (names if named else np.repeat([0, 1, 2], 5)).tolist()
        obs, after, done, names = flat(columns, "steps")
        with pytest.raises(ValueError, match=r"data: expected the shape \(environments, steps\), got \(5, 3\)"):
            block_names((5, 3), obs, after, done, names if named else None)
    obs, after, done, _ = flat(steps(3, 5, resets=0.5, seed=1), "blocks")
    assert block_names((3, 5), obs, after, done).tolist() == np.repeat([0, 1, 2], 5).tolist()  # as the shape says

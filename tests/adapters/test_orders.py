"""The number of environments in a flattened batch is found where the data show it, and asked for otherwise."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pydqn.adapters._torchrl.orders import count_environments, ids_of_blocks

ASKS = "num_envs: expected to be given, as the first batch of [0-9]+ rows does not show"


def steps(envs, count, ends=0.0, resets=0.0, seed=0):
    """Steps of environments whose observations never repeat, [E, T]: obs, next_obs, done, ids of episodes."""
    random = np.random.default_rng(seed)
    new, ids = iter(range(10**9)), iter(range(10**9))
    columns = [np.zeros((envs, count), kind) for kind in (np.float32, np.float32, bool, int)]
    for env in range(envs):
        now, episode_id = next(new), next(ids)
        for step in range(count):
            after = next(new)
            done = bool(random.random() < ends)
            for column, value in zip(columns, (now, after, done, episode_id), strict=True):
                column[env, step] = value
            now = after
            if done or random.random() < resets:  # a reset without an end
                now, episode_id = next(new), next(ids)
    return columns


def flat(columns, order):
    """Return the columns flattened, as `count_environments` takes them."""
    obs, after, done, ids = (column.T.ravel() if order == "steps" else column.ravel() for column in columns)
    return obs[:, None], after[:, None], done, ids


def fits(obs, after, done, ids, envs, order):
    """Return whether rows are the steps of `envs` environments in this order, checked one by one."""
    count = len(obs) // envs
    for env in range(envs):
        of = [step * envs + env if order == "steps" else env * count + step for step in range(count)]
        for one, other in pairwise(of):
            same = ids[one] == ids[other] if ids is not None else (after[one] == obs[other]).all()
            if not done[one] and not same:
                return False
    return True


def expected(obs, after, done, ids):
    """Return the least number that fits and is no trivial answer, by trying all."""
    count = len(obs)
    for envs in range(1, count + 1):
        possible = count % envs == 0 and (envs < count or count == 1)
        if possible and any(fits(obs, after, done, ids, envs, order) for order in ("blocks", "steps")):
            return envs
    return count if ids is not None and len({*ids.tolist()}) == count else None


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("order", ["blocks", "steps"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (2, 100), (3, 2), (7, 6), (100, 2), (4, 300)])
def test_both_orders_are_recognized(shape, order, named):
    obs, after, done, ids = flat(steps(*shape), order)
    assert count_environments(obs, after, done, ids if named else None) == shape[0]


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
def test_equals_trying_all_numbers(envs, count, order, named, ends, resets, seed):
    obs, after, done, ids = flat(steps(envs, count, ends, resets, seed), order)
    ids = ids if named else None
    wanted = expected(obs, after, done, ids)
    if wanted is None:
        with pytest.raises(ValueError, match=ASKS):
            count_environments(obs, after, done, ids)
        return
    assert count_environments(obs, after, done, ids) == wanted
    if resets == 0:
        assert wanted <= envs  # more would lose transitions; too few are noticed later
        assert wanted == envs or done.any()


def test_ambiguous_batches():
    one_step = flat(steps(4, 1), "blocks")
    for columns in (one_step, flat(steps(1, 12, resets=1.0), "blocks"), flat(steps(3, 7, resets=0.4), "steps")):
        obs, after, done, _ = columns
        with pytest.raises(ValueError, match=ASKS):
            count_environments(obs, after, done)
    assert count_environments(*one_step) == 4  # four unfinished episodes belong to four environments
    obs, after, done, _ = flat(steps(1, 12), "blocks")
    with pytest.raises(ValueError, match=ASKS):
        count_environments(obs, after, done, np.array([0] * 7 + [1] * 5))
    alike = np.ones((6, 2), np.float32)
    assert count_environments(alike, alike, np.zeros(6, bool)) == 1


def test_time_is_the_last_axis():
    columns = steps(3, 5, ends=0.2, seed=1)
    for named in (False, True):
        obs, after, done, ids = flat(columns, "blocks")
        ids = ids if named else None
        found = ids_of_blocks((3, 5), obs, after, done, ids)
        assert found.tolist() == (ids if named else np.repeat([0, 1, 2], 5)).tolist()
        obs, after, done, ids = flat(columns, "steps")
        with pytest.raises(ValueError, match=r"data: expected the shape \(environments, steps\), got \(5, 3\)"):
            ids_of_blocks((5, 3), obs, after, done, ids if named else None)
    obs, after, done, _ = flat(steps(3, 5, resets=0.5, seed=1), "blocks")
    assert ids_of_blocks((3, 5), obs, after, done).tolist() == np.repeat([0, 1, 2], 5).tolist()  # as the shape says

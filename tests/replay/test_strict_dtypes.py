"""Every value of an array that is passed in stays as it is, or the argument is refused by name."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pydqn import DeviceReplay, FrameReplay, Learner, LearnerSettings, TransitionReplay, preprocess
from pydqn.adapters.cleanrl import PrioritizedReplayBuffer, ReplayBuffer
from pydqn.learning.networks import make_network
from pydqn.learning.policy import Actor, Policy

DTYPES = ["bool", "uint8", "int8", "uint16", "int16", "int32", "uint32", "int64", "uint64"]
DTYPES += ["float16", "float32", "float64"]
NO, ZERO, ONE = np.zeros(1, bool), np.zeros(1, np.int64), np.ones(1)


def through_transitions(dtype, before, after):
    buffer = TransitionReplay(10, before.shape[1:], dtype, stack=1)
    buffer.append(before, after, ZERO, ONE, NO, NO)
    return buffer.sample(1)


def through_frames(dtype, before, after, kind=FrameReplay, **options):
    buffer = kind(10, before.shape[1:], dtype=dtype, stack=1, **options)
    buffer.append(before, ZERO, ONE, NO, NO, ~NO)
    buffer.append(after, ZERO, ONE, NO, NO, NO)
    if kind is DeviceReplay:
        batch = buffer.sample(1)
        frames = buffer.frames.numpy()
        return batch._replace(obs=frames[batch.obs[:, 0]], next_obs=frames[batch.next_obs[:, 0]])
    return buffer.sample(1)


def through_device_frames(dtype, before, after):
    assume(np.dtype(dtype).name not in ("uint16", "uint32", "uint64"))  # not of every PyTorch
    return through_frames(dtype, before, after, DeviceReplay, device="cpu")


def through_some_environments(dtype, before, after):
    buffer = FrameReplay(10, before.shape[1:], dtype=dtype, stack=1, num_envs=2)
    buffer.append_to([1], before, ZERO, ONE, NO, NO, ~NO)
    buffer.append_to([1], after, ZERO, ONE, NO, NO, NO)
    return buffer.sample(1)


def through_sb3(dtype, before, after):
    sb3 = pytest.importorskip("pydqn.adapters.sb3", reason="needs Stable-Baselines3: pip install 'pydqn[adapters]'")
    space = spaces.Box(0, 1, before.shape[1:], np.dtype(dtype))
    buffer = sb3.ReplayBuffer(10, space, spaces.Discrete(2), "cpu", stack=1)
    buffer.add(before, after, ZERO, ONE, NO, [{}])
    return buffer.transitions.sample(1)


def through_cleanrl(dtype, before, after):
    buffer = ReplayBuffer(10, spaces.Box(0, 1, before.shape[1:], np.dtype(dtype)), spaces.Discrete(2), stack=1)
    buffer.add(before, after, ZERO, ONE, NO)
    return buffer.transitions.sample(1)


def through_rainbow(dtype, before, after):
    buffer = PrioritizedReplayBuffer(10, before.shape[1:], "cpu", 1, 0.9, dtype=dtype, stack=1)
    buffer.add(before, ZERO, ONE, after, NO)
    return buffer.transitions.sample(1)


# Whether other dtypes are taken, and whether reals are rounded to the space's dtype, as other libraries' buffers do.
BUFFERS = {
    through_transitions: (True, False),
    through_frames: (False, False),
    through_device_frames: (False, False),
    through_some_environments: (False, False),
    through_sb3: (True, True),
    through_cleanrl: (True, True),
    through_rainbow: (True, True),
}
RANK = {"b": 0, "i": 1, "u": 1, "f": 2}


@pytest.mark.filterwarnings("ignore:.*Box (low|high).*:UserWarning")
@pytest.mark.parametrize("through", BUFFERS, ids=lambda through: through.__name__)
@settings(max_examples=100, deadline=None)
@given(st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.data())
def test_observations_are_kept_or_refused(through, dtype, given_dtype, data):
    elements = {"allow_nan": False} if np.dtype(given_dtype).kind == "f" else {}
    before, after = (
        data.draw(arrays.arrays(given_dtype, (1, 2), elements=arrays.from_dtype(np.dtype(given_dtype), **elements)))
        for _ in range(2)
    )
    converts, rounds = BUFFERS[through]
    both = np.concatenate([before, after])
    try:
        batch = through(dtype, before, after)
    except ValueError as error:
        assert re.match("(frame|obs|next_obs): expected dtype", str(error))  # noqa: PT017
        assert dtype in str(error)  # noqa: PT017
        assert given_dtype in str(error)  # noqa: PT017
        assert dtype != given_dtype
        rank, wanted = RANK[both.dtype.kind], RANK[np.dtype(dtype).kind]
        if converts and rank <= wanted:
            with np.errstate(all="ignore"):
                changed = both.astype(dtype).ravel().tolist() != both.ravel().tolist()
            # Integers beyond the range that a real dtype holds without gaps are refused, even those that it holds.
            assert changed or (rank < wanted and any(abs(value) > 2**11 for value in both.ravel().tolist()))
        return
    for name, value in (("obs", before), ("next_obs", after)):
        kept = getattr(batch, name)
        assert kept.dtype == dtype
        if rounds and np.dtype(dtype).kind == np.dtype(given_dtype).kind == "f":
            np.testing.assert_array_equal(kept.ravel(), value.ravel().astype(dtype))
            assert np.isfinite(kept).all() or not np.isfinite(value).all()
        else:
            assert kept.ravel().tolist() == value.ravel().tolist()  # Python compares its numbers exactly


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        ("uint8", np.array([0.5, 1.0], np.float32)),
        ("uint8", np.array([0.0, 1.0])),  # the same numbers, but another kind of image
        ("uint8", np.array([300, 0])),
        ("uint8", np.array([-1, 0], np.int8)),
        ("int64", np.array([2**63, 0], np.uint64)),
        ("float32", np.array([2**24 + 1, 0])),
        ("float64", np.array([2**53 + 1, 0])),
        ("float64", np.array([2**53 + 1, 0], np.uint64)),
        ("float32", np.array([0.1, 0.0])),
        ("float16", np.array([1e5, 0], np.float32)),
        ("bool", np.array([2, 0], np.uint8)),
        ("float32", np.array([1j, 0])),
        ("float32", np.array([None, 0])),
    ],
)
def test_what_would_change_is_refused(dtype, value):
    buffer = TransitionReplay(10, (2,), dtype)
    good = np.zeros((1, 2), dtype)
    for name, obs, next_obs in (("obs", value[None], good), ("next_obs", good, value[None])):
        with pytest.raises(
            ValueError, match=rf"^{name}: expected dtype {dtype}, .* got dtype {value.dtype}.*convert {name}"
        ):
            buffer.append(obs, next_obs, [0], [1.0], [False], [False])
    assert len(buffer) == 0
    buffer.append(good, good, [0], [1.0], [False], [False])
    assert len(buffer) == 1


def test_reals_that_become_infinite_are_not_rounded():
    buffer = ReplayBuffer(10, spaces.Box(-1, 1, (2,)), spaces.Discrete(2))
    with pytest.raises(ValueError, match="next_obs: expected dtype float32, .* got dtype float64 with the value .*1e"):
        buffer.add(np.zeros((1, 2)), np.array([[1e300, 0]]), ZERO, ONE, NO)
    buffer.add(np.array([[0.1, np.inf]]), np.zeros((1, 2)), ZERO, ONE, NO)
    assert buffer.sample(1).observations.tolist() == [[np.float32(0.1), np.inf]]


COLUMNS = {
    "action": [[0.0], [0.7], [True], ["1"], [None], [2**31], [-1], [2**63]],
    "reward": [[1j], ["1"], [None], [1e300], [np.nan]],
    "terminated": [[0.5], [2], ["no"], [None], [np.nan]],
}


def rows_of(through, name, value):
    columns = {"action": [0], "reward": [1.0], "terminated": [False], name: value}
    obs = np.zeros((1, 2), np.float32)
    if through == "frames":
        buffer = FrameReplay(10, (2,), dtype="float32", stack=1)
        buffer.append(obs, [0], [0.0], [False], [False], [True])
        buffer.append(obs, *columns.values(), [False], [False])
    elif through == "device frames":
        buffer = DeviceReplay(10, (2,), dtype="float32", stack=1, device="cpu")
        buffer.append(obs, [0], [0.0], [False], [False], [True])
        buffer.append(obs, *columns.values(), [False], [False])
    elif through == "transitions":
        TransitionReplay(10, (2,), "float32").append(obs, obs, *columns.values(), [False])
    else:
        sb3 = pytest.importorskip("pydqn.adapters.sb3", reason="needs Stable-Baselines3: pip install 'pydqn[adapters]'")
        kind = sb3.ReplayBuffer if through == "sb3" else ReplayBuffer
        buffer = kind(10, spaces.Box(-1, 1, (2,)), spaces.Discrete(2), "cpu")
        buffer.add(obs, obs, *columns.values(), [{}])


@pytest.mark.parametrize("through", ["frames", "device frames", "transitions", "sb3", "cleanrl"])
@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in COLUMNS.items() for value in values])
def test_columns_are_kept_or_refused(through, name, value):
    said = "done" if through in ("sb3", "cleanrl") and name == "terminated" else name
    with pytest.raises(ValueError, match=f"^{said}: expected"):
        rows_of(through, name, value)
    rows_of(through, "action", np.array([1], np.uint8))
    rows_of(through, "reward", np.array([True]))


@pytest.mark.parametrize("env_indices", [[0.0], [True], [2], [-1], [[0]], [None]])
def test_environments_are_named_by_integers(env_indices):
    buffer = TransitionReplay(10, (2,), "float32", num_envs=2)
    obs = np.zeros((1, 2), np.float32)
    with pytest.raises(ValueError, match="^env_indices: expected different integers from 0 to 1"):
        buffer.append(obs, obs, [0], [0.0], [False], [False], env_indices=env_indices)
    index = buffer.append(obs, obs, [0], [0.0], [False], [False], env_indices=np.array([1], np.uint64))
    assert index.dtype == np.int64


def test_a_refused_transition_does_not_join_two_episodes():
    buffer = TransitionReplay(10, (1,), "float32")
    one, two, other = (np.full((1, 1), number, np.float32) for number in (1, 2, 7))
    buffer.append(one, two, [0], [0.0], [False], [False])
    with pytest.raises(ValueError, match="action"):
        buffer.append(other, other, [-1], [0.0], [False], [False])
    buffer.append(two, one, [0], [0.0], [False], [False])
    batch = buffer.gather(buffer.frame_replay.valid_indices())
    assert batch.obs.ravel().tolist() == [1.0, 2.0]
    assert batch.next_obs.ravel().tolist() == [2.0, 1.0]


@pytest.mark.parametrize(
    ("index", "priority", "message"),
    [
        ([0.0], [1.0], "index: expected a list of integers"),
        ([True], [1.0], "index: expected a list of integers"),
        ([0], ["1"], "priority: expected real numbers"),
        ([0], [1j], "priority: expected real numbers"),
        ([0], [1e300], "priority: expected positive finite float32 numbers"),
        ([0], [1.0, 2.0], "priority: expected shape"),
    ],
)
def test_priorities_are_kept_or_refused(index, priority, message):
    buffer = FrameReplay(10, (2,), dtype="float32", stack=1, prioritized=True)
    for first in (~NO, NO):
        buffer.append(np.zeros((1, 2), np.float32), ZERO, ONE, NO, NO, first)
    with pytest.raises(ValueError, match=f"^{message}"):
        buffer.update_priorities(index, priority)


@pytest.mark.parametrize("name", ["obs", "next_obs", "action", "reward", "discount", "index", "weight"])
def test_batches_to_fill_have_the_dtypes_of_the_buffer(name):
    buffer = FrameReplay(10, (2,), dtype="float32", stack=1)
    for first in (~NO, NO):
        buffer.append(np.zeros((1, 2), np.float32), ZERO, ONE, NO, NO, first)
    batch = buffer.empty_batch(1)
    wrong = batch._replace(**{name: getattr(batch, name).astype(np.float16)})
    for fill in (lambda: buffer.sample(1, wrong), lambda: buffer.gather([0], wrong)):
        with pytest.raises(ValueError, match=f"^{name}: expected dtype"):
            fill()
    with pytest.raises(ValueError, match="^out: expected dtype"):
        buffer.latest(np.zeros((1, 1, 2)))


@pytest.mark.parametrize("name", ["obs", "action", "reward", "discount", "next_obs", "weight"])
def test_the_learner_takes_the_dtypes_of_its_example(name):
    buffer = FrameReplay(10, (2,), dtype="float32", stack=1)
    for first in (~NO, NO):
        buffer.append(np.zeros((1, 2), np.float32), ZERO, ONE, NO, NO, first)
    settings = LearnerSettings(batch_size=4)
    learner = Learner(make_network("mlp", 1, (2,), 2, hidden_units=(4,)), settings, "cpu", buffer.empty_batch(4))
    batch = buffer.sample(4)
    column = getattr(batch, name)
    other = np.int32 if name == "action" else np.float64
    with pytest.raises(ValueError, match=f"^{name}: expected dtype {column.dtype}.* got dtype {np.dtype(other)}"):
        learner.update(batch._replace(**{name: column.astype(other)}))
    learner.update(batch)
    actor = Actor(Policy(learner.online, torch.device("cpu")), buffer.latest())
    with pytest.raises(ValueError, match="^obs: expected dtype float32.* got dtype float64"):
        actor.values(buffer.latest().astype(np.float64))


@pytest.mark.parametrize("kernel", preprocess.KERNELS.values(), ids=preprocess.KERNELS)
@pytest.mark.parametrize("dtype", ["int64", "float32", "bool"])
def test_kernels_take_only_uint8(kernel, dtype):
    shape = (210, 160) if kernel is preprocess.resize_area else (210, 160, 3)
    with pytest.raises(ValueError, match="expected a uint8 array"):
        kernel(np.zeros(shape, dtype))
    with pytest.raises(ValueError, match="out: expected uint8"):
        kernel(np.zeros(shape, np.uint8), out=np.zeros((84, 84), dtype))

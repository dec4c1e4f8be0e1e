"""Wrong arguments and data are refused by name, and nothing is stored in part."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # its own, when it is imported
    pytest.importorskip("torchrl", reason="needs TorchRL: pip install 'pydqn[adapters]'")
    from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

    from pydqn.adapters.torchrl import FrameSampler, FrameStorage, FrameWriter, ReplayBuffer
    from tests.helpers.torchrl_streams import assert_same, rows

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning")]

NAN = rows()
NAN["next", "reward"][3], NAN["action"] = np.nan, torch.arange(10, 15)
WIDE, TWO, NONE = rows(), rows(pixels=torch.rand(5, 3)), rows(key="position")
WIDE["next", "reward"] = torch.ones(5, 2)
TWO["next", "pixels"] = torch.rand(5, 3)
NONE["velocity"], NONE["next", "velocity"] = torch.rand(5, 3), torch.rand(5, 3)
HALF = rows().apply(lambda leaf: leaf.bfloat16() if leaf.shape[1:] == (4,) else leaf)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (rows()[:0], "data: expected at least one transition, got shape (0,)"),
        (rows().exclude(("next", "done")), "('next', 'done'): expected a tensor in every batch, got None"),
        (rows().exclude(("next", "observation")), "observation_key: expected one of"),
        (TWO, "observation_key: expected one of [('observation',), ('pixels',)], got None, which does not say which"),
        (NONE, "observation_key: expected one of [('position',), ('velocity',)], got None"),
        (WIDE, "('next', 'reward'): expected one number per transition, got torch.float64 of shape (5, 2)"),
        (HALF, "('observation',): expected numbers that NumPy knows, got torch.bfloat16 of shape (5, 4)"),
        (NAN, "reward: expected finite"),
    ],
)
def test_bad_data(batch, message):
    rb = ReplayBuffer(100)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        rb.extend(batch)
    assert str(caught.value).startswith(message)
    assert len(rb) == 0
    good = rows()
    assert_same(rb[rb.extend(good.clone())], good)


def test_a_refused_first_batch_leaves_nothing():
    """Not even which entry is the observation."""
    rb = ReplayBuffer(100, num_envs=1)
    bad = rows(key="pixels", shape=(3,))
    bad["next", "reward"][0] = np.nan
    with pytest.raises(ValueError, match="reward: expected finite"):
        rb.extend(bad)
    good = rows()
    assert_same(rb[rb.extend(good.clone())], good)


def changed(key, change):
    batch = rows(extra=torch.arange(5))
    batch[key] = change(batch[key])
    return batch


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        (
            "observation",
            lambda x: x.double() + 1e-9,
            "('observation',): expected float32, as in the first batch",
        ),
        (("next", "observation"), lambda x: x.double() + 1e-9, "('next', 'observation'): expected float32, as"),
        (
            "observation",
            lambda x: x[:, :3],
            "('observation',): expected shape (4,) per transition",
        ),
        (
            "action",
            lambda x: x + 0.5,
            "('action',): expected torch.int64",
        ),
        (
            "action",
            lambda x: x.float() * torch.nan,
            "('action',): expected torch.int64",
        ),
        ("action", lambda x: x[:, None], "('action',): expected shape () per transition"),
        (
            ("next", "reward"),
            lambda x: x.double() + 1e-9,
            "('next', 'reward'): expected torch.float32, as",
        ),
        (("next", "done"), lambda x: x.float() + 0.5, "('next', 'done'): expected torch.bool, as"),
    ],
)
def test_values_that_a_cast_would_change_are_refused(key, change, message):
    rb = ReplayBuffer(100)
    first = rows(extra=torch.arange(5))
    index = rb.extend(first.clone())
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        rb.extend(changed(key, change))
    assert str(caught.value).startswith(message)
    assert_same(rb[:], first)
    if change(first[key]).shape == first[key].shape:  # another dtype is accepted where it holds the same values
        wider = first.clone()
        wider[key] = first[key].double()
        assert_same(rb[rb.extend(wider)], rb[index])


@pytest.mark.parametrize(
    ("first", "later", "fits"),
    [
        (torch.int64, [2.0**63] * 5, False),
        (torch.int64, [-(2.0**63)] * 5, True),
        (torch.int64, [float("inf")] * 5, False),
        (torch.int32, torch.full((5,), 2**31), False),
        (torch.uint8, torch.full((5,), -1), False),
        (torch.uint8, torch.full((5,), 255), True),
        (torch.bool, torch.full((5,), 2), False),
        (torch.float32, torch.full((5,), 2**24 + 1), False),
        (torch.float32, torch.full((5,), 2**24), True),
        (torch.float64, torch.full((5,), 2**53 + 1), False),
        (torch.float64, torch.full((5,), 2**63 - 1), False),
        (torch.float16, torch.full((5,), 1e5), False),
        (torch.float16, torch.full((5,), torch.nan), True),
        (torch.complex64, torch.ones(5), False),
        (torch.float32, torch.ones(5, dtype=torch.complex64), False),
        (torch.float32, torch.ones(5, dtype=torch.bool), True),
    ],
)
def test_entries_take_values_that_they_represent(first, later, fits):
    rb, later = ReplayBuffer(100), torch.as_tensor(later)
    rb.extend(rows(extra=torch.zeros(5, dtype=first)))
    if fits:
        index = rb.extend(rows(extra=later))
        torch.testing.assert_close(rb[index]["extra"].double(), later.double(), rtol=0, atol=0, equal_nan=True)
    else:
        with pytest.raises(ValueError, match=rf"^\('extra',\): expected {first}, as in the first batch"):
            rb.extend(rows(extra=later))
        assert len(rb) == 5


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
@pytest.mark.parametrize("held", [0, 5])
def test_dtypes_that_pytorch_only_stores_are_refused(dtype, held):
    rb, batch = ReplayBuffer(100), rows(extra=torch.zeros(5, dtype=torch.int32))
    if held:
        rb.extend(batch.clone())
    with pytest.raises(ValueError, match=r"^\('extra',\): expected a dtype of which .* got torch.uint"):
        rb.extend(rows(extra=torch.zeros(5, dtype=dtype)))
    assert (len(rb), rb.write_count) == (held, held)
    assert_same(rb[rb.extend(batch.clone())], batch)
    images = rows()
    images["observation"] = images["next", "observation"] = torch.ones(5, 4).to(dtype)
    rb = ReplayBuffer(100)
    assert rb[rb.extend(images)]["observation"].dtype == dtype  # observations may have it


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_flags_may_be_numbers(dtype):
    batch = rows(6)
    batch["next", "done"][2] = batch["next", "truncated"][2] = True
    wanted = batch.clone()
    for name in ("done", "terminated"):
        batch["next", name] = batch["next", name].to(dtype)
    rb = ReplayBuffer(100, n_step=2)
    rb.extend(batch)
    assert rb[:]["steps_to_next_obs"].tolist() == [2, 2, 1, 2, 2]
    assert rb[:]["next", "done"].bool().equal(wanted["next", "done"][[1, 2, 2, 4, 5]])
    bad = rows(6)
    bad["next", "terminated"] = bad["next", "terminated"] + 0.5
    with pytest.raises(ValueError, match=r"\('next', 'terminated'\): expected booleans, or numbers that are 0 or 1"):
        ReplayBuffer(100).extend(bad)


def test_rows_before_a_bad_row_are_stored():
    rb, good = ReplayBuffer(100), rows()
    rb.extend(good.clone())
    with pytest.raises(ValueError, match="reward: expected finite"):
        rb.extend(NAN.clone())
    assert_same(rb[:], torch.cat([good, NAN[:3]]))
    assert rb.write_count == len(rb) == 8
    rb.extend(good.clone())
    assert rb.write_count == len(rb) == 13
    assert_same(rb[:], torch.cat([good, NAN[:3], good]))


def test_bad_arguments():
    for settings, message in (
        ({"capacity": 0}, "capacity: expected an integer of at least 1, got 0"),
        ({"num_envs": 200}, "num_envs: expected an integer of at most 100"),
        ({"n_step": 0}, "n_step: expected an integer of at least 1"),
        ({"alpha": 2.0, "prioritized": True}, "alpha: expected a number from 0 to 1"),
        ({"beta": -1}, "beta: expected a number from 0 to 1"),
        ({"stack": 0}, "stack: expected an integer of at least 1"),
        ({"padding": "none"}, "padding: expected 'zero' or 'first'"),
    ):
        with pytest.raises(ValueError, match=message):
            ReplayBuffer(**{"capacity": 100, **settings})
    rb = ReplayBuffer(100, prioritized=True)
    with pytest.raises(ValueError, match="beta: expected a number from 0 to 1"):
        rb.sampler.beta = 1.5
    rb.extend(rows())
    with pytest.raises(ValueError, match="index: 99 is not a transition that is held now"):
        rb[99]
    with pytest.raises(RuntimeError, match="expected a FrameWriter"):
        rb[0] = rows()[0]
    with pytest.raises(ValueError, match="priority: expected positive"):
        rb.update_priority(torch.tensor([0]), torch.tensor([np.nan]))
    with pytest.raises(RuntimeError, match="expected a FrameWriter"):
        storage = FrameStorage(10)
        TensorDictReplayBuffer(storage=storage, sampler=FrameSampler(storage), collate_fn=list).extend(rows())
    with pytest.raises(AttributeError):
        TensorDictReplayBuffer(storage=LazyTensorStorage(10), writer=FrameWriter()).extend(rows())

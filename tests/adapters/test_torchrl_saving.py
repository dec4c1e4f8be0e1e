"""Saving: hand-made metadata is refused by name, and exponents may change between saving and loading."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # its own, when it is imported
    pytest.importorskip("torchrl", reason="needs TorchRL: pip install 'pydqn[adapters]'")
    from torchrl.data.replay_buffers.scheduler import LinearScheduler

    from pydqn.adapters.torchrl import ReplayBuffer
    from tests.helpers.torchrl_streams import assert_same, rows

from pydqn._util.files import Damaged, read_index, write_index
from pydqn._util.weights import load_weights, save_weights
from pydqn.adapters._torchrl.streams import EpisodeStreams

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning")]
MADE = {"prioritized": True, "n_step": 2, "seed": 3}


def filled(**settings):
    rb = ReplayBuffer(100, batch_size=16, **{**MADE, **settings})
    rb.extend(rows(30))
    rb.update_priority(torch.arange(20), torch.arange(1.0, 21.0))
    return rb


def change(folder, tensors=None, **values):
    """Write other metadata or columns under checksums that are right."""
    manifest = read_index(folder / "streams.json", "pydqn-streams")
    path = folder / f"columns-{manifest['number']}.safetensors"
    columns, state = load_weights(path)
    columns |= tensors or {}
    state |= values
    checksum = save_weights(
        path, {k: v for k, v in columns.items() if v is not None}, {k: v for k, v in state.items() if v != "gone"}
    )
    write_index(folder / "streams.json", "pydqn-streams", {**manifest, "columns": checksum})


SLOTS = torch.zeros(203, dtype=torch.int64)
NONE = "fit replay-1 .*"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shape": 7}, NONE),
        ({"shape": "ab"}, NONE + "shape: expected an integer"),
        ({"shape": [2, 3]}, NONE + r"shape: expected 1 frames of \[4\], got \(2, 3\)"),
        ({"shape": [10**15]}, NONE + "shape: expected 1 frames"),
        ({"shape": [-4]}, NONE + "shape: expected an integer of at least 1"),
        ({"shape": "gone"}, NONE + "'shape'"),
        ({"dtype": "O"}, NONE + "dtype: expected one of"),
        ({"dtype": "float64"}, NONE + "dtype: expected 'float32', got 'float64'"),
        ({"dtype": ["float32"]}, NONE + "dtype: expected one of"),
        ({"num_envs": 10**12}, NONE + "num_envs: expected 1, got 1000000000000"),
        ({"num_envs": True}, NONE + "num_envs: expected 1, got True"),
        ({"stack": "x"}, NONE + "stack: expected 1, got 'x'"),
        ({"padding": None}, NONE + "padding: expected 'zero', got None"),
        ({"counts": None}, NONE),
        ({"counts": [-1]}, NONE + "counts: expected an integer of at least 0"),
        ({"counts": [10**30]}, NONE + "counts: expected an integer of at most"),
        ({"counts": [1, 2]}, "expected the entries .*counts: expected 1, got 2"),
        ({"time_steps": [3]}, "were not saved together"),
        ({"time_steps": "gone"}, NONE + "'time_steps'"),
        ({"notes": "gone"}, NONE + "'notes'"),
        ({"tensors": {"slots": None}}, "expected the entries .*slots"),
        ({"tensors": {"slots": SLOTS[:-1]}}, "expected the entries .*slots: got torch.int64 of shape"),
        ({"tensors": {"slots": SLOTS.float()}}, "expected the entries .*slots: got torch.float32"),
        ({"tensors": {"slots": SLOTS - 1}}, "expected the entries .*slots: expected numbers from 0 to 100"),
        ({"tensors": {"slots": SLOTS + 101}}, "expected the entries .*slots: expected numbers from 0 to 100"),
        (
            {"tensors": {'["action"]': torch.zeros(7)}},
            r"expected the entries .*\['action'\]: expected 101 rows, got shape \(7,\)",
        ),
        ({"tensors": {'["action"]': torch.tensor(1)}}, r"expected 101 rows, got shape \(\)"),
        ({"tensors": {"action": torch.zeros(101)}}, "expected the entries"),
        ({"tensors": {"7": torch.zeros(101)}}, "expected the entries .*expected the name of an entry, got 7"),
    ],
)
def test_hand_made_metadata_is_refused(tmp_path, values, message):
    filled().storage.dumps(tmp_path)
    change(tmp_path, **values)
    with pytest.raises(Damaged, match=message):
        EpisodeStreams.load(tmp_path, 100, **MADE)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"notes": None}, "loads: expected what a FrameStorage saved"),
        ({"notes": {"observation": ["observation"]}}, "loads: expected what a FrameStorage saved.*'written'"),
        ({"notes": {"observation": ["observation"], "written": -1}}, "written: expected an integer of at least 0"),
        ({"notes": {"observation": 7, "written": 3}}, "loads: expected the name of the observation, got 7"),
        ({"notes": {"observation": [7], "written": 3}}, r"loads: expected the name of the observation, got \[7\]"),
        ({"tensors": {'["next", "reward"]': None}}, "loads: expected the entries .*reward.*, which are not there"),
    ],
)
def test_hand_made_notes_are_refused(tmp_path, values, message):
    filled().storage.dumps(tmp_path)
    change(tmp_path, **values)
    rb = filled()
    before = rb[:]
    with pytest.raises(ValueError, match=message):
        rb.storage.loads(tmp_path)
    assert_same(rb[:], before)


@pytest.mark.parametrize("content", [{}, {"number": -1, "columns": [1, 2]}, {"number": 1}, {"number": 1, "columns": 7}])
def test_hand_made_manifests_are_refused(tmp_path, content):
    filled().storage.dumps(tmp_path)
    write_index(tmp_path / "streams.json", "pydqn-streams", content)
    with pytest.raises(Damaged, match=r"streams.json: does not name its files"):
        EpisodeStreams.load(tmp_path, 100, **MADE)


def test_too_little_memory_is_no_damage(tmp_path, monkeypatch):
    filled().storage.dumps(tmp_path)

    def refuse(*_, **__):
        raise MemoryError("no")

    monkeypatch.setattr("pydqn.adapters._torchrl.streams.TransitionReplay", refuse)
    with pytest.raises(MemoryError, match=str(tmp_path)):
        EpisodeStreams.load(tmp_path, 100, **MADE)


def test_saving_again_leaves_one_save(tmp_path):
    rb = filled()
    for number in range(1, 4):
        rb.dumps(tmp_path / "rb")
        kept = sorted(path.name for path in (tmp_path / "rb" / "storage").iterdir())
        assert kept == [f"columns-{number}.safetensors", f"replay-{number}", "streams.json"]
        rb.extend(rows(7))
    again = ReplayBuffer(100, batch_size=16, **MADE)
    again.loads(tmp_path / "rb")
    assert (len(again), again.write_count) == (43, 44)


def test_alpha_may_be_scheduled():
    """As with TorchRL's buffer, held priorities get the new exponent, too."""
    ours = filled(alpha=0.4)
    scheduler = LinearScheduler(ours, "alpha", final_value=0.8, num_steps=4)
    for step in range(1, 6):
        scheduler.step()
        assert ours.sampler.alpha == ours.storage.frame_replay.alpha == pytest.approx(min(0.4 + 0.1 * step, 0.8))
        assert ours.sampler.default_priority == pytest.approx(20)
    held = ours.storage.frame_replay._core.export_priorities(0, 31)[:20]
    np.testing.assert_allclose(held, np.arange(1.0, 21.0) ** 0.8, rtol=1e-7)
    ours.extend(rows(2))  # the newest get the largest so far
    held = ours.storage.frame_replay._core.export_priorities(0, 34)
    assert held.max() == pytest.approx(20**0.8)
    for wrong in (1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match="alpha: expected a number from 0 to 1"):
            ours.sampler.alpha = wrong
    before = ReplayBuffer(100, batch_size=16, **MADE)  # an empty one
    before.sampler.alpha = 0.9
    before.extend(rows(5))
    assert before.sampler.alpha == before.storage.frame_replay.alpha == 0.9
    before.empty()
    assert before.sampler.alpha == 0.9


def test_alpha_away_from_zero():
    """Held transitions stay uniform until they are updated; new ones get the largest priority so far."""
    rb = filled(alpha=0.5)
    rb.sampler.alpha = 0.0
    assert set(rb.storage.frame_replay._core.export_priorities(0, 31).tolist()) == {0.0, 1.0}
    rb.sampler.alpha = 1.0
    held = rb.storage.frame_replay._core.export_priorities(0, 31)
    assert set(held.tolist()) == {0.0, 1.0}
    rb.update_priority(torch.tensor([4]), torch.tensor([9.0]))
    assert rb.storage.frame_replay._core.export_priorities(0, 31)[4] == pytest.approx(9)
    assert rb.sampler.default_priority == pytest.approx(20)


def test_a_refused_state_changes_nothing():
    rb = filled()
    before, state = rb[:].clone(), ReplayBuffer(100, n_step=3).state_dict()
    other = ReplayBuffer(90, n_step=3, gamma=0.5)
    other.extend(rows(20))
    for wrong in (other.storage.state_dict(), {"streams.json": torch.zeros(3, dtype=torch.uint8)}):
        with pytest.raises(ValueError):  # noqa: PT011
            rb.storage.load_state_dict(wrong)
        assert (len(rb), rb.write_count) == (len(before), filled().write_count)
        assert_same(rb[:], before)
    rb.load_state_dict(state)
    assert (len(rb), rb.write_count) == (0, 0)


def test_alpha_is_saved(tmp_path):
    rb = filled(alpha=0.5)
    rb.sampler.alpha, rb.sampler.beta = 0.75, 1.0
    rb.dumps(tmp_path / "rb")
    again = ReplayBuffer(100, batch_size=16, alpha=0.5, **MADE)
    again.loads(tmp_path / "rb")
    assert (again.sampler.alpha, again.sampler.beta) == (0.75, 1.0)
    assert_same(again.sample(), rb.sample(), ())

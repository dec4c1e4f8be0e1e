"""TorchRL's collectors, transforms, threads and checkpoints with our buffer."""

from __future__ import annotations

import copy
import io
import multiprocessing
import warnings

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # its own, when it is imported
    pytest.importorskip("torchrl", reason="needs TorchRL: pip install 'pydqn[adapters]'")
    from torchrl.checkpoint import Checkpoint
    from torchrl.collectors import Collector
    from torchrl.data import TensorDictReplayBuffer
    from torchrl.envs import ToTensorImage
    from torchrl.modules import RandomPolicy

    from pydqn.adapters.torchrl import FrameSampler, FrameStorage, FrameWriter, ReplayBuffer
    from tests.helpers.torchrl_streams import assert_same, cartpole, own, rows, stack_of_frames, stream

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("envs", [1, 3])
def test_collectors_can_write_to_it(envs, whole):
    from torchrl.envs import SerialEnv

    env = (
        stack_of_frames(0)
        if envs == 1
        else SerialEnv(envs, [lambda seed=seed: stack_of_frames(seed) for seed in range(envs)])
    )
    rb = ReplayBuffer(1000, batch_size=8, num_envs=envs)
    settings = {"frames_per_batch": 20 * envs, "total_frames": 100 * envs, "extend_buffer": whole}
    collector = Collector(env, RandomPolicy(env.action_spec), replay_buffer=rb, **settings)
    assert all(batch is None for batch in collector)
    collector.shutdown()
    assert len(rb) == rb.write_count == 100 * envs
    episodes = len(rb[:]["collector", "traj_ids"].unique())
    assert sum(rb.storage.frame_replay.env_time_steps) == 100 * envs + episodes
    assert rb.sample().shape == (8,)


def test_one_at_a_time():
    (batch,) = stream(cartpole, batches=1)
    rb = ReplayBuffer(100, prioritized=True)
    index = torch.stack([rb.add(row.clone()) for row in batch])
    assert_same(rb[index], batch)
    assert_same(rb[index[3]], batch[3])
    assert [int(row["number"]) for row in rb.storage] == batch["number"].tolist()
    assert rb.write_count == 21


def test_iterating_and_emptying():
    batches = stream(stack_of_frames)
    rb = ReplayBuffer(200, batch_size=16)
    for batch in batches[:3]:
        rb.extend(batch)
    for _, sample in zip(range(3), rb, strict=False):
        assert len(sample) == 16
    rb.empty(empty_write_count=False)
    assert (len(rb), rb.write_count) == (0, 63)
    rb.empty()
    assert rb.write_count == 0
    with pytest.raises(RuntimeError, match=r"^Cannot sample from an empty storage\."):
        rb.sample()
    index = rb.extend(batches[5].clone())
    assert_same(rb[index], batches[5])
    assert "ReplayBuffer" in repr(rb)


def test_transforms_and_threads():
    batches = stream(stack_of_frames)
    image = ToTensorImage(in_keys=["observation", ("next", "observation")], shape_tolerant=True)
    ours, theirs = ReplayBuffer(500, batch_size=16, transform=image, prefetch=2), own(500, transform=image.clone())
    for batch in batches:
        index = ours.extend(batch.clone())
        positions = theirs.extend(batch.clone())
        sample = ours.sample()
        assert sample["observation"].dtype == torch.float32
    assert_same(ours[index], theirs[positions])


def test_samples_may_be_changed():
    for make, size in ((stack_of_frames, 200), (stack_of_frames, 1), (cartpole, 200)):
        rb = ReplayBuffer(500, batch_size=size)
        for batch in stream(make):
            index = rb.extend(batch)
        before = rb[:].clone()
        for sample in (rb.sample(), rb[:], rb[index[3]], rb[index[3:4]]):
            after = sample["next", "observation"].clone()
            sample["observation"].zero_()
            assert sample["next", "observation"].equal(after)
            sample.zero_()
        assert_same(rb[:], before)


def test_storage_sampler_and_writer_alone():
    storage = FrameStorage(100)
    parts = {"storage": storage, "sampler": FrameSampler(storage), "writer": FrameWriter()}
    rb = TensorDictReplayBuffer(**parts, collate_fn=lambda batch: batch, batch_size=4)
    index = rb.extend(rows())
    assert torch.isin(rb.sample()["index"], index).all()
    drawn, _ = storage.draw(2)
    assert storage.get(index[:3])["action"].tolist() == [0, 1, 2]
    assert storage.get(drawn)["action"].equal(drawn)


def test_which_entries_are_kept():
    batch = rows(colour=torch.rand(5, 3), sound=torch.rand(5, 2))
    rb = ReplayBuffer(100, keys=["action", "sound"])
    index = rb.extend(batch)
    flags = [("next", name) for name in ("reward", "done", "terminated")]
    assert set(rb[index].keys(True, True)) == {"observation", ("next", "observation"), "action", "sound", *flags}
    more = rows(colour=torch.rand(5, 3), sound=torch.rand(5, 2), smell=torch.rand(5))
    assert set(rb[rb.extend(more)].keys(True, True)) == set(rb[index].keys(True, True))


def test_lives_end_windows():
    batch = rows(6)
    batch["next", "end-of-life"] = torch.tensor([0, 0, 1, 0, 0, 0], dtype=torch.bool)[:, None]
    rb = ReplayBuffer(100, n_step=3, gamma=0.5, terminated_key="end-of-life")
    rb.extend(batch)
    held = rb[:]
    assert held["steps_to_next_obs"].tolist() == [3, 2, 1, 3]
    assert held["next", "reward"].flatten().tolist() == [1.75, 1.5, 1.0, 1.75]
    assert held["next", "end-of-life"].flatten().tolist() == [True, True, True, False]
    assert rb.storage.frame_replay.env_time_steps == [7]  # the episode has not ended


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float16, torch.float64])
def test_discounted_sums_are_reals_for_any_dtype_of_rewards(dtype):
    batch = rows(6)
    batch["next", "reward"] = batch["next", "reward"].to(dtype)
    rb = ReplayBuffer(100, n_step=3, gamma=0.9)
    rb.extend(batch)
    reward = rb[:]["next", "reward"]
    assert reward.shape == (4, 1)
    assert reward.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(reward.flatten().double(), torch.full((4,), 1 + 0.9 + 0.81).double())


def test_environments_are_counted_in_blocks():
    batch = torch.stack([rows(), rows(), rows()])
    batch["next", "done"][:, -1] = batch["next", "terminated"][:, -1] = True
    for given, count in ((batch, 3), (batch.reshape(-1), 1)):
        rb = ReplayBuffer(100)
        rb.extend(given.clone())
        assert rb.storage.frame_replay.num_envs == count


def test_blocks_of_environments_with_equal_observations():
    rb = ReplayBuffer(100, n_step=2, gamma=1.0)
    for step in range(3):
        batch = torch.stack([rows(1, number=torch.tensor([env])) for env in range(2)])
        batch["observation"], batch["next", "observation"] = torch.ones(2, 1, 4), torch.ones(2, 1, 4)
        batch["next", "reward"] *= 10.0**step * (1 + batch["number"][..., None])
        rb.extend(batch)
    assert sorted(rb[:]["next", "reward"].flatten().tolist()) == [11, 22, 110, 220]


def test_samples_can_be_stored_again():
    one, other = ReplayBuffer(100, batch_size=7, prioritized=True, beta=0.5), ReplayBuffer(100, num_envs=1)
    one.sampler.beta = 0.9
    one.extend(rows())
    assert one.storage.frame_replay.beta == 0.9
    sample = one.sample()
    assert_same(other[other.extend(sample.clone())], sample)


def test_images_that_are_no_stacks():
    batch = rows(50, key="pixels")
    images = torch.randint(0, 256, (51, 4, 9, 8), dtype=torch.uint8)
    batch["pixels"], batch["next", "pixels"] = images[:-1], images[1:]
    rb = ReplayBuffer(100)
    assert_same(rb[rb.extend(batch.clone())], batch)
    assert rb.storage.frame_replay.stack == 1
    assert rb.storage.frame_replay.env_time_steps == [51]


def test_it_is_small():
    images = torch.zeros(2, 4, 84, 84, dtype=torch.uint8)
    batch = rows(1)
    batch["observation"], batch["next", "observation"] = images[:1], images[1:]
    ours, theirs = ReplayBuffer(2000), own(2000)
    assert ours.nbytes == 0
    for rb in (ours, theirs):
        rb.extend(batch.clone())
    whole = sum(leaf.nbytes for leaf in theirs.storage._storage.values(True, True))
    assert ours.nbytes < 0.135 * whole


def test_a_batch_larger_than_the_buffer():
    batch = rows(120, number=torch.arange(120))
    batch["next", "terminated"][60] = batch["next", "done"][60] = True
    rb = ReplayBuffer(50, n_step=3)
    index = rb.extend(batch.clone())
    assert rb[:]["number"].tolist() == list(range(68, 118))  # the windows of the last two are not complete
    assert rb[index[68:118]]["number"].tolist() == list(range(68, 118))
    with pytest.raises(ValueError, match="is not a transition that is held now"):
        rb[index[67]]


def filled(prioritized=True, **settings):
    rb = ReplayBuffer(150, batch_size=32, prioritized=prioritized, seed=5, num_envs=3, n_step=2, **settings)
    for batch in stream(cartpole, 3, batches=5):
        rb.extend(batch.reshape(-1))
    sample = rb.sample()
    sample["td_error"] = torch.arange(32.0)[:, None]
    rb.update_tensordict_priority(sample)
    rb.sampler.beta = 0.7
    return rb


def assert_same_future(one, other):
    assert len(one) == len(other) > 140
    assert one.write_count == other.write_count
    for _ in range(3):
        assert_same(one.sample(), other.sample(), ())
    more = stream(cartpole, 3, batches=6)[5].reshape(-1)
    for rb in (one, other):
        held = rb[rb.extend(more.clone())[:15]]
        assert_same(held.select("observation", "action", "number"), more[:15].select("observation", "action", "number"))


def test_saving(tmp_path):
    rb, again = filled(), ReplayBuffer(150, batch_size=32, prioritized=True, num_envs=3, n_step=2)
    rb.dumps(tmp_path / "rb")
    rb.dumps(tmp_path / "rb")
    again.loads(tmp_path / "rb")
    assert not list(tmp_path.rglob("*.pkl"))
    assert_same_future(filled(), again)


def test_state_dicts():
    file = io.BytesIO()
    torch.save(filled().state_dict(), file)
    again = ReplayBuffer(150, batch_size=32, prioritized=True, n_step=2)
    file.seek(0)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert_same_future(filled(), again)
    again.load_state_dict(ReplayBuffer(150, batch_size=32).state_dict())
    assert len(again) == 0


def test_copies_and_checkpoints(tmp_path):
    assert_same_future(filled(), copy.deepcopy(filled()))
    Checkpoint(rb=filled()).save(tmp_path / "all")
    again = ReplayBuffer(150, batch_size=32, prioritized=True, n_step=2)
    Checkpoint(rb=again).load(tmp_path / "all")
    assert_same_future(filled(), again)


def test_what_cannot_be_loaded(tmp_path):
    rb = filled()
    with pytest.raises(RuntimeError, match="dumps: expected a buffer with transitions"):
        ReplayBuffer(100).dumps(tmp_path / "empty")
    rb.dumps(tmp_path / "one")
    for settings, message in (
        ({"n_step": 3}, "n_step 2, expected 3"),
        ({"n_step": 2, "num_envs": 2}, "num_envs 3, expected 2"),
        ({"n_step": 2, "gamma": 0.5}, "gamma 0.99, expected 0.5"),
    ):
        with pytest.raises(ValueError, match=message):
            ReplayBuffer(150, prioritized=True, **settings).loads(tmp_path / "one")
    rb.extend(stream(cartpole, 3)[0])
    rb.storage.frame_replay.save(tmp_path / "one" / "storage" / "replay-1")
    again = ReplayBuffer(150, prioritized=True, n_step=2)
    with pytest.raises(ValueError, match="not saved together"):
        again.loads(tmp_path / "one")
    with pytest.raises(ValueError, match="expected the names of its files, got '../evil'"):
        again.storage.load_state_dict({"../evil": torch.zeros(3, dtype=torch.uint8)})


def test_other_processes_are_refused():
    process = multiprocessing.get_context("spawn").Process(target=print, args=(filled(),))
    with pytest.raises(RuntimeError, match="process"):
        process.start()
    with pytest.raises(RuntimeError, match="process"):
        multiprocessing.get_context("spawn").Process(target=print, args=(FrameStorage(10),)).start()

"""Odd shapes, many environments, every Atari game; what takes longer or more memory is in `scripts/long-and-large`."""

from __future__ import annotations

import ale_py
import gymnasium
import numpy as np
import psutil
import pytest
from ale_py import roms

from pydqn import FrameReplay, preset
from pydqn.envs.ids import FOR_TWO, rom_of
from pydqn.envs.make import make_envs
from pydqn.envs.rewards import learner_rewards
from pydqn.evaluation.build import replay_settings
from pydqn.evaluation.play import start_episodes
from tests.helpers.replay_streams import assert_equals_reference, play

ENDS = ["", "", "", "terminated", "", "truncated", "life", "", "both", "cut", ""]


def stream(capacity, num_envs, time_steps, stack=2, n_step=2, padding="zero"):
    """As `tests.helpers.replay_streams.streams` draws them, but always the same."""
    settings = {"capacity": capacity, "stack": stack, "n_step": n_step, "gamma": 0.5, "padding": padding}
    ends = [[ENDS[(7 * env + 3 * time_step) % len(ENDS)] for env in range(num_envs)] for time_step in range(time_steps)]
    return settings, num_envs, ends


@pytest.mark.parametrize(
    ("capacity", "num_envs"),
    [(5, 1), (6, 1), (15, 3), (17, 3), (23, 3), (100, 7), (1280, 256), (1300, 256), (2000, 256)],
)
@pytest.mark.parametrize("n_step", [1, 3])
def test_odd_capacities_and_many_environments(capacity, num_envs, n_step):
    """The least capacities (stack + n_step frames for each environment), and some that num_envs does not divide."""
    time_steps = 3 + 2 * (capacity // num_envs)
    for replay, reference in play(stream(capacity, num_envs, time_steps, n_step=n_step)):
        assert len(replay) == len(reference.transitions())
    if len(replay):
        assert_equals_reference(replay, reference)


@pytest.mark.parametrize("frame_shape", [(1,), (7,), (3, 5), (2, 3, 4), (2, 3, 2, 5), (1, 1, 1, 1)])
@pytest.mark.parametrize("dtype", ["uint8", "bool", "float16", "float64", "int64"])
def test_frames_of_one_to_four_axes(frame_shape, dtype):
    *_, (replay, reference) = play(stream(14, 2, 20, padding="first"), frame_shape, dtype)
    assert_equals_reference(replay, reference)


@pytest.mark.parametrize("num_envs", [0, -1, 1.0, True, None])
def test_a_buffer_needs_an_environment(num_envs):
    with pytest.raises(ValueError, match=r"^num_envs: expected an integer of at least 1, got"):
        FrameReplay(100, num_envs=num_envs)


def test_a_buffer_needs_a_frame_for_each_environment():
    with pytest.raises(ValueError, match=r"^capacity: expected an integer of at least 256, got 255"):
        FrameReplay(255, num_envs=256)


@pytest.mark.parametrize("prioritized", [False, True])
def test_memory_stays_flat_however_long(prioritized):
    replay = FrameReplay(2_000, (16,), num_envs=4, prioritized=prioritized)
    frames, off, nothing = np.zeros((4, 16), np.uint8), np.zeros(4, bool), np.zeros(4, np.int64)
    batch, process, before = replay.empty_batch(32), psutil.Process(), 0
    for time_step in range(120_000):
        replay.append(frames, nothing, nothing, off, off, ~off if time_step % 100 == 0 else off)
        if time_step % 50 == 49:
            replay.sample(32, batch)
            if prioritized:
                replay.update_priorities(batch.index, np.ones(32))
        if time_step == 20_000:
            before = process.memory_info().rss
    assert process.memory_info().rss - before < 1 << 20


def test_saving_takes_little_memory(tmp_path):
    replay = FrameReplay(60_000, num_envs=8)
    frames, off = np.random.default_rng(0).integers(0, 256, (8, 84, 84), np.uint8), np.zeros(8, bool)
    nothing = np.zeros(8, np.int64)
    for time_step in range(60_000 // 8):
        replay.append(frames, nothing, nothing, off, off, ~off if not time_step else off)
    before = psutil.Process().memory_info().rss
    assert before > 400 << 20
    grown = []
    replay.save(tmp_path / "saved", lambda _: grown.append(psutil.Process().memory_info().rss - before))
    assert max(grown) < 150 << 20


GAMES = sorted(set(roms.get_all_rom_ids()) - FOR_TWO)


def test_games_are_those_that_ale_registers():
    """Another one would end the process when it is loaded."""
    gymnasium.register_envs(ale_py)
    assert {f"ALE/{game.title().replace('_', '')}-v5" for game in GAMES} == {
        name for name in gymnasium.registry if name.startswith("ALE/")
    }
    for name in ("combat", "ALE/Joust-v5", "MazeCraze", "WarlordsNoFrameskip-v4"):
        with pytest.raises(ValueError, match=f"^env_id: {name} needs two players"):
            rom_of(name)


@pytest.mark.parametrize("game", GAMES)
def test_every_game_goes_through_the_preset(game):
    """Two hundred steps: frames of the right size that change, the game's own actions, transitions as played."""
    env_id = "ALE/Blackjack-v5" if game == "blackjack" else game  # Gymnasium has one, too
    config = preset("nature", env_id=env_id, num_envs=2, replay_capacity_frames=402)
    envs = make_envs(config, 2, 0)
    replay = FrameReplay(config.replay_capacity_frames, **replay_settings(config, envs))
    random, seen = np.random.default_rng(0), []
    start_episodes(envs, replay)
    for _ in range(200):
        action = random.integers(0, envs.num_actions, 2)
        envs.send(action)
        slot = replay.next_slot()
        step = envs.recv(slot)
        seen.append((slot.copy(), action, step))
        replay.append(slot, action, learner_rewards(config, step), step.terminated, step.truncated, step.first)
    envs.close()
    assert len({frame.tobytes() for frames, *_ in seen for frame in frames}) > 1
    index = replay.valid_indices()
    assert len(index) > 300
    batch = replay.gather(index)
    for row, (time_step, env_index) in enumerate(zip(index // 2, index % 2, strict=True)):
        frames, action, step = seen[time_step]  # the step after: the first frames came before all of these
        np.testing.assert_array_equal(batch.next_obs[row, -1], frames[env_index])
        assert batch.action[row] == action[env_index]
        assert batch.reward[row] == np.sign(step.reward[env_index])
        assert (batch.discount[row] == 0) == step.terminated[env_index]
        assert not step.first[env_index]

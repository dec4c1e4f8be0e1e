"""The environments that ids name: Gymnasium's registry comes first."""

from __future__ import annotations

import subprocess
import sys

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from pydqn import Config, preset
from pydqn.envs.ids import rom_of, spec_of
from pydqn.envs.make import make_envs


class Blocks(gymnasium.Env):
    """A user's environment with the name of an Atari game."""

    observation_space = spaces.Box(-1, 1, (3,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(3, np.float32), {}

    def step(self, action):
        return np.zeros(3, np.float32), 0.0, False, False, {}


@pytest.fixture
def register():
    """Registers `Blocks` by an id, for one test."""
    before = dict(gymnasium.registry)

    def register(env_id):
        gymnasium.registry.pop(env_id, None)  # Gymnasium would warn about replacing ale_py's
        gymnasium.register(env_id, entry_point=Blocks)

    yield register
    gymnasium.registry.clear()
    gymnasium.registry.update(before)


@pytest.mark.parametrize(
    ("env_id", "rom"),
    [
        ("pong", "pong"),
        ("Pong", "pong"),
        ("ALE/Pong-v5", "pong"),
        ("ALE/SpaceInvaders-v5", "space_invaders"),
        ("space_invaders", "space_invaders"),
        ("ALE/TicTacToe3D-v5", "tic_tac_toe_3d"),
        ("Pong-v0", "pong"),  # ale_py registers it
        ("Pong-v4", "pong"),
        ("PongNoFrameskip-v4", "pong"),
        ("SpaceInvadersDeterministic-v0", "space_invaders"),
        ("TetrisNoFrameskip-v4", "tetris"),  # ale_py does not register it
        ("CartPole-v1", None),
        ("CartPole-v0", None),
        ("Blackjack-v1", None),
        ("my/Env-v0", None),
        ("Pong-v1", None),
    ],
)
def test_names_of_games(env_id, rom):
    assert rom_of(env_id) == rom


@pytest.mark.parametrize(
    "env_id", ["Tetris-v0", "Tetris-v4", "Pong-v0", "PongNoFrameskip-v4", "ALE/Tetris-v5", "ALE/Blocks-v0", "pong"]
)
def test_registered_ids_come_before_games(register, env_id):
    register(env_id)
    assert rom_of(env_id) is None
    envs = make_envs(Config(env_id=env_id, network="mlp"), 1, 0)
    assert envs.frame_shape == (3,)
    envs.close()


def test_importing_ale_leaves_what_was_registered():
    """When it is imported, ale_py registers Pong-v0 and would replace an existing one. There is no warning."""
    program = (
        "import sys, gymnasium\n"
        "gymnasium.register('Pong-v0', entry_point='somewhere:Pong')\n"
        "from pydqn.envs.ids import rom_of\n"
        "assert rom_of('Pong-v0') is None and 'ale_py' not in sys.modules\n"
        "assert rom_of('Pong-v4') == 'pong' and rom_of('ALE/Pong-v5') == 'pong'\n"
        "assert gymnasium.spec('Pong-v0').entry_point == 'somewhere:Pong'\n"
        "assert rom_of('Pong-v0') is None\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", ["Tetris", "tetris"])
def test_a_name_that_means_two_environments_is_refused(register, name):
    assert rom_of(name) == "tetris"
    register("Tetris-v0")
    with pytest.raises(ValueError, match=rf"^env_id: '{name}' may be Gymnasium's 'Tetris-v0' or .* 'ALE/Tetris-v5'"):
        rom_of(name)


def test_an_old_id_that_nobody_registered_names_both(register):
    """It may be a user's environment whose module was not imported, or Gym's old id of a game."""
    with pytest.raises(ValueError, match=r"^env_id: Gymnasium knows no 'Tetris-v0'.*register.*'ALE/Tetris-v5'"):
        rom_of("Tetris-v0")


@pytest.mark.parametrize(
    ("env_id", "hints"),
    [
        ("CartPol-v1", "did you mean CartPole-v0 or CartPole-v1?"),
        ("cartpole-v1", "did you mean CartPole-v0 or CartPole-v1?"),
        ("Taxi-v3", "did you mean Taxi-v4?"),
        ("CartPole", "did you mean CartPole-v0 or CartPole-v1?"),
        ("brekout", "did you mean breakout?"),
        ("ALE/Brekout-v5", "did you mean ALE/Breakout-v5?"),
    ],
)
def test_hints(env_id, hints):
    with pytest.raises(ValueError, match=r"^env_id: ") as caught:
        make_envs(Config(env_id=env_id), 1, 0)
    assert hints in str(caught.value)


@pytest.mark.parametrize("env_id", ["Tetri-v0", "Heroes-v0", "MyGrid-v0", "Pong-v1", "PongDuel-v0", "Carnivale-v1"])
def test_no_game_is_proposed_for_an_id_in_gymnasiums_form(env_id):
    rom_of("pong")  # ale_py has registered its games
    with pytest.raises(ValueError, match=f"^env_id: Gymnasium knows no '{env_id}'") as caught:
        make_envs(Config(env_id=env_id), 1, 0)
    assert "did you mean" not in str(caught.value)
    assert "import the module that registers it" in str(caught.value)


def test_a_spec_is_gymnasiums():
    assert spec_of("MountainCar-v0").max_episode_steps == 200


def test_a_game_by_another_name_is_the_same_game():
    for env_id in ("pong", "PongNoFrameskip-v4", "ALE/Pong-v5"):
        assert make_envs(preset("pong", env_id=env_id), 1, 0).frame_shape == (84, 84)

"""MinAtar's games, which `pydqn[minatar]` installs."""

from __future__ import annotations

import importlib.util
import json
import sys
from importlib import metadata

import gymnasium
import pytest

import pydqn
from pydqn.envs.ids import registered_by, spec_of

installed = pytest.mark.skipif(not importlib.util.find_spec("minatar"), reason="needs pip install 'pydqn[minatar]'")
QUICK = {"total_steps": 300, "learning_starts_steps": 100, "device": "cpu", "torch_threads": 1}


@pytest.fixture(autouse=True)
def forget():
    before = dict(gymnasium.registry)
    for env_id in [env_id for env_id in before if env_id.startswith("MinAtar/")]:
        gymnasium.registry.pop(env_id)  # other tests in this process may have registered them
    yield
    gymnasium.registry.clear()
    gymnasium.registry.update(before)


@installed
@pytest.mark.parametrize("game", ["Breakout-v0", "Seaquest-v1"])
def test_games_are_registered_when_they_are_needed(tmp_path, game):
    pydqn.train(pydqn.preset("minatar-dqn", env_id=f"MinAtar/{game}", **QUICK), tmp_path)
    recorded = json.loads((tmp_path / "environment.json").read_text())
    channels = {"Breakout-v0": 4, "Seaquest-v1": 10}[game]
    assert recorded["inputs"] == f"10x10x{channels} (channels last) uint8 as they are"
    assert registered_by(f"MinAtar/{game}") is None
    assert recorded["minatar"] == metadata.version("MinAtar")
    for env_id in [env_id for env_id in gymnasium.registry if env_id.startswith("MinAtar/")]:
        gymnasium.registry.pop(env_id)  # as in another process
    assert len(pydqn.evaluate(tmp_path, 1)) == 1


@installed
def test_the_published_network():
    config = pydqn.preset("minatar-dqn")
    from pydqn.envs.make import make_envs
    from pydqn.evaluation.build import network_for

    envs = make_envs(config, 1, 0)
    shapes = [tuple(value.shape) for value in network_for(config, envs).state_dict().values()]
    envs.close()
    assert shapes == [(16, 4, 3, 3), (16,), (128, 16 * 8 * 8), (128,), (6, 128), (6,)]


@installed
def test_a_game_that_does_not_exist():
    with pytest.raises(ValueError, match="^env_id: Gymnasium knows no 'MinAtar/Breakuot-v0'; did you mean MinAtar"):
        spec_of("MinAtar/Breakuot-v0")


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "minatar.gym", None)
    with pytest.raises(ValueError, match=r"^env_id: MinAtar is not installed: pip install 'pydqn\[minatar\]'"):
        spec_of("MinAtar/Breakout-v0")

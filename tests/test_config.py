"""`Config`, its presets and its help."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from pydqn import Config, preset
from pydqn.cli.options import SECTIONS
from pydqn.config import RENAMED
from pydqn.presets import PRESETS


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("num_envs", 0),
        ("num_envs", -3),
        ("num_envs", 2.5),
        ("num_envs", "8"),
        ("num_envs", True),
        ("num_envs", 10**9),
        ("total_steps", 10**20),
        ("frame_skip", 2**40),
        ("gamma", 10**400),
        ("seed", -1),
        ("batch_size", 0),
        ("replay_capacity_frames", 10),
        ("replay_capacity_frames", -5),
        ("gamma", 1.1),
        ("gamma", float("nan")),
        ("sticky_actions", -0.1),
        ("sticky_actions", 2),
        ("learning_rate", 0.0),
        ("learning_rate", float("inf")),
        ("train_period_steps", -1.0),
        ("train_period_steps", 0.0),
        ("pixel_std", 0.0),
        ("epsilon_end", 1.5),
        ("loss", "hinge"),
        ("optimizer", "sgd"),
        ("network", "transformer"),
        ("preprocess", "blur"),
        ("padding", "edge"),
        ("hidden_units", (-1,)),
        ("agent", "sarsa"),
        ("frame_skip_max", 3),  # below frame_skip
        ("epsilon_schedule", "cosine"),
        ("epsilon_final", 1.5),
        ("evaluation_protocol", "atari100k"),
        ("video_format", "avi"),
        ("stop_successes", -1),
        ("stop_successes", 5),  # without success_steps
        ("clip_rewards", "always"),
        ("clip_rewards", 1),
        ("hidden_units", (0,)),
        ("hidden_units", (1.5,)),
        ("hidden_units", 512),
        ("double", 1),
        ("env_id", None),
        ("precision", "float64"),
    ],
)
def test_errors_name_the_field(name, bad):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        Config(**{name: bad})


def test_the_help_of_every_field_is_a_sentence():
    for field in dataclasses.fields(Config):
        assert re.fullmatch(r"[A-Z].*\.", field.metadata["help"]), field.name


def test_configs_are_frozen_and_survive_json():
    config = Config(hidden_units=(64, 32))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 3
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="unknown field 'lr'"):
        Config.from_dict({"lr": 1})


def test_old_names_of_fields_are_read():
    old = {
        **{"target_sync_updates": 9, "target_sync_episodes": 2, "steps_per_update": 2.5},
        **{"life_loss": True, "full_action_set": True},
    }
    assert old.keys() == RENAMED.keys()
    new = Config(
        **{"target_update_period": 9, "target_update_period_episodes": 2, "train_period_steps": 2.5},
        **{"terminal_on_life_loss": True, "full_action_space": True},
    )
    assert Config.from_dict(old) == new
    assert not RENAMED.keys() & new.to_dict().keys()
    with pytest.raises(ValueError, match="'train_period_steps' is given twice"):
        Config.from_dict({"train_period_steps": 1.0, "steps_per_update": 2.0})


def test_presets():
    assert preset("pong", seed=3).seed == 3
    assert dataclasses.replace(preset("pong", seed=3), seed=0) == PRESETS["pong"].config
    with pytest.raises(ValueError, match="preset: 'pnog'.*pong"):
        preset("pnog")
    with pytest.raises(ValueError, match="learning_rat: .*learning_rate"):
        preset("pong", learning_rat=1)
    for entry in PRESETS.values():
        assert entry.summary
        assert entry.source


def test_every_section_begins_with_a_field():
    names = [field.name for field in dataclasses.fields(Config)]
    assert names[0] in SECTIONS
    starts = [names.index(name) for name in SECTIONS]
    assert starts == sorted(starts)


def test_an_id_that_would_import_a_module_is_refused():
    """Gymnasium imports the module before a colon, and a config may come from anywhere."""
    message = (
        r"^env_id: expected an id without ':', got 'antigravity:CartPole-v1'.* import antigravity and call .*'CartPole"
    )
    with pytest.raises(ValueError, match=message):
        Config(env_id="antigravity:CartPole-v1", max_episode_steps=100)
    with pytest.raises(ValueError, match=message):
        preset("cartpole", env_id="antigravity:CartPole-v1")

"""A DQN that you can `pip install`: fast on the machine that you have, lean in memory, and exact."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydqn import preprocess as preprocess
    from pydqn.config import Config as Config
    from pydqn.evaluation.evaluate import evaluate as evaluate
    from pydqn.evaluation.export import export as export
    from pydqn.evaluation.loaded import RunPolicy as RunPolicy
    from pydqn.evaluation.loaded import load_policy as load_policy
    from pydqn.evaluation.play import play_episode as play_episode
    from pydqn.learning.learner import Learner as Learner
    from pydqn.learning.settings import LearnerSettings as LearnerSettings
    from pydqn.presets import preset as preset
    from pydqn.replay.device import DeviceReplay as DeviceReplay
    from pydqn.replay.frames import Batch as Batch
    from pydqn.replay.frames import FrameReplay as FrameReplay
    from pydqn.replay.transitions import TransitionReplay as TransitionReplay
    from pydqn.runs.result import Result as Result
    from pydqn.training.start import resume as resume
    from pydqn.training.start import run as run
    from pydqn.training.start import train as train

__version__ = "0.1.0"

# Imported when first used: the replay buffer alone does not need torch.
_MODULE_OF = {
    "Batch": "replay.frames",
    "Config": "config",
    "DeviceReplay": "replay.device",
    "FrameReplay": "replay.frames",
    "Learner": "learning.learner",
    "LearnerSettings": "learning.settings",
    "Result": "runs.result",
    "RunPolicy": "evaluation.loaded",
    "TransitionReplay": "replay.transitions",
    "evaluate": "evaluation.evaluate",
    "export": "evaluation.export",
    "load_policy": "evaluation.loaded",
    "play_episode": "evaluation.play",
    "preset": "presets",
    "resume": "training.start",
    "run": "training.start",
    "train": "training.start",
}
_MODULES = ("preprocess",)
_DRIVERS = (
    "evaluate",
    "export",
    "load_policy",
    "play_episode",
    "resume",
    "run",
    "train",
)  # these may change settings of the whole process

__all__ = [
    "Batch",
    "Config",
    "DeviceReplay",
    "FrameReplay",
    "Learner",
    "LearnerSettings",
    "Result",
    "RunPolicy",
    "TransitionReplay",
    "evaluate",
    "export",
    "load_policy",
    "play_episode",
    "preprocess",
    "preset",
    "resume",
    "run",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"pydqn.{name}")
    if name in _DRIVERS:
        import_module("pydqn._util.machine").bound_spinning()  # takes effect if torch has not been imported yet
    if name in _MODULE_OF:
        return getattr(import_module(f"pydqn.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module 'pydqn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

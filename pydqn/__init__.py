"""pydqn: a DQN that you can pip install: fast on what you have, lean in memory, and exact."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydqn import preprocess as preprocess
    from pydqn.config import Config as Config
    from pydqn.device_replay import DeviceReplay as DeviceReplay
    from pydqn.evaluation import evaluate as evaluate
    from pydqn.learner import Learner as Learner
    from pydqn.presets import preset as preset
    from pydqn.replay import Batch as Batch
    from pydqn.replay import FrameReplay as FrameReplay
    from pydqn.results import Result as Result
    from pydqn.training import resume as resume
    from pydqn.training import train as train
    from pydqn.transitions import TransitionReplay as TransitionReplay

__version__ = "0.1.0"

# Imported when first used: whoever wants the replay memory alone does not wait for torch.
_HOMES = {
    "Batch": "replay",
    "Config": "config",
    "DeviceReplay": "device_replay",
    "FrameReplay": "replay",
    "Learner": "learner",
    "Result": "results",
    "TransitionReplay": "transitions",
    "evaluate": "evaluation",
    "preset": "presets",
    "resume": "training",
    "train": "training",
}
_MODULES = ("preprocess",)
_DRIVERS = ("evaluate", "resume", "train")  # what they start has the process to itself

__all__ = [
    "Batch",
    "Config",
    "DeviceReplay",
    "FrameReplay",
    "Learner",
    "Result",
    "TransitionReplay",
    "evaluate",
    "preprocess",
    "preset",
    "resume",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"pydqn.{name}")
    if name in _DRIVERS:
        import_module("pydqn.machine").bound_spinning()  # counts where torch has not been imported yet
    if name in _HOMES:
        return getattr(import_module(f"pydqn.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'pydqn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

"""The files in the folder of a run, and reading its config."""

from __future__ import annotations

import os
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydqn._util.files import Damaged, read_json
from pydqn.config import Config
from pydqn.envs.ids import require_registered
from pydqn.envs.tasks import with_overrides

CONFIG = "config.json"
ENVIRONMENT = "environment.json"
PROGRESS = "progress.csv"
EPISODES = "episodes.csv"
CHECKPOINTS = "checkpoints"
BEST_WEIGHTS = Path("weights") / "best.safetensors"
LAST_WEIGHTS = Path("weights") / "last.safetensors"
SCORES = "scores.jsonl"
VIDEOS = Path("videos")
_OF_INPUTS = ("pixel_mean", "pixel_std", "image_channels", "input_scaling")


def load_run(run: str | os.PathLike[str], **overrides: Any) -> Config:
    """Read the `Config` of a run's folder, with fields replaced by `overrides`.

    With another environment (`env_id`), settings that belong to the run's own one are reset to neutral values, as in
    `pydqn.presets.preset`, and a UserWarning names them; those of inputs stay, as the weights depend on them.

    Raises:
        ValueError: `run` is not the folder of a run, its config is not valid, or its environment was registered by a
            module that has not been imported.
    """
    config = _config_of(run)
    if overrides.get("env_id", config.env_id) == config.env_id:
        _require_environment(Path(run), config.env_id)
    trained = {name: getattr(config, name) for name in _OF_INPUTS}
    config, note = with_overrides(config, "the run's", {**trained, **overrides})
    if note:
        warnings.warn(f"run: {note}", stacklevel=2)
    return config


def env_id_of(run: str | os.PathLike[str]) -> str:
    """Return the environment's id in the config of a run's folder.

    Raises:
        ValueError: `run` is not the folder of a run, or its config is not valid.
    """
    return _config_of(run).env_id


def _config_of(run: str | os.PathLike[str]) -> Config:
    path = Path(run) / CONFIG
    if not path.exists():
        raise ValueError(f"run: {str(run)!r} is not the folder of a run (it has no {CONFIG})")
    plain = read_json(path)
    if not isinstance(plain, dict):
        raise ValueError(f"run: {path} is not a run's config")
    return Config.from_dict(plain)


def _require_environment(run: Path, env_id: str) -> None:
    """Name the module that registered a run's environment, if it has not been imported. A file never imports it."""
    with suppress(Damaged):  # a run may lack its environment.json
        environment = read_json(run / ENVIRONMENT)
        module = environment.get("registered_by") if isinstance(environment, dict) else None
        if module is not None:
            require_registered(env_id, module)


def run_of(path: str | os.PathLike[str]) -> tuple[Path, Path | None]:
    """Return the folder of a run; and the checkpoint, if `path` is one of the run's checkpoints."""
    path = Path(path)
    return (path.parents[1], path) if path.parent.name == CHECKPOINTS else (path, None)

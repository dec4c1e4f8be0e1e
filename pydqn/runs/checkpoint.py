"""Checkpoints of a run. Reading them never runs code.

A checkpoint is a folder: tensors and state (what `_tensors` and `_state` of `pydqn.training.base.BaseRun` and its
subclasses return), the replay buffer where that is saved, and a manifest with the size and checksum of these files. The
manifest is written last and removed first; a folder without it is no checkpoint.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydqn._util.files import Checksum, Damaged, read_index, sync_folder, verify_checksum, write_index
from pydqn._util.weights import load_weights, save_weights
from pydqn.runs.layout import CHECKPOINTS

if TYPE_CHECKING:
    import torch

_KEPT = 2  # in case the newest one is damaged
_MANIFEST = "manifest.json"
_KIND = "pydqn-checkpoint"
_NAME = re.compile(r"step-\d{12,}")
_STATE = "state.safetensors"
_REPLAY = "replay"


class Checkpoint(NamedTuple):
    """The state of a run, to resume it from."""

    path: Path
    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]
    replay: Path | None  # folder of the replay buffer, where it was saved


def save_checkpoint(
    run: Path,
    steps: int,
    tensors: dict[str, torch.Tensor],
    state: dict[str, Any],
    save_replay: Callable[[Path], None] | None = None,
) -> None:
    """Write a checkpoint under `run`, named by its steps: whole or not at all.

    The previous checkpoint is kept; older ones and the remains of interrupted saves are removed.
    """
    folder = run / CHECKPOINTS / f"step-{steps:012d}"
    _discard(folder)
    folder.mkdir(parents=True)
    try:
        files = {_STATE: save_weights(folder / _STATE, tensors, state)}
        if save_replay is not None:
            save_replay(folder / _REPLAY)
        sync_folder(folder.parent)
        write_index(folder / _MANIFEST, _KIND, {"steps": steps, "files": files, "replay": save_replay is not None})
    except BaseException:
        _discard(folder)
        raise
    kept = checkpoints(run)[-_KEPT:]
    for other in _folders(run):
        if other not in kept:
            _discard(other)


def checkpoints(run: str | os.PathLike[str]) -> list[Path]:
    """Return the folders of a run's checkpoints, oldest first."""
    return [folder for folder in _folders(run) if (folder / _MANIFEST).is_file()]


def latest_checkpoint(run: str | os.PathLike[str]) -> Path | None:
    """Return the folder of a run's latest checkpoint, or None."""
    return max(checkpoints(run), default=None)


def discard_after(checkpoint: Path) -> None:
    """Remove the checkpoints of a run that are later than this one, from which the run is resumed."""
    for other in _folders(checkpoint.parents[1]):
        if other.name > checkpoint.name:
            _discard(other)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return the JSON state of a checkpoint."""
    return load_checkpoint(checkpoint).state


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint, except its replay buffer.

    Raises:
        Damaged: a file differs from what was written.
    """
    content = read_index(path / _MANIFEST, _KIND)
    try:
        checksum, with_replay = Checksum.parse(content["files"][_STATE]), bool(content["replay"])
    except (KeyError, TypeError, ValueError) as error:
        raise Damaged(f"{path / _MANIFEST}: does not name the checkpoint's files ({error})") from None
    verify_checksum(path / _STATE, checksum)
    tensors, state = load_weights(path / _STATE)
    return Checkpoint(path, tensors, state, path / _REPLAY if with_replay else None)


def _folders(run: str | os.PathLike[str]) -> list[Path]:
    """Return the folders of checkpoints, also unfinished ones; other files that a user keeps there are left alone."""
    return sorted(
        path for path in (Path(run) / CHECKPOINTS).glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()
    )


def _discard(folder: Path) -> None:
    """Remove a checkpoint, the manifest first, so that half of one is never taken for a whole one."""
    (folder / _MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)

"""Weights and checkpoints on the disk. Reading them never runs code.

Weights are a `.safetensors` file with JSON metadata and a checksum of both. A checkpoint is a folder; its manifest,
which names the files by size and checksum, is written last and removed first: without it there is no checkpoint.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydqn._util.files import Damaged, Stamp, atomic_write, check_stamped, read_index, sync_folder, write_index

if TYPE_CHECKING:
    import torch

CHECKPOINTS = "checkpoints"
_KEPT = 2  # should the newest be damaged some day
_MANIFEST = "manifest.json"
_KIND = "pydqn-checkpoint"
_NAME = re.compile(r"step-\d{12,}")
_STATE = "state.safetensors"
_REPLAY = "replay"


def save_weights(path: str | os.PathLike[str], weights: dict[str, torch.Tensor], metadata: dict[str, Any]) -> Stamp:
    """Write named tensors and JSON metadata to a `.safetensors` file, atomically."""
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    text = json.dumps(metadata)
    # One entry for both: several would come in any order, and the same weights would not be the same file.
    data: bytes = save(tensors, {"pydqn": f"{_checksum(tensors, text)} {text}"})
    with atomic_write(path) as file:
        file.write(data)
    return Stamp.of(data)


def load_weights(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what `save_weights` wrote.

    Returns the tensors (on the CPU) and the metadata. Raises FileNotFoundError, or `Damaged` (a ValueError) naming the
    file when it is not a safetensors file of ours, or not what was written.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file of weights")
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            beside = (file.metadata() or {}).get("pydqn", " null")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        stated, _, text = beside.partition(" ")
        metadata, checksum = json.loads(text), str(_checksum(tensors, text))
    except (SafetensorError, ValueError, RuntimeError, RecursionError, OSError) as error:
        raise Damaged(f"{path}: not a readable safetensors file ({error})") from None
    if not isinstance(metadata, dict):
        raise Damaged(f"{path}: expected weights saved by pydqn, got a file without its metadata")
    if stated != checksum:
        raise Damaged(f"{path}: its checksum does not match, so it is not what was written")
    return tensors, metadata


def _checksum(tensors: dict[str, torch.Tensor], text: str) -> int:
    import torch

    checksum = zlib.crc32(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        checksum = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), checksum)
        checksum = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, checksum)
    return checksum


class Checkpoint(NamedTuple):
    """What a run needs to go on."""

    path: Path
    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]
    replay: Path | None  # folder of the replay memory, where it was saved


def save_checkpoint(
    run: Path,
    steps: int,
    tensors: dict[str, torch.Tensor],
    state: dict[str, Any],
    save_replay: Callable[[Path], None] | None = None,
) -> None:
    """Write a checkpoint folder under `run`, named by its steps: whole or not at all.

    The one before is kept; older ones go then, and so does what an interrupted save has left.
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


def run_of(path: str | os.PathLike[str]) -> tuple[Path, Path | None]:
    """Return the folder of a run, and which of its checkpoints is meant where `path` is one."""
    path = Path(path)
    return (path.parents[1], path) if path.parent.name == CHECKPOINTS else (path, None)


def discard_after(checkpoint: Path) -> None:
    """Remove the checkpoints of a run that are later than one of them: another course is taken from there."""
    for other in _folders(checkpoint.parents[1]):
        if other.name > checkpoint.name:
            _discard(other)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return what a checkpoint says beside its tensors."""
    return load_checkpoint(checkpoint).state


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint's folder, but for its replay memory.

    Raises:
        Damaged: a file is not what was written.
    """
    content = read_index(path / _MANIFEST, _KIND)
    try:
        stamp, with_replay = Stamp.parse(content["files"][_STATE]), bool(content["replay"])
    except (KeyError, TypeError, ValueError) as error:
        raise Damaged(f"{path / _MANIFEST}: does not name the checkpoint's files ({error})") from None
    check_stamped(path / _STATE, stamp)
    tensors, state = load_weights(path / _STATE)
    return Checkpoint(path, tensors, state, path / _REPLAY if with_replay else None)


def _folders(run: str | os.PathLike[str]) -> list[Path]:
    """Return the folders that are checkpoints, or were to be; whatever else a user keeps beside them is not ours."""
    return sorted(
        path for path in (Path(run) / CHECKPOINTS).glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()
    )


def _discard(folder: Path) -> None:
    """Remove a checkpoint, the manifest first, so that no half of one is taken for a whole one."""
    (folder / _MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)

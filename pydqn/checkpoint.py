"""Files that are either whole or absent, and that never run code when they are read.

Two kinds: a `.safetensors` file of weights with JSON metadata, and a *record file*: one line (CRC-32 and JSON, the
header) followed by raw blocks, each with its length and CRC-32 in front. Both are written beside their final name,
flushed to the disk and renamed, so that a crash at any moment leaves the file before or the new one, never half of one.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

CHECKPOINTS = "checkpoints"
_STATE = "state.safetensors"
_REPLAY = "replay.bin"
_BLOCK_HEADER = struct.Struct("<QI")  # bytes, CRC-32
_LONGEST_HEADER = 1 << 20


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Yield a binary file that takes the place of `path` only when the block ends without an exception."""
    target = Path(path)
    beside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
    except BaseException:
        with suppress(FileNotFoundError):
            beside.unlink()
        raise


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as JSON, atomically."""
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


class RecordWriter:
    """Writes one record file: a header, then blocks."""

    def __init__(self, file: IO[bytes], header: dict[str, Any]) -> None:
        self._file = file
        text = json.dumps(header).encode()
        file.write(f"{zlib.crc32(text):08x} ".encode() + text + b"\n")

    def block(self, data: memoryview) -> None:
        """Append one block of contiguous bytes."""
        flat = data.cast("B")
        self._file.write(_BLOCK_HEADER.pack(flat.nbytes, zlib.crc32(flat)))
        self._file.write(flat)


class RecordReader:
    """Reads what `RecordWriter` wrote; raises ValueError that names the file on anything else."""

    def __init__(self, file: IO[bytes], name: str, kind: str) -> None:
        self._file = file
        self._name = name
        checksum, _, text = file.readline(_LONGEST_HEADER).rstrip(b"\n").partition(b" ")
        try:
            header = json.loads(text) if checksum == f"{zlib.crc32(text):08x}".encode() else None
        except (ValueError, RecursionError):
            header = None
        if not isinstance(header, dict) or header.get("kind") != kind:
            raise ValueError(f"{name}: expected a {kind} file, got something else or a damaged one")
        self.header: dict[str, Any] = header

    def block(self, nbytes: int) -> bytes:
        """Return the next block, which must hold exactly `nbytes` bytes and match its checksum."""
        head = self._file.read(_BLOCK_HEADER.size)
        if len(head) < _BLOCK_HEADER.size:
            raise ValueError(f"{self._name}: the file is cut short")
        stated, checksum = _BLOCK_HEADER.unpack(head)
        if stated != nbytes:
            raise ValueError(f"{self._name}: expected a block of {nbytes} bytes, got {stated}")
        data = self._file.read(nbytes)
        if len(data) < nbytes:
            raise ValueError(f"{self._name}: the file is cut short")
        if zlib.crc32(data) != checksum:
            raise ValueError(f"{self._name}: the file is damaged (a checksum does not match)")
        return data

    def end(self) -> None:
        """Check that nothing follows the last block."""
        if self._file.read(1):
            raise ValueError(f"{self._name}: the file goes on after its last block")


def save_weights(path: str | os.PathLike[str], weights: dict[str, torch.Tensor], metadata: dict[str, Any]) -> None:
    """Write named tensors and JSON metadata to a `.safetensors` file, atomically."""
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    with atomic_write(path) as file:
        file.write(save(tensors, {"pydqn": json.dumps(metadata)}))


def load_weights(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what `save_weights` wrote.

    Returns the tensors (on the CPU) and the metadata. Raises FileNotFoundError, or ValueError naming the file when it
    is not a safetensors file of ours.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file of weights")
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            metadata = json.loads((file.metadata() or {}).get("pydqn", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from None
    if not isinstance(metadata, dict):
        raise ValueError(f"{path}: expected weights saved by pydqn, got a file without its metadata")
    return tensors, metadata


class Checkpoint(NamedTuple):
    """What a run needs to go on."""

    path: Path
    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]
    replay: Path | None  # file of the replay memory, where it was saved


def save_checkpoint(
    run: Path,
    steps: int,
    tensors: dict[str, torch.Tensor],
    state: dict[str, Any],
    save_replay: Callable[[Path], None] | None = None,
) -> None:
    """Write a checkpoint folder under `run`, named by its steps: whole or not at all. The one before goes then."""
    folder = run / CHECKPOINTS
    name = f"step-{steps:012d}"
    beside = folder / f".{name}.part"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        save_weights(beside / _STATE, tensors, state)
        if save_replay is not None:
            save_replay(beside / _REPLAY)
        shutil.rmtree(folder / name, ignore_errors=True)
        os.replace(beside, folder / name)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    for old in folder.iterdir():
        if old.name != name:
            shutil.rmtree(old, ignore_errors=True)


def latest_checkpoint(run: str | os.PathLike[str]) -> Path | None:
    """Return the folder of a run's latest checkpoint, or None."""
    return max((path.parent for path in (Path(run) / CHECKPOINTS).glob(f"step-*/{_STATE}")), default=None)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return what a checkpoint says beside its tensors."""
    return load_weights(checkpoint / _STATE)[1]


def load_checkpoint(run: str | os.PathLike[str]) -> Checkpoint:
    """Read a run's latest checkpoint, but for its replay memory.

    Raises:
        ValueError: there is none, or it is not a readable one.
    """
    path = latest_checkpoint(run)
    if path is None:
        raise ValueError(f"run: {os.fspath(run)!r} has no checkpoint to go on from")
    tensors, state = load_weights(path / _STATE)
    replay = path / _REPLAY
    return Checkpoint(path, tensors, state, replay if replay.is_file() else None)

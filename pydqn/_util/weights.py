"""Files of named tensors: safetensors with JSON metadata and a checksum. Reading them never runs code."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydqn._util.files import CHECKSUM_MISMATCH, Checksum, Damaged, atomic_write

if TYPE_CHECKING:
    import torch


def save_weights(path: str | os.PathLike[str], weights: dict[str, torch.Tensor], metadata: dict[str, Any]) -> Checksum:
    """Write named tensors and JSON metadata to a `.safetensors` file, atomically."""
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    text = json.dumps(metadata)
    # One entry for both: several would be written in any order, and equal weights would not give equal files.
    data: bytes = save(tensors, {"pydqn": f"{_checksum(tensors, text)} {text}"})
    with atomic_write(path) as file:
        file.write(data)
    return Checksum.of(data)


def load_weights(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what `save_weights` wrote.

    Returns the tensors (on the CPU) and the metadata. Raises FileNotFoundError, or `Damaged` (a ValueError that names
    the file) if it is not a safetensors file of pydqn, or not what was written.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file of weights")
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            entry = (file.metadata() or {}).get("pydqn", " null")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        stated, _, text = entry.partition(" ")
        metadata, checksum = json.loads(text), str(_checksum(tensors, text))
    except (SafetensorError, ValueError, RuntimeError, RecursionError, OSError) as error:
        raise Damaged(f"{path}: not a readable safetensors file ({error})") from None
    if not isinstance(metadata, dict):
        raise Damaged(f"{path}: expected weights saved by pydqn, got a file without its metadata")
    if stated != checksum:
        raise Damaged(f"{path}: {CHECKSUM_MISMATCH}")
    return tensors, metadata


def _checksum(tensors: dict[str, torch.Tensor], text: str) -> int:
    import torch

    checksum = zlib.crc32(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        checksum = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), checksum)
        checksum = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, checksum)
    return checksum

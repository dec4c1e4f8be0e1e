"""Files that are either whole or absent, and that are known to be what was written.

Each is written beside its final name, flushed to the disk and renamed, so that a crash at any moment leaves the file
before or the new one, never half of one. An *index* is a JSON file that carries its own checksum; others are named in
an index by their size and checksum (a `Checksum`), and the index is written after them: what it names is there and whole.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_LARGEST_INDEX = 16 << 20
_NO_MATCH = "its checksum does not match, so it is not what was written"


class Damaged(ValueError):
    """A file is not what was written to it; the message names the file and what is wrong."""


class Checksum(NamedTuple):
    """What a file has to be."""

    nbytes: int
    checksum: int  # CRC-32

    @classmethod
    def of(cls, data: bytes) -> Checksum:
        """Return the checksum of a file with this content."""
        return cls(len(data), zlib.crc32(data))

    @classmethod
    def parse(cls, value: object) -> Checksum:
        """Read what JSON has made of a checksum; raises ValueError when it is none."""
        if not isinstance(value, list) or len(value) != 2 or not all(type(part) is int for part in value):
            raise ValueError(f"expected a size and a checksum, got {value!r}")
        return cls(*value)


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Yield a binary file that takes the place of `path` only when the block ends without an exception."""
    target = Path(path)
    beside = target.with_name(f".{target.name}.part")  # one that a crash has left is written over
    try:
        with named_errors(target):
            with open(beside, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, target)
        sync_folder(target.parent)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Let an error of writing say which file it was: that of a full disk does not."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def sync_folder(path: Path) -> None:
    """Flush the names in a folder to the disk, where the system can: a rename alone may not outlive a power cut."""
    with suppress(OSError):
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as JSON, atomically."""
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


def append_line(path: Path, line: str) -> None:
    """Append a line to a file in one write, so that those of several processes do not mix.

    Half a line that an earlier crash, or a full disk, has left at the end stays a line of its own.
    """
    data = f"{line}\n".encode()
    with named_errors(path), open(path, "a+b", buffering=0) as file:
        if fcntl is not None:
            with suppress(OSError):  # not every file system has locks
                fcntl.flock(file, fcntl.LOCK_EX)  # or half of another's line would look like one that a crash has left
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                data = b"\n" + data
        written = file.write(data)
        if written is None or written < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write_with_checksum(path: Path, data: bytes) -> Checksum:
    """Write a file, atomically, and return its checksum."""
    with atomic_write(path) as file:
        file.write(data)
    return Checksum.of(data)


def read_with_checksum(path: Path, checksum: Checksum) -> bytes:
    """Return a file's content. Raises `Damaged` when that is not what the checksum says."""
    with _opened(path) as file:
        _require_size(path, file, checksum)
        data = file.read(checksum.nbytes)
    if Checksum.of(data) != checksum:
        raise Damaged(f"{path}: {_NO_MATCH}")
    return data


def verify_checksum(path: Path, checksum: Checksum) -> None:
    """Raise `Damaged` when a file is not what the checksum says. Takes no memory for it."""
    crc = 0
    with _opened(path) as file:
        _require_size(path, file, checksum)
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    if crc != checksum.checksum:
        raise Damaged(f"{path}: {_NO_MATCH}")


def read_json(path: Path, most: int = 1 << 20) -> Any:
    """Return what a JSON file of at most so many bytes holds. Raises `Damaged` when it is none."""
    with _opened(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise Damaged(f"{path}: too large")
    try:
        return json.loads(data.decode())  # (JSON itself would try other encodings, too)
    except (ValueError, RecursionError):
        raise Damaged(f"{path}: is not JSON") from None


def write_index(path: Path, kind: str, content: dict[str, Any]) -> None:
    """Write JSON with a checksum of its own, atomically."""
    write_json(path, {"kind": kind, "checksum": _checksum(content), "content": content})


def read_index(path: Path, kind: str) -> dict[str, Any]:
    """Return what `write_index` wrote. Raises `Damaged` when it is anything else."""
    whole = read_json(path, _LARGEST_INDEX)
    if not isinstance(whole, dict) or whole.get("kind") != kind:
        raise Damaged(f"{path}: expected a {kind} file, got something else")
    content = whole.get("content")
    if not isinstance(content, dict) or whole.get("checksum") != _checksum(content):
        raise Damaged(f"{path}: {_NO_MATCH}")
    return content


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a regular file: a device, or a pipe, might never end."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise Damaged(f"{path}: is not a regular file")
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise Damaged(f"{path}: cannot be read ({error.strerror})") from None


def _require_size(path: Path, file: IO[bytes], checksum: Checksum) -> None:
    """Before a byte is read: a file may be of any size."""
    size = os.fstat(file.fileno()).st_size
    if size != checksum.nbytes:
        raise Damaged(f"{path}: expected {checksum.nbytes} bytes, got {size}")


def _checksum(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())

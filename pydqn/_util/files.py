"""Atomic writes, and files with checksums.

A file is written under a temporary name beside its final one, flushed to the disk and renamed. A crash at any moment
leaves the old file or the new one, never a part. An *index* is a JSON file with its own checksum. It names other files
with their sizes and checksums, and is written after them, so that they are whole.
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
CHECKSUM_MISMATCH = "its checksum does not match, so it is not what was written"


class Damaged(ValueError):
    """A file is not what was written; the message names the file and what is wrong."""


class Checksum(NamedTuple):
    """Size and checksum of a file."""

    nbytes: int
    checksum: int  # CRC-32

    @classmethod
    def of(cls, data: bytes) -> Checksum:
        """Return the checksum of a file with this content."""
        return cls(len(data), zlib.crc32(data))

    @classmethod
    def parse(cls, value: object) -> Checksum:
        """Return a checksum that was read from JSON. Raises ValueError if it is none."""
        if not isinstance(value, list) or len(value) != 2 or not all(type(part) is int for part in value):
            raise ValueError(f"expected a size and a checksum, got {value!r}")
        return cls(*value)


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Yield a binary file that replaces `path` when the block ends without an exception."""
    target = Path(path)
    beside = target.with_name(f".{target.name}.part")  # if a crash left one, it is overwritten
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
    """Add the file's name to an OSError without one, as for a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to the disk, if the system can: otherwise a power cut may undo a rename."""
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
    """Append a line to a file in one write, so that lines of several processes do not mix.

    An incomplete line at the end, from a crash or a full disk, becomes a separate line.
    """
    data = f"{line}\n".encode()
    with named_errors(path), open(path, "a+b", buffering=0) as file:
        if fcntl is not None:
            with suppress(OSError):  # not every file system has locks
                fcntl.flock(file, fcntl.LOCK_EX)  # else a line that another process is writing would look incomplete
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
    """Return a file's content. Raises `Damaged` if it does not match the checksum."""
    with _open_regular(path) as file:
        _require_size(path, file, checksum)
        data = file.read(checksum.nbytes)
    if Checksum.of(data) != checksum:
        raise Damaged(f"{path}: {CHECKSUM_MISMATCH}")
    return data


def verify_checksum(path: Path, checksum: Checksum) -> None:
    """Raise `Damaged` if a file does not match its checksum. Reads it in small blocks."""
    crc = 0
    with _open_regular(path) as file:
        _require_size(path, file, checksum)
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    if crc != checksum.checksum:
        raise Damaged(f"{path}: {CHECKSUM_MISMATCH}")


def read_json(path: Path, most: int = 1 << 20) -> Any:
    """Return the content of a JSON file of at most `most` bytes. Raises `Damaged` if it is not one."""
    with _open_regular(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise Damaged(f"{path}: too large")
    try:
        return json.loads(data.decode())  # given bytes, `json` would try other encodings, too
    except (ValueError, RecursionError):
        raise Damaged(f"{path}: is not JSON") from None


def write_index(path: Path, kind: str, content: dict[str, Any]) -> None:
    """Write JSON with its checksum, atomically."""
    write_json(path, {"kind": kind, "checksum": _checksum(content), "content": content})


def read_index(path: Path, kind: str) -> dict[str, Any]:
    """Return what `write_index` wrote. Raises `Damaged` if the file holds anything else."""
    whole = read_json(path, _LARGEST_INDEX)
    if not isinstance(whole, dict) or whole.get("kind") != kind:
        raise Damaged(f"{path}: expected a {kind} file, got something else")
    content = whole.get("content")
    if not isinstance(content, dict) or whole.get("checksum") != _checksum(content):
        raise Damaged(f"{path}: {CHECKSUM_MISMATCH}")
    return content


@contextmanager
def _open_regular(path: Path) -> Iterator[IO[bytes]]:
    """Open a regular file for reading. A device or a pipe might never end."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise Damaged(f"{path}: is not a regular file")
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise Damaged(f"{path}: cannot be read ({error.strerror})") from None


def _require_size(path: Path, file: IO[bytes], checksum: Checksum) -> None:
    """Raise `Damaged` if the size is wrong, before anything is read: the file may be huge."""
    size = os.fstat(file.fileno()).st_size
    if size != checksum.nbytes:
        raise Damaged(f"{path}: expected {checksum.nbytes} bytes, got {size}")


def _checksum(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())

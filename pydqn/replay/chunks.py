"""Rows in a folder on the disk: chunks that never change, a part that changes, and an index, written last.

Rows are numbered from 0 on and never change; the oldest may be dropped. So each chunk, a fixed range of rows, is
written once: saving again, here or elsewhere on the same disk, links the chunks that have been saved before and writes
those that are new. All are compressed by Zstandard, which is faster than the disk.

No file name is ever read from a file: each follows from what the index says about the chunk.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from pydqn._util.files import (
    Checksum,
    Damaged,
    read_index,
    read_with_checksum,
    sync_folder,
    verify_checksum,
    write_index,
    write_with_checksum,
)

_INDEX = "index.json"
_OURS = re.compile(r"\.?\d{12,}-\d{12,}-[0-9a-f]+-[0-9a-f]{8}\.zst(\.part)?")
_LEVEL = 1


class Chunk(NamedTuple):
    """Rows from `start` to before `stop`, or the part that changes (from 0 to 0)."""

    start: int
    stop: int
    checksum: Checksum

    @property
    def name(self) -> str:
        """File name. No two contents share one, so that writing never touches a file that an older index names."""
        return f"{self.start:012d}-{self.stop:012d}-{self.checksum.nbytes:x}-{self.checksum.checksum:08x}.zst"


class ChunkWriter:
    """Writes rows again and again.

    Args:
        length: rows of a chunk.

    Attributes:
        known: files of chunks that have been written or loaded, by the chunk's number.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.known: dict[int, tuple[Path, Chunk]] = {}

    def save(
        self,
        folder: Path,
        kind: str,
        header: dict[str, Any],
        rows: tuple[int, int],
        read: Callable[[int, int], bytes],
        changing: bytes | None,
        progress: Callable[[float], None] | None = None,
    ) -> None:
        """Write everything, whole or not at all: until the new index is written, the old one counts.

        Args:
            folder: made if it is not there.
            kind: of the index.
            header: goes into the index.
            rows: the first row that is held, and the one after the last.
            read: returns the rows from one to before another.
            changing: the part that changes, if there is one.
            progress: called with the share of the rows that is written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        before = {path.name for path in folder.iterdir()}
        try:
            chunks = self._chunks(folder, *rows, read, progress)
            others = [] if changing is None else [_write(folder, 0, 0, changing)]
            sync_folder(folder)
            plain = [[chunk.start, chunk.stop, chunk.checksum] for chunk in chunks]
            content = {**header, "chunks": plain, "changing": others[0].checksum if others else None}
            write_index(folder / _INDEX, kind, content)
        except BaseException:
            # Whichever index is there by now, the files that it names must stay.
            with suppress(Damaged):
                before |= {chunk.name for chunk in ChunkReader(folder, kind).all_chunks()}
            _sweep(folder, before)
            raise
        self.known = {chunk.start // self.length: (folder / chunk.name, chunk) for chunk in chunks}
        _sweep(folder, {chunk.name for chunk in [*chunks, *others]})

    def _chunks(
        self,
        folder: Path,
        first: int,
        end: int,
        read: Callable[[int, int], bytes],
        progress: Callable[[float], None] | None,
    ) -> list[Chunk]:
        chunks = []
        for number in range(first // self.length, -(-end // self.length)):
            start, stop = max(first, number * self.length), min(end, (number + 1) * self.length)
            chunks.append(self._linked(folder, number, stop) or _write(folder, start, stop, read(start, stop)))
            if progress is not None:
                progress((stop - first) / (end - first))
        return chunks

    def _linked(self, folder: Path, number: int, stop: int) -> Chunk | None:
        """Link a known chunk with the rows up to `stop` into the folder and return it; None where that cannot be."""
        path, chunk = self.known.get(number, (None, None))
        if path is None or chunk is None or chunk.stop != stop:  # (the first row that is held never moves back)
            return None
        try:
            if path.stat().st_size != chunk.checksum.nbytes:
                return None
            with suppress(FileExistsError):
                os.link(path, folder / chunk.name)
        except OSError:  # it is gone, or the file system has no links: write it again
            return None
        return chunk


class ChunkReader:
    """Reads what a `ChunkWriter` wrote. Every method raises `Damaged` if a file is not what was written."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder = folder
        self.header = read_index(folder / _INDEX, kind)
        try:
            plain, changing = self.header.pop("chunks"), self.header.pop("changing")
            self.chunks = [_parse(value) for value in plain]
            self._changing = None if changing is None else Chunk(0, 0, Checksum.parse(changing))
        except (KeyError, TypeError, ValueError) as error:
            raise Damaged(f"{folder / _INDEX}: does not name its chunks ({error})") from None

    def check(self, first: int, end: int, length: int) -> None:
        """Raise `Damaged` unless the chunks hold these rows, at most `length` each."""
        reached = self.chunks[0].start if self.chunks else 0
        good = reached <= first
        for chunk in self.chunks:
            good = good and chunk.start == reached < chunk.stop <= chunk.start + length
            reached = chunk.stop
        if not (good and reached == end):
            raise Damaged(f"{self.folder / _INDEX}: its chunks are not the rows from {first} to {end}")

    def read(self, chunk: Chunk, nbytes: int) -> bytes:
        """Return the content of a chunk, which must be so many bytes."""
        path = self.folder / chunk.name
        # Before a byte is read: a compressed file is neither much larger nor very much smaller than its content.
        if not nbytes >> 16 <= chunk.checksum.nbytes <= nbytes + (nbytes >> 7) + 1024:
            raise Damaged(f"{path}: {chunk.checksum.nbytes} bytes cannot hold {nbytes}")
        import zstandard

        data = read_with_checksum(path, chunk.checksum)
        try:
            if zstandard.get_frame_parameters(data).content_size != nbytes:
                raise Damaged(f"{path}: does not hold {nbytes} bytes")
            return zstandard.ZstdDecompressor().decompress(data, max_output_size=nbytes)
        except zstandard.ZstdError as error:
            raise Damaged(f"{path}: cannot be decompressed ({error})") from None

    def changing(self, nbytes: int) -> bytes:
        """Return the part that changes, which must be so many bytes."""
        if self._changing is None:
            raise Damaged(f"{self.folder / _INDEX}: names no part that changes")
        return self.read(self._changing, nbytes)

    def all_chunks(self) -> list[Chunk]:
        """Return the chunks of rows, and the part that changes."""
        return self.chunks if self._changing is None else [*self.chunks, self._changing]

    def verify(self) -> None:
        """Raise `Damaged` unless all files are there and have the right checksums."""
        for chunk in self.all_chunks():
            verify_checksum(self.folder / chunk.name, chunk.checksum)


def _write(folder: Path, start: int, stop: int, data: bytes) -> Chunk:
    import zstandard

    compressed = zstandard.ZstdCompressor(level=_LEVEL).compress(data)
    chunk = Chunk(start, stop, Checksum.of(compressed))
    write_with_checksum(folder / chunk.name, compressed)
    return chunk


def _sweep(folder: Path, keep: set[str]) -> None:
    """Remove all files that a `ChunkWriter` wrote to the folder, except those to keep."""
    for path in folder.iterdir():
        if _OURS.fullmatch(path.name) and path.name not in keep:
            with suppress(OSError):
                path.unlink()


def _parse(value: object) -> Chunk:
    if not isinstance(value, list) or len(value) != 3 or not all(type(part) is int for part in value[:2]):
        raise ValueError(f"expected start, stop and checksum, got {value!r}")
    if not 0 <= value[0] < value[1]:
        raise ValueError(f"expected rows from one to a later one, got {value!r}")
    return Chunk(value[0], value[1], Checksum.parse(value[2]))

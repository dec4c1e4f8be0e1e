"""GIFs of episodes, written in one pass.

Pillow's own writer keeps all images in memory (108 MB for 600 images of Breakout at scale 2, where this one
needs 9 MB), and its files are five times as large (523 and 104 KB; see bench/bench_recording.py).
"""

from __future__ import annotations

import struct
from typing import IO

import numpy as np
from numpy.typing import NDArray

from pydqn.plotting.images import Caption, Writer, enlarged
from pydqn.plotting.palette import TABLE, Palette, own_palette, pack

_CLEAR = 255  # number of the transparent colour, through which the previous image shows


class GifWriter(Writer):
    """Writes of each image the rectangle that has changed; unchanged pixels in it are transparent. Pillow compresses.

    All images share one colour table, written at the end. When it is full, images with other colours get their own.
    """

    def __init__(self, file: IO[bytes], fps: int, scale: int, height: int, width: int) -> None:
        self._file = file
        self._fps = fps
        self._scale = scale
        self._palette = Palette(_CLEAR)
        self._shown: NDArray[np.uint32] | None = None
        self._count = 0
        file.write(struct.pack("<6sHHBBB", b"GIF89a", width * scale, height * scale, 0xF7, 0, 0))
        self._table_at = file.tell()
        file.write(bytes(TABLE) + b"\x21\xff\x0bNETSCAPE2.0\x03\x01\x00\x00\x00")  # loops without end

    def add(self, image: NDArray[np.uint8], caption: Caption | None) -> None:
        packed = pack(image)
        changed = np.ones(packed.shape, np.bool_) if self._shown is None else packed != self._shown
        self._shown = packed
        box = _box(changed)
        packed, changed = packed[box], changed[box]
        numbers, table = self._palette.numbers(packed), b""
        if numbers is None:
            numbers, table = own_palette(packed)
        else:
            numbers[~changed] = _CLEAR
        self._image(enlarged(numbers, self._scale), box, table)

    def _image(self, numbers: NDArray[np.uint8], box: tuple[slice, slice], table: bytes) -> None:
        from PIL import Image

        self._count += 1
        delay = max(2, self._count * 100 // self._fps - (self._count - 1) * 100 // self._fps)
        rows, columns = box
        left, top = columns.start * self._scale, rows.start * self._scale
        height, width = numbers.shape
        self._file.write(
            # The image stays when the next one is drawn. The shared table has a transparent colour; its own has none.
            struct.pack("<3sBHBB", b"\x21\xf9\x04", 0b100 | (not table), delay, _CLEAR, 0)
            + struct.pack("<sHHHHB", b",", left, top, width, height, 0x87 if table else 0)
            + table
            + b"\x08"
            + Image.fromarray(numbers).tobytes("gif", "L", 8, 0)
            + b"\x00"
        )

    def close(self) -> None:
        self._file.write(b";")
        self._file.seek(self._table_at)
        self._file.write(self._palette.table)


def _box(changed: NDArray[np.bool_]) -> tuple[slice, slice]:
    """Return the rows and columns of the smallest rectangle that holds all changes; one pixel if there are none."""
    spans = []
    for axis in (1, 0):
        indices = np.flatnonzero(changed.any(axis))
        spans.append(slice(int(indices[0]), int(indices[-1]) + 1) if len(indices) else slice(0, 1))
    return spans[0], spans[1]

"""Palettes of exact colours."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

TABLE = 256 * 3  # bytes in a GIF's colour table


class Palette:
    """Numbers colours in the order in which they occur, up to `most` of them. Number 0 is black."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._found = np.zeros(256, np.uint32)
        self._count = 1
        self._number = np.zeros(1 << 24, np.uint8)  # by colour; only the few pages in use take memory

    def numbers(self, packed: NDArray[np.uint32]) -> NDArray[np.uint8] | None:
        """Return the colour numbers of `pack`ed pixels, or None if there would be too many colours."""
        numbers = self._number[packed]
        new = np.unique(packed[self._found[numbers] != packed])
        if not len(new):
            return numbers
        count = self._count + len(new)
        if count > self._most:
            return None
        self._found[self._count : count] = new
        self._number[new] = range(self._count, count)
        self._count = count
        return self._number[packed]

    @property
    def table(self) -> bytes:
        """The colours by number: 256 times 3 bytes, RGB."""
        return unpack(self._found).tobytes()


def pack(image: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """Return the colours of an (H, W, 3) image as (H, W) integers below 2^24."""
    padded = np.zeros((*image.shape[:2], 4), np.uint8)
    padded[..., :3] = image
    return padded.view("<u4")[..., 0]


def unpack(colours: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """Undo `pack`, for any shape."""
    return np.ascontiguousarray(colours, "<u4")[..., None].view(np.uint8)[..., :3]


def own_palette(packed: NDArray[np.uint32]) -> tuple[NDArray[np.uint8], bytes]:
    """Return colour numbers and their table, for one image: exact up to 256 colours, else approximate."""
    from PIL import Image

    colours, numbers = np.unique(packed, return_inverse=True)
    if len(colours) <= 256:
        return numbers.reshape(packed.shape).astype(np.uint8), unpack(colours).tobytes().ljust(TABLE, b"\x00")
    image = Image.fromarray(np.ascontiguousarray(unpack(packed))).quantize(256)
    return np.asarray(image), bytes(image.getpalette() or ()).ljust(TABLE, b"\x00")

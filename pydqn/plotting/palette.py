"""The colours of a video, numbered."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

TABLE = 256 * 3  # bytes of a GIF's colour table


class Palette:
    """Numbers the colours of a video in the order in which they come up, as long as there is room."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._found = np.zeros(256, np.uint32)
        self._count = 1  # Black is number 0, as which every colour counts that has none yet.
        self._number = np.zeros(1 << 24, np.uint8)  # The system gives memory only to the few pages in use.

    def numbers(self, packed: NDArray[np.uint32]) -> NDArray[np.uint8] | None:
        """Return the pixels' colour numbers, or None when there is no room for their colours."""
        numbers = self._number[packed]
        strange = np.unique(packed[self._found[numbers] != packed])
        if not len(strange):
            return numbers
        if self._count + len(strange) > self._room:
            return None
        new = slice(self._count, self._count + len(strange))
        self._found[new] = strange
        self._number[strange] = range(new.start, new.stop)
        self._count = new.stop
        return self._number[packed]

    @property
    def table(self) -> bytes:
        """256 colours, 3 bytes each."""
        return unpack(self._found).tobytes()


def pack(image: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """Return (H, W) colours as integers below 2^24."""
    padded = np.zeros((*image.shape[:2], 4), np.uint8)
    padded[..., :3] = image
    return padded.view("<u4")[..., 0]


def unpack(colours: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """Undo `pack`, whatever the shape."""
    return np.ascontiguousarray(colours, "<u4")[..., None].view(np.uint8)[..., :3]


def own_colours(packed: NDArray[np.uint32]) -> tuple[NDArray[np.uint8], bytes]:
    """Return colour numbers and the table that they are for: exact up to 256 colours, else the nearest ones."""
    from PIL import Image

    colours, numbers = np.unique(packed, return_inverse=True)
    if len(colours) <= 256:
        return numbers.reshape(packed.shape).astype(np.uint8), unpack(colours).tobytes().ljust(TABLE, b"\x00")
    image = Image.fromarray(np.ascontiguousarray(unpack(packed))).quantize(256)
    return np.asarray(image), bytes(image.getpalette() or ()).ljust(TABLE, b"\x00")

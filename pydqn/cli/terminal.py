"""Images in a terminal."""

from __future__ import annotations

import math
import shutil
import sys
import time
from typing import Any


class Terminal:
    """Draws images over each other, two pixels to a character cell."""

    def __init__(self) -> None:
        sys.stdout.write("\x1b[2J")
        self._next = time.perf_counter()

    def draw(self, image: Any, fps: float) -> None:
        """Draw an image, (H, W, 3) uint8, and wait until the next one is due."""
        columns, rows = shutil.get_terminal_size()
        height, width = image.shape[:2]
        shrink = max(1, math.ceil(width / columns), math.ceil(height / (2 * (rows - 1))))
        small = image[::shrink, ::shrink]
        small = small[: len(small) // 2 * 2]
        lines = [
            "".join(
                f"\x1b[38;2;{a[0]};{a[1]};{a[2]};48;2;{b[0]};{b[1]};{b[2]}m\u2580"
                for a, b in zip(top, bottom, strict=True)
            )
            for top, bottom in zip(small[::2], small[1::2], strict=True)
        ]
        sys.stdout.write("\x1b[H" + "\x1b[0m\n".join(lines) + "\x1b[0m\n")
        sys.stdout.flush()
        now = time.perf_counter()
        self._next = max(self._next + 1 / fps, now)
        time.sleep(self._next - now)

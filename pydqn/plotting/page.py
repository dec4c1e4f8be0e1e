"""HTML pages that play an episode in a browser."""

from __future__ import annotations

import base64
import io
import json
import math
from importlib import resources
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from pydqn.plotting.images import Caption, Writer
from pydqn.plotting.palette import Palette, pack


class PageWriter(Writer):
    """Writes `player.html` with the video inside, as JSON in which every image is a PNG."""

    def __init__(self, file: IO[bytes], fps: int, scale: int, title: str, action_names: list[str]) -> None:
        self._file = file
        self._palette = Palette(256)
        self._captions: list[Any] = []
        page = resources.files("pydqn.plotting").joinpath("player.html").read_text("utf-8")
        before, self._after = page.split("@VIDEO@")
        head = _json({"title": title, "fps": fps, "scale": scale, "actions": action_names})
        file.write(before.encode() + head.removesuffix("}").encode() + b',"images":[')

    def add(self, image: NDArray[np.uint8], caption: Caption | None) -> None:
        self._file.write((b',\n"' if self._captions else b'\n"') + base64.b64encode(self._png(image)) + b'"')
        self._captions.append(
            caption
            and [
                caption.action,
                _plain(caption.reward),
                _plain(caption.total),
                [_plain(value) for value in caption.values],
                *([[_plain(value) for value in caption.quantiles]] if caption.quantiles else []),
            ]
        )

    def _png(self, image: NDArray[np.uint8]) -> bytes:
        from PIL import Image

        numbers = self._palette.numbers(pack(image))
        if numbers is None:
            png = Image.fromarray(image)
        else:
            # Only the colours of this image: with at most 16 of them, a PNG has half a byte per pixel.
            used = np.flatnonzero(np.bincount(numbers.ravel(), minlength=256))
            renumbered = np.zeros(256, np.uint8)
            renumbered[used] = np.arange(len(used))
            height, width = numbers.shape
            png = Image.frombytes("P", (width, height), renumbered[numbers].tobytes())
            png.putpalette(np.frombuffer(self._palette.table, np.uint8).reshape(256, 3)[used].tobytes())
        buffer = io.BytesIO()
        png.save(buffer, "PNG")
        return buffer.getvalue()

    def close(self) -> None:
        captions = self._captions if any(self._captions) else []
        self._file.write(b'],\n"captions":' + _json(captions).encode() + b"}" + self._after.encode())


def _json(value: Any) -> str:
    """Return JSON that cannot end the <script> element around it."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _plain(value: float) -> float | None:
    """Return the number in six digits, to save space; None for NaN and infinity, which JSON does not have."""
    return float(f"{value:.6g}") if math.isfinite(value) else None

"""Recording an episode to a file: .mp4, .gif, or .html (a page that plays it)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
from numpy.typing import NDArray

from pydqn._util.files import atomic_write, named_errors
from pydqn.plotting.gif import GifWriter
from pydqn.plotting.images import Caption, Writer, require_image, require_one_each
from pydqn.plotting.page import PageWriter
from pydqn.plotting.video import VideoWriter

_SUFFIXES = (".mp4", ".gif", ".html")
_LARGE = 300 * 300  # pixels; smaller images are shown twice as wide and high


class Recorder:
    """Writes images to a file; needs no display. A context manager: the file appears if its block ends without error.

    A GIF has exact colours, provided that each image has at most 256 of them. A page (.html) always has exact colours,
    needs neither network nor server, and shows the captions, which the other formats leave out. Only captions are held
    in memory.

    Args:
        path: the file; its ending selects the format: .mp4, .gif or .html.
        fps: images per second. A GIF has a resolution of 10 ms and shows each image for at least 20 ms, because
            viewers slow down faster ones.
        scale: factor by which images are enlarged; None is 2 for images of less than 300 x 300 pixels, else 1.
        title: heading of a page.
        action_names: names of all actions, for the action values of a page.

    Raises:
        ValueError: unknown ending, no such folder, `fps` or `scale` is not positive, or no image was added.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        fps: int = 30,
        scale: int | None = None,
        *,
        title: str = "",
        action_names: Sequence[str] = (),
    ) -> None:
        self._path = Path(path)
        if self._path.suffix not in _SUFFIXES:
            endings = f"{', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}"
            raise ValueError(f"record: expected a name that ends in {endings}, got {str(path)!r}")
        if not self._path.parent.is_dir():
            raise ValueError(f"record: there is no folder {str(self._path.parent)!r}")
        for name, value in (("fps", fps), ("scale", scale)):
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self._fps = fps
        self._scale = scale
        self._title = title
        self._action_names = list(action_names)
        self._stack = ExitStack()
        self._shape: tuple[int, ...] = ()
        self._file: IO[bytes]
        self._writer: Writer | None = None

    def __enter__(self) -> Recorder:
        self._file = self._stack.enter_context(atomic_write(self._path))
        return self

    def add(self, image: NDArray[np.uint8], caption: Caption | None = None) -> None:
        """Append one image, (H, W, 3) uint8, enlarged without smoothing.

        Raises:
            ValueError: not an image, not of the first one's size, or the caption does not have one value per action.
        """
        require_image(image)
        if self._writer is None:
            self._shape = image.shape
            self._writer = self._make_writer(*image.shape[:2])
            self._stack.push(self._end)
        if image.shape != self._shape:
            raise ValueError(f"image: expected shape {self._shape} as before, got {image.shape}")
        if caption is not None and caption.values and self._action_names:
            require_one_each(self._action_names, caption.values)
        with named_errors(self._path):
            self._writer.add(image, caption)

    def _make_writer(self, height: int, width: int) -> Writer:
        scale = self._scale or (2 if height * width < _LARGE else 1)
        if self._path.suffix == ".mp4":
            return VideoWriter(self._file, self._fps, scale, height, width)
        if self._path.suffix == ".gif":
            return GifWriter(self._file, self._fps, scale, height, width)
        return PageWriter(self._file, self._fps, scale, self._title, self._action_names)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._writer is None:
            with self._stack:
                raise ValueError("record: expected at least one image, got none")
        self._stack.__exit__(kind, error, trace)

    def _end(self, kind: object, *_: object) -> None:
        """Complete the file, or abandon it after an error."""
        assert self._writer is not None
        (self._writer.close if kind is None else self._writer.abandon)()

"""Pictures of a game as a film (.mp4, .gif) or as a page that plays it (.html), written while the game goes on."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import struct
from collections.abc import Sequence
from contextlib import ExitStack
from importlib import resources
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pydqn.plotting.palette import TABLE, Colours, own_colours, pack
from pydqn.plotting.video import Encoder
from pydqn._util.files import atomic_write, named_errors

_SUFFIXES = (".mp4", ".gif", ".html")
_LARGE = 300 * 300  # pixels; smaller pictures are shown twice as wide and high
_CLEAR = 255  # the colour number that lets the picture before show through

# Of the panel that `beside` draws. Few colours, so that a GIF has room for the game's own.
_PAPER, _BAND, _AXIS, _INK, _BAR, _CHOSEN = "#15181e", "#2a2f3a", "#5b6270", "#c6ccd6", "#5f8fc9", "#ffc24b"
_CHARACTER = 6  # pixels that Pillow's own bitmap font is wide
_MARGIN, _TRACK, _NUMBER, _ROW = 6, 64, 8 * _CHARACTER, 18


class Caption(NamedTuple):
    """What is known about one picture; all for display."""

    action: str  # name of the action that led to the picture
    reward: float
    total: float  # return so far
    values: tuple[float, ...]  # action values that the policy saw when it chose; may be empty


class Recorder:
    """Writes pictures to a file; needs no display. A context manager: the file appears when the block ends well.

    A GIF has the pictures' exact colours as long as each has at most 256 of them. A page (.html) has them always, needs
    neither network nor server, and shows the captions, which the other two leave out. Nothing is held in memory but the
    captions.

    Args:
        path: where to write; the ending says what: .mp4, .gif or .html.
        fps: pictures per second. A GIF counts in 10 ms; at least 20 ms pass per picture, as viewers slow down others.
        scale: how much larger each pixel is shown; None is 2 for pictures of less than 300 x 300 pixels, else 1.
        title: heading of a page.
        action_names: names of all actions, for the action values of a page.

    Raises:
        ValueError: another ending, no such folder, `fps` or `scale` is not positive, or no picture was added.
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
        self._writer: _Writer | None = None

    def __enter__(self) -> Recorder:
        self._file = self._stack.enter_context(atomic_write(self._path))
        return self

    def add(self, picture: NDArray[np.uint8], caption: Caption | None = None) -> None:
        """Append one picture, (H, W, 3) uint8, enlarged without smoothing.

        Raises:
            ValueError: it is none, or not of the first one's size, or the caption has not one value per action name.
        """
        _require_picture(picture)
        if self._writer is None:
            self._shape = picture.shape
            self._writer = self._make_writer(*picture.shape[:2])
            self._stack.push(self._end)
        if picture.shape != self._shape:
            raise ValueError(f"picture: expected shape {self._shape} as before, got {picture.shape}")
        if caption is not None and caption.values and self._action_names:
            _require_one_each(self._action_names, caption.values)
        with named_errors(self._path):
            self._writer.add(picture, caption)

    def _make_writer(self, height: int, width: int) -> _Writer:
        scale = self._scale or (2 if height * width < _LARGE else 1)
        if self._path.suffix == ".mp4":
            return _Video(self._file, self._fps, scale, height, width)
        if self._path.suffix == ".gif":
            return _Gif(self._file, self._fps, scale, height, width)
        return _Page(self._file, self._fps, scale, self._title, self._action_names)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._writer is None:
            with self._stack:
                raise ValueError("record: expected at least one picture, got none")
        self._stack.__exit__(kind, error, trace)

    def _end(self, kind: object, *_: object) -> None:
        """End the film; what a broken-off one still lacks is of no interest."""
        assert self._writer is not None
        (self._writer.close if kind is None else self._writer.abandon)()


class _Writer:
    """Writes one film to a file that is open."""

    def add(self, picture: NDArray[np.uint8], caption: Caption | None) -> None: ...

    def close(self) -> None:
        """Write what comes after the last picture."""

    def abandon(self) -> None:
        """Release what is open beside the file, which will not be kept."""


class _Video(_Writer):
    """H.264 by ffmpeg, whose pictures have even sizes."""

    def __init__(self, file: IO[bytes], fps: int, scale: int, height: int, width: int) -> None:
        self._scale = scale
        self._padding = ((0, height * scale % 2), (0, width * scale % 2), (0, 0))
        large = [side * scale + side * scale % 2 for side in (height, width)]
        self._encoder = Encoder(file, fps, *large)

    def add(self, picture: NDArray[np.uint8], caption: Caption | None) -> None:
        self._encoder.add(np.pad(_enlarged(picture, self._scale), self._padding, mode="edge"))

    def close(self) -> None:
        self._encoder.close()

    def abandon(self) -> None:
        self._encoder.abandon()


class _Gif(_Writer):
    """A GIF in one pass: of each picture only the rectangle that changed, its unchanged pixels see-through.

    Pillow compresses. Its own writer holds all pictures until the end and merges those that are alike. All colours go
    to one table, which is filled in when they are known; a picture with others yet when that is full brings its own.
    """

    def __init__(self, file: IO[bytes], fps: int, scale: int, height: int, width: int) -> None:
        self._file = file
        self._fps = fps
        self._scale = scale
        self._colours = Colours(_CLEAR)
        self._shown: NDArray[np.uint32] | None = None
        self._count = 0
        file.write(struct.pack("<6sHHBBB", b"GIF89a", width * scale, height * scale, 0xF7, 0, 0))
        self._table_at = file.tell()
        file.write(bytes(TABLE) + b"\x21\xff\x0bNETSCAPE2.0\x03\x01\x00\x00\x00")  # repeats for ever

    def add(self, picture: NDArray[np.uint8], caption: Caption | None) -> None:
        packed = pack(picture)
        changed = np.ones(packed.shape, np.bool_) if self._shown is None else packed != self._shown
        self._shown = packed
        box = _box(changed)
        packed, changed = packed[box], changed[box]
        numbers, table = self._colours.numbers(packed), b""
        if numbers is None:
            numbers, table = own_colours(packed)
        else:
            numbers[~changed] = _CLEAR
        self._image(_enlarged(numbers, self._scale), box, table)

    def _image(self, numbers: NDArray[np.uint8], box: tuple[slice, slice], table: bytes) -> None:
        from PIL import Image

        self._count += 1
        delay = max(2, self._count * 100 // self._fps - (self._count - 1) * 100 // self._fps)
        rows, columns = box
        left, top = columns.start * self._scale, rows.start * self._scale
        height, width = numbers.shape
        self._file.write(
            # Leave the picture as it is when its time is over; without a table of its own there is a clear colour.
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
        self._file.write(self._colours.table)


class _Page(_Writer):
    """One HTML file: `player.html` with the film inside, as JSON in which every picture is a PNG."""

    def __init__(self, file: IO[bytes], fps: int, scale: int, title: str, action_names: list[str]) -> None:
        self._file = file
        self._colours = Colours(256)
        self._captions: list[Any] = []
        before, self._after = resources.files("pydqn").joinpath("player.html").read_text("utf-8").split("@FILM@")
        head = _json({"title": title, "fps": fps, "scale": scale, "actions": action_names})
        file.write(before.encode() + head.removesuffix("}").encode() + b',"pictures":[')

    def add(self, picture: NDArray[np.uint8], caption: Caption | None) -> None:
        self._file.write((b',\n"' if self._captions else b'\n"') + base64.b64encode(self._png(picture)) + b'"')
        self._captions.append(
            caption
            and [caption.action, _plain(caption.reward), _plain(caption.total), [_plain(v) for v in caption.values]]
        )

    def _png(self, picture: NDArray[np.uint8]) -> bytes:
        from PIL import Image

        numbers = self._colours.numbers(pack(picture))
        if numbers is None:
            image = Image.fromarray(picture)
        else:
            # Only the colours of this picture: a PNG of 16 or less has half a byte per pixel.
            used = np.flatnonzero(np.bincount(numbers.ravel(), minlength=256))
            position = np.zeros(256, np.uint8)
            position[used] = np.arange(len(used))
            height, width = numbers.shape
            image = Image.frombytes("P", (width, height), position[numbers].tobytes())
            image.putpalette(np.frombuffer(self._colours.table, np.uint8).reshape(256, 3)[used].tobytes())
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return buffer.getvalue()

    def close(self) -> None:
        captions = self._captions if any(self._captions) else []
        self._file.write(b'],\n"captions":' + _json(captions).encode() + b"}" + self._after.encode())


def _box(changed: NDArray[np.bool_]) -> tuple[slice, slice]:
    """Return the smallest rows and columns with all that changed; one pixel where nothing did."""
    spans = []
    for axis in (1, 0):
        places = np.flatnonzero(changed.any(axis))
        spans.append(slice(int(places[0]), int(places[-1]) + 1) if len(places) else slice(0, 1))
    return spans[0], spans[1]


def _enlarged(picture: NDArray[np.uint8], scale: int) -> NDArray[np.uint8]:
    return picture.repeat(scale, axis=0).repeat(scale, axis=1)


def _json(value: Any) -> str:
    """Return JSON that cannot end the <script> that it is in."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _plain(value: float) -> float | None:
    """Six digits are more than anyone reads; JSON has no NaN."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _require_picture(picture: NDArray[np.uint8]) -> None:
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
        raise ValueError(f"picture: expected (H, W, 3) uint8, got {picture.shape} {picture.dtype}")


def _require_one_each(action_names: Sequence[str], values: Sequence[float]) -> None:
    if len(values) != len(action_names):
        raise ValueError(f"values: expected one for each of {len(action_names)} actions, got {len(values)}")


def beside(
    picture: NDArray[np.uint8], action_names: Sequence[str], values: Sequence[float], chosen: int
) -> NDArray[np.uint8]:
    """Return the picture, (H, W, 3) uint8, with bars of the action values drawn right of it, the chosen one marked.

    Bars begin at zero and end at most at a round number (1, 2 or 5 times a power of ten), so that they can be compared
    from picture to picture. Where rows are too low for text there are bars alone. The width depends only on the names
    and on the picture's size.

    Raises:
        ValueError: not a picture, not one value for each action, or `chosen` is not the index of one.
    """
    from PIL import Image, ImageDraw, ImageFont

    _require_picture(picture)
    _require_one_each(action_names, values)
    if not 0 <= chosen < len(values):
        raise ValueError(f"chosen: expected the index of one of {len(values)} actions, got {chosen}")

    zoom = max(1, picture.shape[0] // 200)  # drawn small and enlarged, for the letters have one size
    height = picture.shape[0] // zoom
    track = _MARGIN + max(map(len, action_names)) * _CHARACTER + _MARGIN
    width = track + _TRACK + _NUMBER + _MARGIN
    panel = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(panel)
    font = ImageFont.load_default_imagefont()

    finite = [value for value in values if math.isfinite(value)]
    low, high = -_round_up(-min(finite, default=0)), _round_up(max(finite, default=0))
    high = high or float(low == 0)
    decimals = min(4, max(0, 3 - math.floor(math.log10(max(high, -low)))))
    zero = track + round(-low / (high - low) * _TRACK)

    row = max(1, min(_ROW, height // len(values)))
    start = (height - row * len(values)) // 2
    for index, (name, value) in enumerate(zip(action_names, values, strict=True)):
        top = start + index * row
        bottom = top + row - 2  # inclusive; a line stays free
        if index == chosen:
            draw.rectangle((0, top - 1, width, bottom + 1), _BAND)
        if math.isfinite(value):
            end = track + round((value - low) / (high - low) * _TRACK)
            draw.rectangle((min(zero, end), top, max(zero, end), bottom), _CHOSEN if index == chosen else _BAR)
        draw.line((zero, top - 1, zero, bottom + 1), _AXIS)
        if row >= 10:
            ink, baseline = _CHOSEN if index == chosen else _INK, top + (row - 12) // 2
            draw.text((_MARGIN, baseline), name, ink, font)
            number = f"{value:.{decimals}f}"
            draw.text((width - _MARGIN - len(number) * _CHARACTER, baseline), number, ink, font)
    large = _enlarged(np.asarray(panel), zoom)
    large = np.pad(large, ((0, picture.shape[0] - len(large)), (0, 0), (0, 0)), mode="edge")
    return np.concatenate([picture, large], axis=1)


def _round_up(value: float) -> float:
    """Return the least of 1, 2 and 5 times a power of ten that is not below `value`; 0 for what is not positive."""
    if value <= 0:
        return 0.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value)

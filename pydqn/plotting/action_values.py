"""Drawing action values beside an image."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pydqn.plotting.images import enlarged, require_image, require_one_each

# The panel that `beside` draws has few colours, so that a GIF has room for those of the images.
_PAPER, _BAND, _AXIS, _INK, _BAR, _CHOSEN, _TICK = (
    "#15181e",
    "#2a2f3a",
    "#5b6270",
    "#c6ccd6",
    "#5f8fc9",
    "#ffc24b",
    "#e0533d",
)
_CHARACTER = 6  # width of a character in Pillow's bitmap font, in pixels
_MARGIN, _TRACK, _NUMBER, _ROW = 6, 64, 8 * _CHARACTER, 18


def beside(
    image: NDArray[np.uint8],
    action_names: Sequence[str],
    values: Sequence[float],
    chosen: int,
    quantiles: Sequence[float] = (),
) -> NDArray[np.uint8]:
    """Return the image, (H, W, 3) uint8, with bars of the action values to its right; the chosen one is marked.

    The axis begins at zero and ends at a round number (1, 2 or 5 times a power of ten), so that images can be compared.
    Quantiles of the chosen action's return, if there are any, are ticks on its bar: where they are dense, the return is
    likely. Rows too low for text have bars only. The width depends only on the names and on the size of the image.

    Raises:
        ValueError: not an image, not one value for each action, or `chosen` is not the index of one.
    """
    from PIL import Image, ImageDraw, ImageFont

    require_image(image)
    require_one_each(action_names, values)
    if not 0 <= chosen < len(values):
        raise ValueError(f"chosen: expected the index of one of {len(values)} actions, got {chosen}")

    zoom = max(1, image.shape[0] // 200)  # drawn small and enlarged, since the font has one size
    height = image.shape[0] // zoom
    track = _MARGIN + max(map(len, action_names)) * _CHARACTER + _MARGIN
    width = track + _TRACK + _NUMBER + _MARGIN
    panel = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(panel)
    font = ImageFont.load_default_imagefont()

    finite = [value for value in (*values, *quantiles) if math.isfinite(value)]
    low, high = -_round_up(-min(finite, default=0)), _round_up(max(finite, default=0))
    high = high or float(low == 0)
    decimals = min(4, max(0, 3 - math.floor(math.log10(max(high, -low)))))
    zero = track + round(-low / (high - low) * _TRACK)

    row = max(1, min(_ROW, height // len(values)))
    start = (height - row * len(values)) // 2
    for index, (name, value) in enumerate(zip(action_names, values, strict=True)):
        top = start + index * row
        bottom = top + row - 2  # inclusive; one line stays empty
        if index == chosen:
            draw.rectangle((0, top - 1, width, bottom + 1), _BAND)
        if math.isfinite(value):
            end = track + round((value - low) / (high - low) * _TRACK)
            draw.rectangle((min(zero, end), top, max(zero, end), bottom), _CHOSEN if index == chosen else _BAR)
        draw.line((zero, top - 1, zero, bottom + 1), _AXIS)
        for quantile in quantiles if index == chosen else ():
            position = track + round((quantile - low) / (high - low) * _TRACK)
            draw.line((position, top + 2, position, bottom - 2), _TICK)
        if row >= 10:
            ink, baseline = _CHOSEN if index == chosen else _INK, top + (row - 12) // 2
            draw.text((_MARGIN, baseline), name, ink, font)
            number = f"{value:.{decimals}f}"
            draw.text((width - _MARGIN - len(number) * _CHARACTER, baseline), number, ink, font)
    large = enlarged(np.asarray(panel), zoom)
    large = np.pad(large, ((0, image.shape[0] - len(large)), (0, 0), (0, 0)), mode="edge")
    return np.concatenate([image, large], axis=1)


def _round_up(value: float) -> float:
    """Return the smallest of 1, 2 and 5 times a power of ten that is at least `value`; 0 if `value` is not positive."""
    if value <= 0:
        return 0.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value)

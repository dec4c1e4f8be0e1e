"""Preprocessing kernels: raw Atari frames to 84x84, written straight into the caller's memory.

Each kernel is compiled once by numba and cached on disk, and reproduces its definition bit for bit. OpenCV is the
definition's language and judges the kernels in the tests; it is not needed to run them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

SIZE = 84  # rows and columns of what every kernel returns
_CROP_TOP, _CROP_ROWS = 34, 160  # the playing field that `crop_nearest` keeps
_TALL = 110  # rows that `crop_area` shrinks to before it keeps SIZE of them, from the 18th on
_TALL_TOP = 18

Frames = NDArray[np.uint8]


def resize_area(frame: Frames, previous: Frames | None = None, out: Frames | None = None) -> Frames:
    """Shrink gray frames to 84x84 by area averaging, after the pixel-wise maximum with the frames before.

    Equals `cv2.resize(np.maximum(frame, previous), (84, 84), interpolation=cv2.INTER_AREA)` (Mnih et al. 2015:
    the maximum removes the flicker of sprites that are drawn on every other frame).

    Args:
        frame: (..., H, W) uint8 gray, any H and W from 84 on.
        previous: the same shape, or None for no maximum.
        out: (..., 84, 84) uint8 to write into; its last axis must be contiguous.

    Returns:
        `out`, or a new array.

    Raises:
        ValueError: a shape or dtype does not fit; the message names the argument.
    """
    _require("frame", frame, axes=2, least=(SIZE, SIZE))
    if previous is not None and (previous.shape != frame.shape or previous.dtype != np.uint8):
        raise ValueError(f"previous: expected uint8 {frame.shape}, got {previous.dtype} {previous.shape}")
    height, width = frame.shape[-2:]
    frames = _lanes(frame, 2)
    result, written = _output(out, frame.shape[:-2])
    _resize_area(frames, frames if previous is None else _lanes(previous, 2), written, *_plan(height, width))
    return result


def crop_nearest(rgb: Frames, out: Frames | None = None) -> Frames:
    """Gray (ITU-R BT.601), rows 34 to 193, nearest neighbour to 84x84.

    Equals `cv2.resize(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)[34:194], (84, 84), interpolation=cv2.INTER_NEAREST)`.

    Args:
        rgb: (..., H, W, 3) uint8, H at least 194.
        out: (..., 84, 84) uint8 to write into.

    Raises:
        ValueError: a shape or dtype does not fit; the message names the argument.
    """
    _require("rgb", rgb, axes=3, least=(_CROP_TOP + _CROP_ROWS, 1))
    result, written = _output(out, rgb.shape[:-3])
    _crop_nearest(_lanes(rgb, 3), written)
    return result


def crop_area(rgb: Frames, out: Frames | None = None) -> Frames:
    """Gray in float32 (0.299, 0.587, 0.114), area-averaged to 110 rows of 84, rows 18 to 101, truncated to uint8.

    The preprocessing of the `pong-book` preset. Equals that formula in NumPy followed by
    `cv2.resize(gray, (84, 110), interpolation=cv2.INTER_AREA)[18:102].astype(np.uint8)`.

    Args:
        rgb: (..., H, W, 3) uint8, H at least 110 and W at least 84.
        out: (..., 84, 84) uint8 to write into.

    Raises:
        ValueError: a shape or dtype does not fit; the message names the argument.
    """
    _require("rgb", rgb, axes=3, least=(_TALL, SIZE))
    height, width = rgb.shape[-3:-1]
    result, written = _output(out, rgb.shape[:-3])
    columns = _area_table(width, SIZE)
    rows = tuple(table[_TALL_TOP : _TALL_TOP + SIZE] for table in _area_table(height, _TALL))
    _crop_area(_lanes(rgb, 3), written, *rows, *columns)
    return result


KERNELS: dict[str, Callable[..., Frames]] = {
    "resize_area": resize_area,
    "crop_nearest": crop_nearest,
    "crop_area": crop_area,
}


def _require(name: str, frames: Any, axes: int, least: tuple[int, int]) -> None:
    shape = "(..., H, W, 3)" if axes == 3 else "(..., H, W)"
    if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8:
        got = frames.dtype if isinstance(frames, np.ndarray) else type(frames).__name__
        raise ValueError(f"{name}: expected a uint8 array of shape {shape}, got {got}")
    if frames.ndim < axes or (axes == 3 and frames.shape[-1] != 3):
        raise ValueError(f"{name}: expected shape {shape}, got {frames.shape}")
    height, width = frames.shape[-axes : frames.ndim - axes + 2]
    if height < least[0] or width < least[1]:
        raise ValueError(f"{name}: expected H >= {least[0]} and W >= {least[1]}, got {frames.shape}")


def _lanes(frames: Frames, axes: int) -> Frames:
    """Flatten the leading axes into one."""
    return np.ascontiguousarray(frames).reshape(-1, *frames.shape[frames.ndim - axes :])


def _output(out: Frames | None, leading: tuple[int, ...]) -> tuple[Frames, Frames]:
    """Return what the caller gets and the (N, 84, 84) view of it that the kernel writes."""
    shape = (*leading, SIZE, SIZE)
    if out is None:
        out = np.empty(shape, np.uint8)
    elif not isinstance(out, np.ndarray) or out.shape != shape or out.dtype != np.uint8:
        got = f"{out.dtype} {out.shape}" if isinstance(out, np.ndarray) else type(out).__name__
        raise ValueError(f"out: expected uint8 {shape}, got {got}")
    view = out.reshape(math.prod(leading), SIZE, SIZE)
    if out.size and not np.may_share_memory(view, out):  # reshape had to copy
        raise ValueError(f"out: its leading axes {leading} cannot be seen as one; pass a simpler array")
    return out, view


# --- area averaging: the tables, and OpenCV's own arithmetic ---


@lru_cache(maxsize=32)
def _area_table(source: int, target: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """For each of `target` cells: its first source cell, how many it covers, and their weights as OpenCV rounds them.

    The weights sum to one: a whole cell counts 1 / scale, an end cell by the part that is covered.
    """
    scale = source / target
    first = np.zeros(target, np.int64)
    count = np.zeros(target, np.int64)
    weight = np.zeros((target, math.ceil(scale) + 2), np.float32)
    for cell in range(target):
        start, end = cell * scale, (cell + 1) * scale
        width = min(scale, source - start)
        whole_start, whole_end = math.ceil(start), math.floor(end)
        whole_end = min(whole_end, source - 1)
        whole_start = min(whole_start, whole_end)
        parts = []
        if whole_start - start > 1e-3:
            parts.append((whole_start - 1, (whole_start - start) / width))
        parts += [(i, 1.0 / width) for i in range(whole_start, whole_end)]
        if end - whole_end > 1e-3:
            parts.append((whole_end, min(min(end - whole_end, 1.0), width) / width))
        first[cell], count[cell] = parts[0][0], len(parts)
        weight[cell, : len(parts)] = [share for _, share in parts]
    return first, count, weight


@lru_cache(maxsize=32)
def _plan(height: int, width: int) -> tuple[Any, ...]:
    """Everything `_resize_area` needs to know about a source size.

    Area weights are rationals: with g = gcd(source, 84), every weight is a multiple of g / source. So the sum over
    the area is an exact integer out of a known total, and rounding it is integer arithmetic. OpenCV sums the same
    in float32, which can differ only next to a tie: those few pixels are redone its way.
    """
    tables = (*_area_table(height, SIZE), *_area_table(width, SIZE))
    shares = []
    for source, weight in ((height, tables[2]), (width, tables[5])):
        unit = source // math.gcd(source, SIZE)
        share = np.rint(weight * unit).astype(np.int32)
        assert (share.sum(axis=1) == unit).all(), "area weights are not the rationals they should be"
        shares.append((share, unit))
    (row_share, row_unit), (column_share, column_unit) = shares
    whole = height % SIZE == 0 and width % SIZE == 0
    return (*tables, row_share, column_share, row_unit * column_unit, whole)


@njit(cache=True, nogil=True, inline="always")
def _area_exact(frame, previous, row, column, rows, row_count, row_weight, columns, column_count, column_weight):
    """One pixel in OpenCV's order of float32 operations: along each row first, then down the rows."""
    total = np.float32(0)
    for i in range(row_count[row]):
        y = rows[row] + i
        line = np.float32(0)
        for j in range(column_count[column]):
            x = columns[column] + j
            line += np.float32(max(frame[y, x], previous[y, x])) * column_weight[column, j]
        total += line * row_weight[row, i]
    return total


@njit(cache=True, nogil=True)
def _resize_area(
    frames,
    previous,
    out,
    rows,
    row_count,
    row_weight,
    columns,
    column_count,
    column_weight,
    row_share,
    column_share,
    total,
    whole,
):
    width = frames.shape[2]
    sums = np.empty(width, np.int32)
    most = column_share.shape[1]
    # Within this distance of a tie (in units of 1 / (2 * total)), float32 sums of at most 255 may round either way.
    near = max(1, total // 256)
    reciprocal = np.float32(1) / np.float32(total)
    halves = frames.shape[1] == 2 * SIZE and width == 2 * SIZE
    for lane in range(frames.shape[0]):
        frame, before = frames[lane], previous[lane]
        for row in range(SIZE):
            sums[:] = 0
            for i in range(row_count[row]):
                y = rows[row] + i
                share = row_share[row, i]
                for x in range(width):
                    sums[x] += share * np.int32(max(frame[y, x], before[y, x]))
            for column in range(SIZE):
                x = columns[column]
                area = np.int32(0)
                for j in range(min(most, width - x)):
                    area += column_share[column, j] * sums[x + j]
                if whole:  # OpenCV has a path of its own for whole factors
                    out[lane, row, column] = (area + 2) >> 2 if halves else np.rint(np.float32(area) * reciprocal)
                    continue
                # Round to nearest: floor((2 area + total) / (2 total)).
                doubled = 2 * np.int64(area) + total
                rounded = doubled // (2 * total)
                off = doubled - rounded * 2 * total
                if off <= near or 2 * total - off <= near:
                    exact = _area_exact(
                        frame,
                        before,
                        row,
                        column,
                        rows,
                        row_count,
                        row_weight,
                        columns,
                        column_count,
                        column_weight,
                    )
                    rounded = np.int64(np.rint(exact))
                out[lane, row, column] = rounded


# --- gray and crop ---


@njit(cache=True, nogil=True)
def _crop_nearest(frames, out):
    width = frames.shape[2]
    for lane in range(frames.shape[0]):
        for row in range(SIZE):
            y = _CROP_TOP + row * _CROP_ROWS // SIZE
            for column in range(SIZE):
                pixel = frames[lane, y, column * width // SIZE]
                gray = np.int32(pixel[0]) * 9798 + np.int32(pixel[1]) * 19235 + np.int32(pixel[2]) * 3735
                out[lane, row, column] = (gray + (1 << 14)) >> 15


@njit(cache=True, nogil=True)
def _crop_area(frames, out, rows, row_count, row_weight, columns, column_count, column_weight):
    width = frames.shape[2]
    gray = np.empty(width, np.float32)
    line = np.empty(SIZE, np.float32)
    total = np.empty(SIZE, np.float32)
    most = column_weight.shape[1]
    red, green, blue = np.float32(0.299), np.float32(0.587), np.float32(0.114)
    for lane in range(frames.shape[0]):
        for row in range(SIZE):
            total[:] = 0
            for i in range(row_count[row]):
                pixels = frames[lane, rows[row] + i]
                for x in range(width):
                    gray[x] = (np.float32(pixels[x, 0]) * red + np.float32(pixels[x, 1]) * green) + np.float32(
                        pixels[x, 2]
                    ) * blue
                weight = row_weight[row, i]
                for column in range(SIZE):
                    x = columns[column]
                    line[column] = 0
                    for j in range(min(most, width - x)):
                        line[column] += gray[x + j] * column_weight[column, j]
                    total[column] += line[column] * weight
            for column in range(SIZE):
                out[lane, row, column] = np.uint8(total[column])

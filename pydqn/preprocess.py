"""Preprocessing kernels: raw Atari frames to 84x84, written straight into the caller's array.

numba compiles each kernel once and caches it on disk. The kernels equal their definitions in OpenCV bit for bit. The
tests need OpenCV, the kernels do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pydqn._util.jit import kernel

SIZE = 84  # rows and columns of the result
_CROP_TOP, _CROP_ROWS = 34, 160  # the rows that `crop_nearest` keeps: the playing field
_TALL = 110  # rows that `crop_area` shrinks to before it keeps SIZE of them, beginning with _TALL_TOP
_TALL_TOP = 18

Frames = NDArray[np.uint8]


def resize_area(frame: Frames, previous: Frames | None = None, out: Frames | None = None) -> Frames:
    """Shrink gray frames to 84x84 by area averaging, after the pixel-wise maximum with the frames before.

    Equals `cv2.resize(np.maximum(frame, previous), (84, 84), interpolation=cv2.INTER_AREA)` (Mnih et al. 2015:
    the maximum removes the flicker of sprites that are drawn in every other frame).

    Args:
        frame: (..., H, W) uint8 gray, H and W at least 84.
        previous: uint8 of the same shape, or None for no maximum.
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
    frames = _flatten_leading(frame, 2)
    result, written = _output(out, frame.shape[:-2])
    _resize_area(frames, frames if previous is None else _flatten_leading(previous, 2), written, *_plan(height, width))
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
    width = rgb.shape[-2]
    cells = np.arange(SIZE, dtype=np.uint64)
    _crop_nearest(_interleaved(rgb), written, _CROP_TOP + cells * _CROP_ROWS // SIZE, cells * width // SIZE)
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
    _crop_area(_interleaved(rgb), written, *_tall_plan(height, width))
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


def _flatten_leading(frames: Frames, axes: int) -> Frames:
    """Flatten the leading axes into one."""
    return np.ascontiguousarray(frames).reshape(-1, *frames.shape[frames.ndim - axes :])


def _interleaved(rgb: Frames) -> Frames:
    """Flatten (..., H, W, 3) to (N, H, 3 W)."""
    height, width = rgb.shape[-3:-1]
    return _flatten_leading(rgb, 3).reshape(-1, height, 3 * width)


def _output(out: Frames | None, leading: tuple[int, ...]) -> tuple[Frames, Frames]:
    """Return the result and the (N, 84, 84) view of it that the kernel writes to."""
    shape = (*leading, SIZE, SIZE)
    if out is None:
        out = np.empty(shape, np.uint8)
    elif not isinstance(out, np.ndarray) or out.shape != shape or out.dtype != np.uint8:
        got = f"{out.dtype} {out.shape}" if isinstance(out, np.ndarray) else type(out).__name__
        raise ValueError(f"out: expected uint8 {shape}, got {got}")
    view = out.reshape(math.prod(leading), SIZE, SIZE)
    if out.size and not np.may_share_memory(view, out):  # reshape had to copy
        raise ValueError(f"out: its leading axes {leading} cannot be flattened without a copy; pass a contiguous array")
    return out, view


# --- area averaging: the tables, and OpenCV's arithmetic ---


@lru_cache(maxsize=32)
def _area_table(source: int, target: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Return the first source cell of each target cell, how many it covers, and their weights as OpenCV rounds them.

    The weights sum to one: a whole source cell has 1 / scale, a partly covered one its covered part.
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
    """Return the arguments of `_resize_area` that depend on the source size.

    Area weights are rational numbers: with g = gcd(source, 84), each is a multiple of g / source. So a pixel's sum is
    an integer divided by a known total, and rounding it is integer arithmetic. OpenCV computes the sum in float32,
    which can differ only next to a tie: these few pixels are recomputed in OpenCV's way.
    """
    rows, columns = _area_table(height, SIZE), _area_table(width, SIZE)
    shares, total = [], 1
    for source, (_, _, weight) in ((height, rows), (width, columns)):
        unit = source // math.gcd(source, SIZE)
        share = np.rint(weight * unit).astype(np.int64)
        assert (share.sum(axis=1) == unit).all(), "area weights are not multiples of g / source"
        shares.append(share)
        total *= unit
    number = np.int32 if 2 * 256 * total < 2**31 else np.int64  # int32 for all of ALE's screens
    return (
        *rows,
        *columns,
        *(share.astype(number) for share in shares),
        number(total),
        number(max(1, total // 256)),
        height % SIZE == 0 and width % SIZE == 0,
    )


@lru_cache(maxsize=32)
def _tall_plan(height: int, width: int) -> tuple[Any, ...]:
    """Return the arguments of `_crop_area` that depend on the source size."""
    rows = (table[_TALL_TOP : _TALL_TOP + SIZE] for table in _area_table(height, _TALL))
    return (*rows, *_area_table(width, SIZE))


@kernel(nogil=True, inline="always")
def _area_exact(frame, previous, row, column, rows, row_count, row_weight, columns, column_count, column_weight):
    """Compute one pixel in OpenCV's order of float32 operations: first along each row, then over the rows."""
    total = np.float32(0)
    for i in range(row_count[row]):
        y = rows[row] + i
        line = np.float32(0)
        for j in range(column_count[column]):
            x = columns[column] + j
            line += np.float32(max(frame[y, x], previous[y, x])) * column_weight[column, j]
        total += line * row_weight[row, i]
    return total


# The loops below are short and without slices, so that LLVM vectorizes them: passing a slice counts references, and a
# longer loop body is not vectorized. Columns are weighted as rows of the transposed image, which is faster than reading
# pixels by an index table.


@kernel(nogil=True)
def _weight_rows(frames, previous, env_index, rows, row_count, share, sums):
    """Compute the weighted sums of rows of the pixel-wise maximum for each row of the result: (H, W) to (84, W)."""
    for row in range(SIZE):
        for i in range(row_count[row]):
            y, weight = np.uint64(rows[row] + i), share[row, i]
            if i == 0:
                for x in range(sums.shape[1]):
                    sums[row, x] = weight * max(frames[env_index, y, x], previous[env_index, y, x])
            else:
                for x in range(sums.shape[1]):
                    sums[row, x] += weight * max(frames[env_index, y, x], previous[env_index, y, x])


@kernel(nogil=True)
def _weight_lines(lines, first, count, share, sums):
    """Compute the weighted sums of lines for each line of the result: (N, M) to (84, M)."""
    for line in range(SIZE):
        for i in range(count[line]):
            source, weight = np.uint64(first[line] + i), share[line, i]
            if i == 0:
                for x in range(sums.shape[1]):
                    sums[line, x] = weight * lines[source, x]
            else:
                for x in range(sums.shape[1]):
                    sums[line, x] += weight * lines[source, x]


@kernel(nogil=True)
def _transpose(image, out):
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            out[i, j] = image[j, i]


@kernel(nogil=True)
def _round(area, total, near, rounded, unsure):
    """Round area / total, and mark what is so near to a tie that float32 sums of at most 255 may round either way."""
    twice, half = total + total, np.float32(0.5)
    most = twice - near
    reciprocal = np.float32(1) / np.float32(total)
    for i in range(SIZE):
        for j in range(SIZE):
            nearest = np.int32(np.float32(area[i, j]) * reciprocal + half)
            rest = area[i, j] + area[i, j] + total - nearest * twice  # from 0 to twice if that is right
            rounded[i, j] = np.uint8(nearest)
            unsure[i, j] = np.uint8((rest <= near) | (rest >= most))


@kernel(nogil=True)
def _any(marks, row):
    found = np.uint8(0)
    for c in range(SIZE):
        found |= marks[row, c]
    return found


@kernel(nogil=True)
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
    near,
    whole,
):
    height, width = frames.shape[1:]
    sums = np.empty((SIZE, width), row_share.dtype)
    turned = np.empty((width, SIZE), row_share.dtype)
    area = np.empty((SIZE, SIZE), row_share.dtype)  # from here on, the first axis is that of the columns
    rounded = np.empty((SIZE, SIZE), np.uint8)
    unsure = np.zeros((SIZE, SIZE), np.uint8)
    reciprocal = np.float32(1) / np.float32(total)
    halves = height == 2 * SIZE and width == 2 * SIZE
    for env_index in range(frames.shape[0]):
        _weight_rows(frames, previous, env_index, rows, row_count, row_share, sums)
        _transpose(sums, turned)
        _weight_lines(turned, columns, column_count, column_share, area)
        if whole:  # OpenCV has a separate path for integer factors
            for c in range(SIZE):
                for row in range(SIZE):
                    a = area[c, row]
                    rounded[c, row] = (a + 2) >> 2 if halves else np.rint(np.float32(a) * reciprocal)
        else:
            _round(area, total, near, rounded, unsure)
        for c in range(SIZE):
            if not whole and _any(unsure, c):
                for row in range(SIZE):
                    if unsure[c, row]:
                        exact = _area_exact(
                            frames[env_index],
                            previous[env_index],
                            row,
                            c,
                            rows,
                            row_count,
                            row_weight,
                            columns,
                            column_count,
                            column_weight,
                        )
                        rounded[c, row] = np.uint8(np.rint(exact))
        for row in range(SIZE):
            for c in range(SIZE):
                out[env_index, row, c] = rounded[c, row]


# --- gray and crop ---


@kernel(nogil=True)
def _gray_whole(frames, env_index, rows, gray):
    """ITU-R BT.601 in 15 bits, as OpenCV computes it. `frames` are (N, H, 3 W), which LLVM can vectorize."""
    for row in range(gray.shape[0]):
        y = rows[row]
        for x in range(np.uint64(gray.shape[1])):
            i = np.uint64(3) * x
            red, green, blue = (
                frames[env_index, y, i],
                frames[env_index, y, i + np.uint64(1)],
                frames[env_index, y, i + np.uint64(2)],
            )
            mixed = np.uint32(red) * np.uint32(9798) + np.uint32(green) * np.uint32(19235)
            gray[row, x] = (mixed + np.uint32(blue) * np.uint32(3735) + np.uint32(1 << 14)) >> np.uint32(15)


@kernel(nogil=True)
def _gray_float(frames, env_index, top, gray):
    for row in range(gray.shape[0]):
        y = np.uint64(top + row)
        for x in range(np.uint64(gray.shape[1])):
            i = np.uint64(3) * x
            red, green, blue = (
                frames[env_index, y, i],
                frames[env_index, y, i + np.uint64(1)],
                frames[env_index, y, i + np.uint64(2)],
            )
            mixed = np.float32(red) * np.float32(0.299) + np.float32(green) * np.float32(0.587)
            gray[row, x] = mixed + np.float32(blue) * np.float32(0.114)


@kernel(nogil=True)
def _crop_nearest(frames, out, rows, columns):
    gray = np.empty((SIZE, frames.shape[2] // 3), np.uint8)
    for env_index in range(frames.shape[0]):
        _gray_whole(frames, env_index, rows, gray)
        for row in range(SIZE):
            for c in range(SIZE):
                out[env_index, row, c] = gray[row, columns[c]]


@kernel(nogil=True)
def _crop_area(frames, out, rows, row_count, row_weight, columns, column_count, column_weight):
    top = rows[0]
    height, width = rows[-1] + row_count[-1] - top, frames.shape[2] // 3
    gray = np.empty((height, width), np.float32)
    turned = np.empty((width, height), np.float32)
    narrow = np.empty((SIZE, height), np.float32)
    lines = np.empty((height, SIZE), np.float32)
    total = np.empty((SIZE, SIZE), np.float32)
    for env_index in range(frames.shape[0]):
        _gray_float(frames, env_index, top, gray)
        _transpose(gray, turned)
        _weight_lines(turned, columns, column_count, column_weight, narrow)
        _transpose(narrow, lines)
        _weight_lines(lines, rows - top, row_count, row_weight, total)
        for row in range(SIZE):
            for c in range(SIZE):
                out[env_index, row, c] = np.uint8(total[row, c])

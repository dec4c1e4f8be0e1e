"""Checks of arguments: each function returns the value, or raises a ValueError that names the argument."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

_WHOLE = [f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)]
_RANK = {"b": 0, "i": 1, "u": 1, "f": 2}  # kinds of numbers; each is a subset of the next
_DTYPES = ["bool", *_WHOLE, "float16", "float32", "float64", "float96", "float128"]


def fraction(name: str, value: object) -> float:
    """Return a number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer)) or not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number from 0 to 1, got {value!r}")
    return float(value)


def integer(name: str, value: object, least: int, most: int | None = None) -> int:
    """Return an integer from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
    if most is not None and value > most:
        raise ValueError(f"{name}: expected an integer of at most {most}, got {value!r}")
    return int(value)


def dtype_name(name: str, value: object) -> str:
    """Return a dtype's plain name, as files hold it. NumPy would parse and compile anything else."""
    if not isinstance(value, str) or value not in _DTYPES:
        raise ValueError(f"{name}: expected one of {', '.join(_DTYPES)}, got {value!r}")
    return str(value)


def number_dtype(name: str, value: DTypeLike) -> np.dtype[Any]:
    """Return a dtype of plain numbers in this machine's byte order."""
    try:
        dtype = np.dtype(value)
    except TypeError:
        raise ValueError(f"{name}: expected a NumPy dtype, got {value!r}") from None
    if dtype.kind not in "biuf" or not dtype.isnative:
        raise ValueError(f"{name}: expected a native bool, integer or real dtype, got {dtype}")
    return dtype


def indices(index: ArrayLike) -> NDArray[np.int64]:
    """Return a list of integers as an array."""
    array = np.asarray(index)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"index: expected a list of integers, got {index!r}")
    return np.require(array, np.int64, ["C", "A"])


def flags(name: str, value: ArrayLike) -> NDArray[np.bool_]:
    """Return booleans, or numbers that are 0 or 1, as booleans."""
    array = np.asarray(value)
    if array.dtype.kind == "b":
        return array
    if array.dtype.kind in "iuf" and ((array == 0) | (array == 1)).all():
        return array.astype(bool)
    raise ValueError(f"{name}: expected booleans, or numbers that are 0 or 1, got {value!r} of dtype {array.dtype}")


def converted(
    name: str, array: NDArray[Any], dtype: np.dtype[Any], *, rounded: bool = False, way_on: str = ""
) -> NDArray[Any]:
    """Return numbers in a buffer's dtype, with the same values.

    Booleans may become integers, and integers floating-point numbers, never the other way round: a floating-point image
    from 0 to 1 means something else than one of integers, even if it is black.

    Args:
        name: of the argument.
        array: numbers of any dtype.
        dtype: that of the buffer.
        rounded: whether floating-point numbers may lose digits (they are rounded to the nearest, and stay finite).
        way_on: advice in the error message; by default, to make the buffer with another dtype.

    Raises:
        ValueError: a value would change.
    """
    if array.dtype == dtype:
        return array
    if array.dtype.kind not in _RANK or _RANK[array.dtype.kind] > _RANK[dtype.kind]:
        raise _would_change(name, array, dtype, "", way_on)
    exact = not (array.dtype.kind in "iu" and dtype.kind == "f")  # NumPy lets int64 become float64, which rounds
    if exact and np.can_cast(array.dtype, dtype):
        return array.astype(dtype)
    if array.dtype.kind != "f":
        # Not by converting there and back: the result of an overflow depends on the processor.
        most = 1 << (np.finfo(dtype).nmant + 1) if dtype.kind == "f" else np.iinfo(dtype).max
        least = -most if dtype.kind == "f" else np.iinfo(dtype).min
        for value in (int(array.min()), int(array.max())) if array.size else ():
            if not least <= value <= most:
                raise _would_change(name, array, dtype, f" with the value {value}", way_on)
        return array.astype(dtype)
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    kept = np.isfinite(result) if rounded else result == array
    if not (kept | ~np.isfinite(array)).all():
        value = array[~kept & np.isfinite(array)].flat[0]
        raise _would_change(name, array, dtype, f" with the value {value!r}", way_on)
    return result


def _would_change(name: str, array: NDArray[Any], dtype: np.dtype[Any], value: str, way_on: str) -> ValueError:
    other = f"make the buffer with dtype={array.dtype.name!r}, or " if array.dtype.kind in _RANK else ""
    return ValueError(
        f"{name}: expected dtype {dtype}, as of the buffer, got dtype {array.dtype}{value}, which would change; "
        + (way_on or f"{other}convert {name} to {dtype} yourself")
    )

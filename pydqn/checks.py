"""Arguments, checked: each function returns its value, or raises a ValueError that names the argument."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

_WHOLE = [f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)]
_DTYPES = ["bool", *_WHOLE, "float16", "float32", "float64", "float96", "float128"]


def fraction(name: str, value: object) -> float:
    """Return a number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer)) or not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number from 0 to 1, got {value!r}")
    return float(value)


def integer(name: str, value: object, least: int, most: int | None = None) -> int:
    """Return an integer within its limits."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
    if most is not None and value > most:
        raise ValueError(f"{name}: expected an integer of at most {most}, got {value!r}")
    return int(value)


def dtype_name(name: str, value: object) -> str:
    """Return the plain name of such a dtype, as files hold it: NumPy would parse, and compile, whatever else it is."""
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
    """Return a list of integers."""
    wanted = np.asarray(index)
    if wanted.ndim != 1 or (wanted.size and wanted.dtype.kind not in "iu"):
        raise ValueError(f"index: expected a list of integers, got {index!r}")
    return np.require(wanted, np.int64, ["C", "A"])

"""numba's `njit` with a cache on disk, on any machine.

numba refuses to compile a cached function if it can write neither to the package's folder nor to the user's cache
folder, as in many containers. Kernels are then cached in a private folder in the temporary folder, or, if that is not
safe, compiled anew in each process.
"""

from __future__ import annotations

import functools
import os
import stat
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numba
from numba import njit

_Decorator = Callable[[Callable[..., Any]], Any]


def kernel(**options: Any) -> _Decorator:
    """Return a decorator: `numba.njit(cache=True, **options)`, or without the cache if none can be written."""

    def compiled(function: Callable[..., Any]) -> Any:
        try:
            dispatcher = njit(cache=True, **options)(function)
        except RuntimeError:  # "cannot cache function ...: no locator available"
            dispatcher = _cached_elsewhere(function, options)
        _tolerate_errors(dispatcher)
        return dispatcher

    return compiled


def _cached_elsewhere(function: Callable[..., Any], options: dict[str, Any]) -> Any:
    folder = _temporary_folder()
    if folder is None:
        return njit(**options)(function)
    # numba reads this setting when a function is decorated; functions of other packages keep their caches.
    before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(folder)
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:
        return njit(**options)(function)
    finally:
        numba.config.CACHE_DIR = before


def _tolerate_errors(dispatcher: Any) -> None:
    """Compile a kernel without the cache if that cannot be read or written.

    Otherwise a full disk, or another user's files, would make the first call of the kernel fail.
    """
    cache = getattr(dispatcher, "_cache", None)
    for name in ("load_overload", "save_overload"):
        if hasattr(cache, name):
            setattr(cache, name, _without_errors(getattr(cache, name)))


def _without_errors(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def tolerant(*arguments: Any, **named: Any) -> Any:
        with suppress(OSError):
            return method(*arguments, **named)
        return None

    return tolerant


@functools.cache
def _temporary_folder() -> Path | None:
    """Return a folder that only this user can write to, or None. Warns once in both cases."""
    folder = None
    with suppress(OSError):  # the temporary folder may not be writable, either
        path = Path(tempfile.gettempdir()) / f"pydqn-kernels-{_user()}"
        with suppress(FileExistsError):
            path.mkdir(0o700)
        if _is_private(path):
            with tempfile.TemporaryFile(dir=path):
                folder = path
    where = "are compiled anew in each process" if folder is None else f"are cached in {folder}"
    warnings.warn(
        f"numba can write neither beside the package nor in the user's cache folder: compiled functions {where}; "
        "NUMBA_CACHE_DIR chooses a folder",
        RuntimeWarning,
        stacklevel=2,
    )
    return folder


def _user() -> str:
    return str(os.getuid()) if hasattr(os, "getuid") else "user"


def _is_private(path: Path) -> bool:
    """Return whether no other user could have put files there: numba runs what it finds in its cache."""
    about = path.lstat()
    if not hasattr(os, "getuid"):  # Windows: temporary folders are the user's own
        return stat.S_ISDIR(about.st_mode)
    return stat.S_ISDIR(about.st_mode) and about.st_uid == os.getuid() and not about.st_mode & 0o077

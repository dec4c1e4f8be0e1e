"""Compiled functions: numba's `njit` with its cache on disk, on any machine.

numba refuses to compile a cached function where neither the package's folder nor the user's own cache folder can be
written, as in many containers. Kernels are then cached in a folder of this user in the temporary folder, or, where that
is not safe either, compiled anew in each process.
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
    """Return a decorator: `numba.njit(cache=True, **options)`, or without the cache where none can be written."""

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
    # numba reads this setting when a function is decorated; other people's functions keep their own caches.
    before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(folder)
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:
        return njit(**options)(function)
    finally:
        numba.config.CACHE_DIR = before


def _tolerate_errors(dispatcher: Any) -> None:
    """Let a kernel that cannot be read from the cache, or written there, be compiled without it.

    A full disk, or files of another user, would end the first call of the kernel otherwise.
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
    """Return a folder that only this user can write to, or None. Warns once, whichever it is."""
    folder = None
    with suppress(OSError):  # there may be no temporary folder that can be written, either
        path = Path(tempfile.gettempdir()) / f"pydqn-kernels-{_user()}"
        with suppress(FileExistsError):
            path.mkdir(0o700)
        if _is_ours(path):
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


def _is_ours(path: Path) -> bool:
    """Whether nobody else could have put files there: what numba finds in its cache, it runs."""
    about = path.lstat()
    if not hasattr(os, "getuid"):  # Windows: temporary folders are the user's own
        return stat.S_ISDIR(about.st_mode)
    return stat.S_ISDIR(about.st_mode) and about.st_uid == os.getuid() and not about.st_mode & 0o077

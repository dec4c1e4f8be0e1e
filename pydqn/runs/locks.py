"""Locks on the folders of runs: one run at a time may write in a folder. Reading needs no lock."""

from __future__ import annotations

import datetime
import errno
import os
import socket
import stat
import time
import warnings
import weakref
from contextlib import suppress
from pathlib import Path
from typing import IO

from pydqn._util.files import named_errors

try:
    import fcntl
except ImportError:  # Windows: only runs of the same process are kept apart there
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
_TRIES, _PAUSE_SECONDS = 10, 0.03  # other processes may be releasing the lock, or only reading who holds it
_Key = tuple[int, int]  # device and inode of a folder


class FolderInUse(ValueError):
    """Another run is writing in the folder; the message says which."""


class FolderLock:
    """An exclusive lock on a folder, held until `release` or until this process ends, however that happens.

    A file in the folder, `.lock`, is locked and names the process. The operating system unlocks it when the process
    ends; child processes do not keep it. Where the file system has no locks, a warning says so, and only runs of the
    same process are kept apart.

    Args:
        folder: made if it does not exist, and removed by `release` if it is still empty.
        new: the folder must not exist yet.

    Raises:
        FolderInUse: another run, of this process or another, writes there.
        FileExistsError: the folder exists, but was to be new.
    """

    def __init__(self, folder: str | os.PathLike[str], *, new: bool = False) -> None:
        self.folder = Path(folder)
        made: list[Path] = []
        try:
            for _ in range(_TRIES):
                with suppress(FileNotFoundError):  # another run failed to start, and has removed the folder again
                    _make(self.folder, made, new and self.folder not in made)
                    hold = _Hold(self.folder, made)
                    break
            else:
                raise FolderInUse(f"logdir: {str(self.folder)!r} is removed again and again by other runs")
        except BaseException:
            _remove(made)
            raise
        self.release = weakref.finalize(self, hold.release)  # also when the run is garbage-collected

    def __repr__(self) -> str:
        return f"FolderLock({str(self.folder)!r})"


def lock_numbered(folder: Path) -> FolderLock:
    """Make and lock `folder`, or if it exists, the first of `folder`.2, `folder`.3, ... that does not."""
    number, candidate = 1, folder
    while True:
        try:
            return FolderLock(candidate, new=True)
        except FileExistsError:
            number += 1
            candidate = folder.with_name(f"{folder.name}.{number}")


def lock_holder(folder: str | os.PathLike[str]) -> str | None:
    """Return a description of the process that holds the lock of a folder, or None."""
    try:
        file = _opened(Path(folder) / LOCK, os.O_RDONLY)
    except OSError:
        return None
    with file:
        return _about(file) if fcntl is not None and not _locked(file, fcntl.LOCK_SH) else None


class _Hold:
    """A locked file, and the folders made for it; apart from `FolderLock`, whose finalizer must not refer to it."""

    def __init__(self, folder: Path, made: list[Path]) -> None:
        self._path, self._made, self._pid = folder / LOCK, made, os.getpid()
        about = folder.stat()
        self._key: _Key = (about.st_dev, about.st_ino)
        other = _held.setdefault(self._key, self)
        if other is not self:
            if other.is_current():
                raise _in_use(folder, f"this process, {self._pid}")
            _held[self._key] = self  # the other's folder was removed, and this one was given the same inode
        try:
            self.file = self._lock(folder)
        except BaseException:
            del _held[self._key]
            raise

    def _lock(self, folder: Path) -> IO[bytes]:
        holder = "another process"
        for _ in range(_TRIES):
            file = _opened(self._path, os.O_RDWR | os.O_CREAT)
            try:
                if not _locked(file, None if fcntl is None else fcntl.LOCK_EX):
                    holder = _about(file)
                elif self._names(file):
                    with named_errors(self._path):
                        file.truncate(0)
                        file.write(f"process {self._pid} on {socket.gethostname()}, since {_now()}\n".encode())
                    return file
            except BaseException:
                file.close()
                raise
            file.close()
            time.sleep(_PAUSE_SECONDS)
        raise _in_use(folder, holder)

    def is_current(self) -> bool:
        """Whether the folder is still there. A lock that is just being taken counts as current."""
        with suppress(OSError, ValueError):  # another thread is closing the file at this moment
            return not hasattr(self, "file") or self._names(self.file)
        return False

    def _names(self, file: IO[bytes]) -> bool:
        """Whether the file still has its name: `release` removes it."""
        with suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(file.fileno()), self._path.stat())
        return False

    def release(self) -> None:
        """Unlock, unless that has been done already, or this is a child of the process that locked."""
        if os.getpid() != self._pid or self.file.closed:
            return
        with suppress(OSError):
            if self._names(self.file):
                self._path.unlink()
        if _held.get(self._key) is self:
            del _held[self._key]
        self.file.close()
        _remove(self._made)


_held: dict[_Key, _Hold] = {}  # in this process


def _forget() -> None:
    """Close the copies of the files in a forked child: they would hold the locks as long as the child lives."""
    for hold in _held.values():
        with suppress(AttributeError):  # another thread was about to open it
            hold.file.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _opened(path: Path, flags: int) -> IO[bytes]:
    """Open a regular file, never what a link leads to; children that run other programs do not get it."""
    file = os.fdopen(os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666), "rb" if not flags else "r+b", 0)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


def _locked(file: IO[bytes], how: int | None) -> bool:
    """Lock an open file; returns False if it is locked already. Where locking is not possible, warn and return True."""
    try:
        if how is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno == errno.EWOULDBLOCK:
            return False
        _warn(error.strerror or str(error))
    return True


def _warn(why: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"the folders of runs cannot be locked here ({why}): make sure that no two runs write in the same one",
            RuntimeWarning,
            stacklevel=2,
        )


_warned = False


def _about(file: IO[bytes]) -> str:
    """Return the description that the holder wrote into the file."""
    text = file.read(200).decode(errors="replace").strip()
    return text if text and text.isprintable() else "another process"


def _in_use(folder: Path, holder: str) -> FolderInUse:
    return FolderInUse(
        f"logdir: another run is writing in {str(folder)!r} ({holder}); wait for it, stop it, or choose another folder"
    )


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")


def _make(folder: Path, made: list[Path], new: bool) -> None:
    """Make a folder and its parents; append those that did not exist to `made`."""
    if not folder.parent.exists():
        _make(folder.parent, made, False)
    try:
        folder.mkdir()
    except FileExistsError:
        if new or not folder.is_dir():
            raise
    else:
        made.append(folder)


def _remove(made: list[Path]) -> None:
    """Remove folders that were made, innermost first, until one is not empty."""
    with suppress(OSError):
        for folder in reversed(made):
            folder.rmdir()

"""Who may write in a run's folder: one run at a time. Reading needs no leave."""

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
except ImportError:  # Windows: nothing but names keeps runs of several processes apart there
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
_TRIES, _PAUSE_SECONDS = 10, 0.03  # for whoever is just letting go, or only looks who holds the folder
_Key = tuple[int, int]  # device and inode of a folder


class FolderInUse(ValueError):
    """Another run is writing in the folder; the message says which."""


class FolderLock:
    """The right to write in a folder, from now until `release`, or until this process ends, however that happens.

    A file in the folder, `.lock`, is locked meanwhile, and says by whom. The system itself unlocks it when the process
    is gone; children do not keep it. Where a file system has no locks, a warning says so, and only runs of the same
    process are kept apart.

    Args:
        folder: made if it is not there, and removed by `release` if nothing has been put into it.
        new: the folder must not be there yet.

    Raises:
        Taken: another run, of this process or another, writes there.
        FileExistsError: it is there though it was to be new.
    """

    def __init__(self, folder: str | os.PathLike[str], *, new: bool = False) -> None:
        self.folder = Path(folder)
        made: list[Path] = []
        try:
            for _ in range(_TRIES):
                with suppress(FileNotFoundError):  # another run, which came to nothing, has taken the folder away
                    _make(self.folder, made, new and self.folder not in made)
                    hold = _Hold(self.folder, made)
                    break
            else:
                raise FolderInUse(f"logdir: {str(self.folder)!r} is removed again and again by others")
        except BaseException:
            _remove(made)
            raise
        self.release = weakref.finalize(self, hold.release)  # a run that nobody refers to any more holds nothing

    def __repr__(self) -> str:
        return f"Claim({str(self.folder)!r})"


def lock_numbered(folder: Path) -> FolderLock:
    """Make and claim `folder`, or where that is there already, the first of `folder`.2, `folder`.3, ... that is not."""
    number, candidate = 1, folder
    while True:
        try:
            return FolderLock(candidate, new=True)
        except FileExistsError:
            number += 1
            candidate = folder.with_name(f"{folder.name}.{number}")


def lock_holder(folder: str | os.PathLike[str]) -> str | None:
    """Return who writes in a folder now, or None."""
    try:
        file = _opened(Path(folder) / LOCK, os.O_RDONLY)
    except OSError:
        return None
    with file:
        return _about(file) if fcntl is not None and not _locked(file, fcntl.LOCK_SH) else None


class _Hold:
    """A locked file, and the folders that were made for it."""

    def __init__(self, folder: Path, made: list[Path]) -> None:
        self._path, self._made, self._pid = folder / LOCK, made, os.getpid()
        about = folder.stat()
        self._key: _Key = (about.st_dev, about.st_ino)
        other = _held.setdefault(self._key, self)
        if other is not self:
            if other.is_current():
                raise _in_use(folder, f"this process, {self._pid}")
            _held[self._key] = self  # the other's folder was removed, and this one has got its inode
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
        """Whether the folder is still there, as far as this can be told: a hold that is being taken is."""
        return not hasattr(self, "file") or self._names(self.file)

    def _names(self, file: IO[bytes]) -> bool:
        """Whether the file still has its name: who held the folder before has removed it in the end."""
        with suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(file.fileno()), self._path.stat())
        return False

    def release(self) -> None:
        """Let go, unless that has been done, or this is a child of the process that took hold."""
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
    """In a child that was forked: its copies of the files would hold the locks for as long as it lives."""
    for hold in _held.values():
        with suppress(AttributeError):  # one that another thread was about to open
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
    """Lock an open file if nobody else has; where that is not possible at all, warn, and take it for done."""
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
            f"the runs' folders cannot be locked here ({why}): see to it that no two runs write in the same one",
            RuntimeWarning,
            stacklevel=2,
        )


_warned = False


def _about(file: IO[bytes]) -> str:
    """Return what the holder has written about itself."""
    text = file.read(200).decode(errors="replace").strip()
    return text if text and text.isprintable() else "another process"


def _in_use(folder: Path, holder: str) -> FolderInUse:
    return FolderInUse(
        f"logdir: a run is going on in {str(folder)!r} ({holder}); let it end, or stop it, or choose another folder"
    )


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")


def _make(folder: Path, made: list[Path], new: bool) -> None:
    """Make a folder and those above it; note which were not there."""
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
    """Remove folders that were made, the innermost first, as far as they are empty."""
    with suppress(OSError):
        for folder in reversed(made):
            folder.rmdir()

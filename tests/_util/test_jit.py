"""Compiled functions if their cache cannot be written or used."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import numba
import pytest
from numba.core import caching

import pydqn
from pydqn._util import jit
from pydqn._util.jit import kernel

PACKAGE = Path(pydqn.__file__).parent
OWN_FOLDER = f"pydqn-kernels-{os.getuid() if hasattr(os, 'getuid') else 'user'}"


def test_a_run_if_neither_the_package_nor_the_home_can_be_written(tmp_path):
    """As in a container; also for root, who cannot make a folder where a file is, either."""
    site, temporary = tmp_path / "site", tmp_path / "tmp"
    shutil.copytree(PACKAGE, site / "pydqn", ignore=shutil.ignore_patterns("__pycache__"))
    for source in (site / "pydqn").rglob("__init__.py"):
        source.with_name("__pycache__").touch()
    temporary.mkdir()
    env = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
    env |= {"HOME": os.devnull, "XDG_CACHE_HOME": os.devnull, "TMPDIR": str(temporary), "PYTHONPATH": str(site)}
    options = ["--total-steps", "60", "--evaluation-every-steps", "0"]
    command = [sys.executable, "-m", "pydqn", "train", "frozenlake", *options]
    caches = []
    for name in ("first", "second"):
        logdir = ["--logdir", str(tmp_path / name)]
        done = subprocess.run([*command, *logdir], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert "done: 60 steps" in done.stdout
        assert done.stderr.count("compiled functions are cached in") == 1
        caches.append({path: path.stat().st_mtime_ns for path in temporary.rglob("*.nb*")})
    assert stat.S_IMODE((temporary / OWN_FOLDER).stat().st_mode) == 0o700
    assert caches[0]
    assert caches[1] == caches[0]  # read, not compiled again


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """Leave numba only the cache folder that it is given."""
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [caching.UserProvidedCacheLocator])
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    jit._temporary_folder.cache_clear()
    yield
    jit._temporary_folder.cache_clear()


def test_the_temporary_folder_is_only_for_our_own_functions(nowhere, tmp_path):
    with pytest.raises(RuntimeError, match="no locator available"):  # from numba itself
        numba.njit(cache=True)(_double)
    with pytest.warns(RuntimeWarning, match=r"cached in .*NUMBA_CACHE_DIR chooses a folder") as warned:
        assert [kernel()(_double)(21), kernel()(_double)(2.5)] == [42, 5]
    assert len(warned) == 1
    assert [*(tmp_path / OWN_FOLDER).rglob("*.nbi")]
    assert numba.config.CACHE_DIR == ""


@pytest.mark.parametrize("what", ["open to all", "another's", "a link", "a file", "nowhere"])
def test_a_temporary_folder_that_other_users_can_write_to_is_not_used(nowhere, monkeypatch, tmp_path, what):
    """numba runs what it finds in a cache."""
    folder = tmp_path / OWN_FOLDER
    if what == "a link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "elsewhere")
    elif what == "a file":
        folder.touch()
    elif what == "nowhere":
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    elif what == "open to all":
        folder.mkdir()
        folder.chmod(0o777)
    elif not hasattr(os, "getuid") or os.getuid():
        pytest.skip("only root can give a folder to another user")
    else:
        folder.mkdir(0o700)
        os.chown(folder, 12345, 12345)
    with pytest.warns(RuntimeWarning, match="compiled anew in each process"):
        assert kernel()(_double)(21) == 42
    assert not [*tmp_path.rglob("*.nb*")]


@pytest.mark.parametrize("method", ["load", "save"])
def test_without_a_working_cache_kernels_are_compiled(monkeypatch, tmp_path, method):
    """A full disk, or files that only another user may read."""

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(caching.IndexDataCacheFile, method, fail)
    assert kernel()(_double)(21) == 42
    with pytest.raises(OSError, match="No space left"):  # what numba does
        numba.njit(cache=True)(_double)(21)


def _double(value):
    return 2 * value

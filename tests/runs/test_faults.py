"""Kills and failing file operations at any point leave earlier files intact."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HELPERS = Path(__file__).parents[1] / "helpers"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not sys.platform.startswith("linux") or compiler is None:
        pytest.skip("faults are injected by a preloaded library: needs Linux and a C compiler")
    path = tmp_path_factory.mktemp("faults") / "faults.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", path, HELPERS / "faults.c", "-ldl"], check=True)
    return path


@pytest.mark.parametrize(
    ("action", "stride", "least"),
    [
        ("weights", 1, 12),
        ("replay", 1, 80),
        ("torchrl", 1, 100),
        ("checkpoints", 1, 120),
        ("training", 41, 20),
        ("resuming", 1, 30),
    ],
)
def test_nothing_is_lost_or_half_written(library, action, stride, least):
    """Every operation that changes the disk is killed, and fails (in a whole run: only some of them)."""
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, HELPERS / "faults.py", library, action, str(stride)],
        env={**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(re.search(r": (\d+) faults", done.stdout)[1]) >= least
    for kind in ["kill"] if action == "resuming" else ["kill", "kill halfway", "full disk", "read only"]:
        assert f"'{kind}': " in done.stdout

"""The C++ core without Python, under the compiler's sanitizers; `core_test.cpp` says what is tested."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("core_test.cpp")


@pytest.fixture(scope="module")
def core_test(tmp_path_factory):
    """Return a function that builds with some flags and runs."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("core")
    built = {}

    def run(sanitizers, *arguments):
        if sanitizers not in built:
            path = built[sanitizers] = folder / f"core_test-{len(built)}"
            flags = ["-O1", "-g", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"] if sanitizers else ["-O2"]
            command = [compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", *flags, "-pthread", SOURCE, "-o", path]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode and re.search("sanitize|asan|tsan|ubsan", done.stderr):
                pytest.skip(f"this compiler has no {sanitizers} sanitizer: {done.stderr.splitlines()[-1]}")
            assert done.returncode == 0, done.stderr
        done = subprocess.run([built[sanitizers], *map(str, arguments)], capture_output=True, text=True, timeout=300)
        if "unexpected memory mapping" in done.stderr:  # a kernel that spreads addresses wider than TSan knows
            pytest.skip(done.stderr.splitlines()[0])
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


def test_sequences_of_calls_equal_the_reference(core_test):
    assert "150 of 120 appends" in core_test("address,undefined", "sequences", 150)


def test_threads_do_not_race(core_test):
    out = core_test("thread", "threads", 3)
    assert int(re.search(r"(\d+) transitions", out)[1]) > 1000


def test_sums_do_not_drift(core_test):
    """After a million updates; `scripts/long-and-large` makes a hundred millions."""
    out = core_test("", "drift", 1_000_000)
    ours, theirs = (float(number) for number in re.findall(r"\d\.\de[-+]\d+", out))
    assert ours < 1e-14 < 1e-7 < theirs


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux how much memory a process has")
def test_memory_stays_flat(core_test):
    core_test("", "long", 200_000)

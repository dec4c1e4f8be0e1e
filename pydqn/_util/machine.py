"""What the processor can do, how many of its cores are ours, and how updates fare beside other programs.

Does not import torch, so that what has to be set before can be.
"""

from __future__ import annotations

import math
import os
import platform
from collections import deque
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from pathlib import Path
from statistics import median

# Instruction sets that decide how fast a run is, as /proc/cpuinfo writes them on x86 and on ARM.
_RELEVANT = (
    *("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16"),
    *("asimd", "sve", "sve2", "i8mm", "bf16"),
)
# With any of these the user has said how OpenMP's threads wait.
_WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME", "KMP_LIBRARY")


def processor() -> str:
    """Return the processor's model, as its maker calls it where the system knows that."""
    model = _cpuinfo().get("model name", "") or platform.processor() or platform.machine()
    return " ".join(model.split())


def instruction_sets() -> tuple[str, ...]:
    """Return those of the processor that decide how fast a run is; none where the system does not list them."""
    info = _cpuinfo()
    listed = {*info.get("flags", "").split(), *info.get("Features", "").split()}
    return tuple(name for name in _RELEVANT if name in listed)


def usable_cores() -> int:
    """Return how many cores this process may use: those it is bound to, and no more than its container's CPU quota."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(bound, cpu_quota())))


def cpu_quota(root: Path = Path("/")) -> float:
    """Return the cores' worth of time that control groups grant this process; infinity where there is no limit.

    Containers see the host's cores, but are stopped when they use more time than their quota. Every group above ours
    counts as well. `root` is where the system's files are.
    """
    quota = math.inf
    with suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            if not controllers:  # version 2
                mount, read = root / "sys/fs/cgroup", _quota_of_version_2
            elif "cpu" in controllers.split(","):
                mount, read = root / "sys/fs/cgroup/cpu", _quota_of_version_1
            else:
                continue
            path = Path(name.lstrip("/"))
            # A container may see only its own group, mounted as the root.
            for group in (path, *path.parents):
                quota = min(quota, read(mount / group))
    return quota


def _quota_of_version_2(group: Path) -> float:
    with suppress(OSError, ValueError):
        most, period = (group / "cpu.max").read_text().split()
        return int(most) / int(period)  # "max" is no number
    return math.inf


def _quota_of_version_1(group: Path) -> float:
    with suppress(OSError, ValueError):
        most = int((group / "cpu.cfs_quota_us").read_text())
        if most > 0:
            return most / int((group / "cpu.cfs_period_us").read_text())
    return math.inf


def bound_spinning(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Let OpenMP's threads sleep soon when they wait for each other, unless the user has said how they wait.

    By default they spin for milliseconds at every barrier. Beside another busy process the thread that they wait for
    may not even be running, so they take the core that it needs: updates become several times as slow. Only what is set
    before torch is imported counts, and child processes inherit it.

    Returns:
        Whether it was set.
    """
    if any(name in environment for name in _WAITING):
        return False
    environment["GOMP_SPINCOUNT"] = "1000"  # GCC's libgomp, in PyTorch's wheels for Linux
    environment["KMP_BLOCKTIME"] = "1"  # LLVM's libomp and Intel's libiomp5; in milliseconds, 200 by default
    return True


def default_torch_threads(convolutions: bool, cores: int, environment: Mapping[str, str] = os.environ) -> int:
    """Return how many threads a learner's updates should use on a CPU; 0 to leave PyTorch's setting alone.

    A batch of 32 images feeds about four threads, and from three cores on one is left to the emulators. Without
    convolutions an update is over before a second thread has begun. The number decides the order in which sums are
    formed, so it follows from the machine and the network alone, never from a measurement.
    """
    if "OMP_NUM_THREADS" in environment or "MKL_NUM_THREADS" in environment:
        return 0
    if not convolutions:
        return 1
    return cores if cores <= 2 else min(4, cores - 1)


class Pace:
    """Notices once when updates take many times as long as they can: something else uses the cores.

    What they can is the shortest so far: most updates of a disturbed run wait, but some do not.
    """

    _WARM_UP = 20  # updates: the first ones compile kernels
    _WINDOW = 51  # updates whose median counts
    _FACTOR = 4.0  # what beside one busy process two threads that do not spin, or one thread, stay below

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._seen = 0
        self._shortest = math.inf
        self._recent: deque[float] | None = deque(maxlen=self._WINDOW)

    def add(self, seconds: float) -> str | None:
        """Take the duration of an update; returns what to tell the user, the first time that there is something."""
        self._seen += 1
        if self._recent is None or self._seen <= self._WARM_UP:
            return None
        self._recent.append(seconds)
        self._shortest = min(self._shortest, seconds)
        if self._seen % self._WINDOW or len(self._recent) < self._WINDOW:
            return None
        usual = median(self._recent)
        if usual < self._FACTOR * self._shortest:
            return None
        self._recent = None
        told = (
            f"updates take {1000 * usual:.3g} ms, {usual / self._shortest:.0f} times as long as the shortest: other "
            "programs use the cores"
        )
        if self._threads > 1:
            told += (
                ". What helps: torch_threads=1 (--torch-threads 1), and in Python GOMP_SPINCOUNT=1000 in the "
                "environment before torch is imported"
            )
        return told


def _cpuinfo() -> dict[str, str]:
    """Return what the system says of the first core."""
    found: dict[str, str] = {}
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, colon, value = line.partition(":")
            if colon:
                found.setdefault(name.strip(), value.strip())
    return found

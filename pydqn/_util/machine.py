"""The processor, the cores that this process may use, threads, and slow updates beside other programs.

Does not import torch, so that settings can be made before that is imported.
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

# Instruction sets that matter for a run's speed, as /proc/cpuinfo writes them on x86 and on ARM.
_RELEVANT = (
    *("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16"),
    *("asimd", "sve", "sve2", "i8mm", "bf16"),
)
# Environment variables by which users choose how OpenMP's threads wait.
_WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME", "KMP_LIBRARY")


def processor() -> str:
    """Return the processor's model, by its full name if the system knows it."""
    model = _cpuinfo().get("model name", "") or platform.processor() or platform.machine()
    return " ".join(model.split())


def instruction_sets() -> tuple[str, ...]:
    """Return the processor's instruction sets that matter for a run's speed; none if the system does not list them."""
    info = _cpuinfo()
    listed = {*info.get("flags", "").split(), *info.get("Features", "").split()}
    return tuple(name for name in _RELEVANT if name in listed)


def usable_cores() -> int:
    """Return how many cores this process may use: those it is bound to, but at most its container's CPU quota."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(bound, cpu_quota())))


def cpu_quota(root: Path = Path("/")) -> float:
    """Return the CPU time per time that control groups grant this process, in cores; infinity if there is no limit.

    Containers see the host's cores, but are throttled when they use more time than their quota. The quotas of all
    parent groups count as well. `root` is the folder with the system's files.
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
            # A container may see only its own group, mounted as the root: so the parents include the root.
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
    """Make OpenMP's threads sleep soon when they wait for each other, unless the user has chosen how they wait.

    By default they spin for milliseconds at every barrier. Beside another busy process, they may take the core that the
    thread they wait for needs, and updates become several times slower. The setting takes effect only before torch is
    imported, and child processes inherit it.

    Returns:
        Whether it was set.
    """
    if any(name in environment for name in _WAITING):
        return False
    environment["GOMP_SPINCOUNT"] = "1000"  # GCC's libgomp, in PyTorch's wheels for Linux
    environment["KMP_BLOCKTIME"] = "1"  # LLVM's libomp and Intel's libiomp5; in milliseconds, 200 by default
    return True


def default_torch_threads(convolutions: bool, cores: int, environment: Mapping[str, str] = os.environ) -> int:
    """Return how many threads a learner's updates should use on a CPU; 0 to keep PyTorch's setting.

    A batch of 32 images occupies about four threads, and of three or more cores one is left to the emulators. Without
    convolutions, an update is too short for a second thread. The number of threads decides the order in which sums are
    formed, so it depends on the machine and the network alone, never on a measurement.
    """
    if "OMP_NUM_THREADS" in environment or "MKL_NUM_THREADS" in environment:
        return 0
    if not convolutions:
        return 1
    return cores if cores <= 2 else min(4, cores - 1)


class Pace:
    """Detects updates that are many times slower than the fastest one so far: other programs use the cores.

    In a disturbed run most updates wait, but some do not, so the fastest one is a fair standard.
    """

    _WARM_UP = 20  # updates to skip: the first ones compile kernels
    _WINDOW = 51  # updates whose median is compared
    _FACTOR = 4.0  # beside one busy process, one thread, or two that do not spin, stay below it

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._count = 0
        self._shortest = math.inf
        self._recent: deque[float] | None = deque(maxlen=self._WINDOW)

    def add(self, seconds: float) -> str | None:
        """Add the duration of an update; return a message for the user the first time that updates are slow."""
        self._count += 1
        if self._recent is None or self._count <= self._WARM_UP:
            return None
        self._recent.append(seconds)
        self._shortest = min(self._shortest, seconds)
        if self._count % self._WINDOW or len(self._recent) < self._WINDOW:
            return None
        usual = median(self._recent)
        if usual < self._FACTOR * self._shortest:
            return None
        self._recent = None
        message = (
            f"updates take {1000 * usual:.3g} ms, {usual / self._shortest:.0f} times as long as the shortest: other "
            "programs use the cores"
        )
        if self._threads > 1:
            message += (
                ". What helps: torch_threads=1 (--torch-threads 1), and in Python GOMP_SPINCOUNT=1000 in the "
                "environment before torch is imported"
            )
        return message


def _cpuinfo() -> dict[str, str]:
    """Return the entries of /proc/cpuinfo for the first core."""
    found: dict[str, str] = {}
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, colon, value = line.partition(":")
            if colon:
                found.setdefault(name.strip(), value.strip())
    return found

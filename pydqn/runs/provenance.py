"""Versions and machine that a result depends on, and the CPU time and memory that a process uses."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from importlib import metadata

from pydqn._util.machine import instruction_sets, processor, usable_cores


class Process:
    """CPU time and memory of this process."""

    def __init__(self) -> None:
        import psutil

        self._process = psutil.Process()
        self._process.cpu_percent()  # starts the first interval

    def read(self) -> dict[str, float]:
        """Return cpu_percent since the last call, memory_mb and memory_percent."""
        with self._process.oneshot():
            return {
                "cpu_percent": self._process.cpu_percent(),
                "memory_mb": self._process.memory_info().rss / 2**20,
                "memory_percent": self._process.memory_percent(),
            }


def provenance(env_package: str | None = None) -> dict[str, str]:
    """Return what a result depends on besides its config: versions, and the processor and its instruction sets.

    Args:
        env_package: the package that the environment's class is in. It is left out if it has no version.
    """
    packages = ("pydqn", "torch", "numpy", "numba", "gymnasium", "ale-py")
    versions = {name: metadata.version(name) for name in packages}
    if env_package is not None:
        with suppress(metadata.PackageNotFoundError, ValueError):
            versions.setdefault(env_package, metadata.version(env_package))
    return {
        **versions,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cores": f"{usable_cores()} usable of {os.cpu_count()}",
        "instruction_sets": " ".join(instruction_sets()),
    }

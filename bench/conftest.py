"""What every benchmark file says about itself."""

from __future__ import annotations

from typing import Any

from pydqn.runs.provenance import provenance


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """Add the versions that a figure depends on; leave out what names the machine."""
    machine_info.update(provenance())
    for name in ("node", "release"):
        machine_info.pop(name, None)

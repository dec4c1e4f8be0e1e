"""Writing Matplotlib figures to files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydqn._util.files import atomic_write

_SUFFIXES = (".png", ".svg", ".pdf")


def require_suffix(output: str | os.PathLike[str]) -> None:
    """Raise a ValueError unless `output` ends in .png, .svg or .pdf."""
    if Path(output).suffix not in _SUFFIXES:
        raise ValueError(f"output: expected a name that ends in {', '.join(_SUFFIXES)}, got {os.fspath(output)!r}")


def write_figure(figure: Any, output: str | os.PathLike[str]) -> None:
    """Write a figure in the format of the file's ending, atomically."""
    with atomic_write(output) as file:
        figure.savefig(file, dpi=150, format=Path(output).suffix[1:])

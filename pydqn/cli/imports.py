"""`--import`: modules with environments of the user's own."""

from __future__ import annotations

import argparse
import os
import sys


def import_modules(arguments: argparse.Namespace) -> None:
    """Import the modules that the user has named, by `--import` or before the colon of `--env-id MODULE:ID`.

    Afterwards `arguments.imports` holds all of them, and `arguments.env_id` no colon.

    Raises:
        ValueError: one of them cannot be imported.
    """
    module, colon, env_id = getattr(arguments, "env_id", "").rpartition(":")
    if colon:
        arguments.imports, arguments.env_id = [*arguments.imports, module], env_id
    imports = getattr(arguments, "imports", [])
    if not imports:
        return
    from pydqn.envs.ids import import_environments

    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, "")  # the current folder, as with `python -m`
    for name in imports:
        import_environments(name)


def repeated(arguments: argparse.Namespace) -> list[str]:
    """Return the options with which a command that is printed imports the same modules."""
    return [word for name in arguments.imports for word in ("--import", name)]

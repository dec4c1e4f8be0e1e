"""Exit codes, and the errors that the user can do something about."""

from __future__ import annotations

import sys

RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h: everything is saved, and the same command with --resume continues
INTERRUPTED = 130  # what shells report for a program that SIGINT ended
BROKEN_PIPE = 141  # the same for SIGPIPE
USER_ERRORS = (ValueError, RuntimeError, OSError, MemoryError)  # any other exception is a bug of pydqn


def print_error(error: Exception) -> int:
    """Print an error as one line; returns the exit code."""
    print(f"pydqn: error: {error}", file=sys.stderr)
    return 2

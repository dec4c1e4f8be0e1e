"""Ctrl-C and SIGTERM (sent by schedulers and spot machines) as a request to stop and save."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Signals:
    """A signal handler.

    The first signal calls `stop`; a second one, or one before `stop` is set, raises KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.received: int | None = None  # the latest signal
        self.stop: Callable[[], None] | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        again, self.received = self.received is not None, number
        if again or self.stop is None:
            raise KeyboardInterrupt
        self.stop()


@contextmanager
def deferred() -> Iterator[Signals]:
    """Handle SIGINT and SIGTERM until the block ends, unless they are ignored. Does nothing outside the main thread."""
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # None is a handler that was set outside Python, and could not be restored.
    ours = {number: handler for number, handler in before.items() if handler not in (None, signal.SIG_IGN)}
    for number in ours:
        signal.signal(number, signals)
    try:
        yield signals
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)

"""Ctrl-C and SIGTERM, which schedulers and spot machines send, as a request to end in good order."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Signals:
    """What has come so far.

    The first signal calls `stop`; one that comes before there is anything to stop, or while that takes its time,
    raises KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.came: int | None = None
        self.stop: Callable[[], None] | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Take a signal."""
        again, self.came = self.came is not None, number
        if again or self.stop is None:
            raise KeyboardInterrupt
        self.stop()


@contextmanager
def deferred() -> Iterator[Signals]:
    """Take SIGINT and SIGTERM until the block ends, unless they are ignored.

    Only the main thread can; in others nothing changes.
    """
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # (None: one that was set outside Python, and could not be put back.)
    ours = {number: handler for number, handler in before.items() if handler not in (None, signal.SIG_IGN)}
    for number in ours:
        signal.signal(number, signals)
    try:
        yield signals
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)

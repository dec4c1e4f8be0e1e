"""Interleaved timing, and the table of ratios."""

from __future__ import annotations

import multiprocessing
import time

import numpy as np

ROWS = []


def check_stages(parser, names, known):
    """Exit with the parser's error if one of the names is unknown."""
    unknown = sorted(set(names) - set(known))
    if unknown:
        parser.error(f"stages: expected some of {', '.join(known)}, got {unknown[0]!r}")


def head():
    print(f"{'stage':38s} {'pydqn':>11s} {'beside':>46s} {'ratio':>6s} {'target':>8s}")


def row(stage, ours, other, ratio, target=None, note=""):
    """Print and keep one line. `target` is ("<=" or ">=", number), or None where there is none."""
    held = None if target is None else bool(ratio <= target[1] if target[0] == "<=" else ratio >= target[1])
    ROWS.append(
        {"stage": stage, "ours": ours, "other": other, "ratio": ratio, "target": target, "held": held, "note": note}
    )
    aim = "" if target is None else f"{target[0]} {target[1]}"
    verdict = {None: "", True: "held", False: "missed"}[held]
    print(f"{stage:38s} {ours:>11s} {other:>46s} {ratio:6.2f} {aim:>8s} {verdict:6s} {note}".rstrip(), flush=True)


def missing(name, error):
    print(f"  ({name} is left out: {type(error).__name__}: {str(error).splitlines()[0][:90]})", flush=True)


def in_turns(functions, rounds, calls):
    """Time functions in turns; returns the median seconds per call of each."""
    times = {name: [] for name in functions}
    for function in functions.values():
        for _ in range(3):
            function()
    for _ in range(rounds):
        for name, function in functions.items():
            for _ in range(calls):
                started = time.perf_counter()
                function()
                times[name].append(time.perf_counter() - started)
    return {name: float(np.median(spent)) for name, spent in times.items()}


def rates_in_turns(players, rounds):
    """Call functions that return a rate in turns; returns the median of each."""
    rates = {name: [] for name in players}
    for _ in range(rounds):
        for name, play in players.items():
            rates[name].append(play())
    return {name: float(np.median(values)) for name, values in rates.items()}


class Elsewhere:
    """A function in its own process, so that process-wide settings (of the allocator, for example) do not interfere.

    `make(*arguments)` is called there and returns the function; it must be importable.
    """

    def __init__(self, make, *arguments):
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, make, arguments), daemon=True)
        self._process.start()
        problem = self._pipe.recv()
        if problem is not None:
            raise RuntimeError(problem)

    def __call__(self):
        self._pipe.send(True)
        return self._pipe.recv()

    def close(self):
        self._pipe.send(False)
        self._process.join()


def _serve(pipe, make, arguments):
    try:
        function = make(*arguments)
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")
        return
    pipe.send(None)
    while pipe.recv():
        pipe.send(function())


def us(seconds):
    return f"{seconds * 1e6:.1f} us"


def ms(seconds):
    return f"{seconds * 1e3:.2f} ms"

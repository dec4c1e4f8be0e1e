"""The replay buffer."""

from __future__ import annotations

import itertools

import numpy as np
from other_libraries import BATCH, BUFFERS, PlainCopy, RingCopy
from timing import Elsewhere, in_turns, missing, row, us


def make(name, size, most_bytes, **options):
    """Return a full replay buffer of `size` transitions, or of as many as fit into `most_bytes`, and their number."""
    kind, each, _ = BUFFERS[name]
    fits = int(min(size, most_bytes // each))
    buffer = kind(fits, **options)
    for i in range(fits + 1):
        buffer.add(i)
    return buffer, fits


def append(quick):
    """Append one transition, in each library's own form."""
    adders = {}
    for name in BUFFERS:
        try:
            buffer, _ = make(name, 2_000 if quick else 20_000, 1.2e9)
        except Exception as error:
            missing(name, error)
            continue
        count = itertools.count()
        adders[name] = lambda buffer=buffer, count=count: buffer.add(next(count))
    times = in_turns(adders, 20 if quick else 60, 50)
    mine = times.pop("pydqn")
    best = min(times, key=times.get, default=None)
    for name, value in times.items():
        row("append, one frame", us(mine), f"{name}: {us(value)}", mine / value, ("<=", 0.25) if name == best else None)


def sampler(name, size, most_bytes):
    """Return a function that samples 20 times and returns the median seconds and the size of the ring."""
    buffer, fits = make(name, size, most_bytes)

    def some():
        return in_turns({"": buffer.sample}, 1, 20)[""], fits

    return some


def ring_copy(size):
    copy = RingCopy(make("pydqn", size, 8e9)[0].replay)
    return lambda: (in_turns({"": copy.sample}, 1, 20)[""], size)


def plain_copy(size, huge_pages):
    copy = PlainCopy(size, huge_pages)
    return lambda: (in_turns({"": copy.sample}, 1, 20)[""], size)


def medians_in_turns(players, rounds):
    times = {name: [] for name in players}
    for _ in range(rounds):
        for name, play in players.items():
            times[name].append(play()[0])
    return {name: float(np.median(spent)) for name, spent in times.items()}


def sample(quick):
    """Sample from a ring of a million frames, or of as many as fit into 8 GB, which is easier.

    Each ring has a process of its own, with at most two at a time, as they take gigabytes.
    """
    size, rounds = (50_000, 20) if quick else (1_000_000, 60)
    stage = f"sample({BATCH}), ring of {size:,}"
    ours = Elsewhere(sampler, "pydqn", size, 8e9)
    found = {}
    for name in ("memcpy from such a ring", *(name for name in BUFFERS if name != "pydqn")):
        try:
            other = Elsewhere(sampler, name, size, 8e9) if name in BUFFERS else Elsewhere(ring_copy, size)
        except Exception as error:
            missing(name, error)
            continue
        fits = other()[1]
        found[name] = (medians_in_turns({"pydqn": ours, name: other}, rounds), fits)
        other.close()
    ours.close()
    whole = {name: times[name] for name, (times, fits) in found.items() if fits == size and name in BUFFERS}
    best = min(whole, key=whole.get, default=None)
    for name, (times, fits) in found.items():
        mine, value = times["pydqn"], times[name]
        note = "" if fits == size else f"(theirs: {fits:,})"
        target = ("<=", 0.5) if name == best else None if name in BUFFERS else ("<=", 1.5)
        row(stage, us(mine), f"{name}: {us(value)}", mine / value, target, note)
    pages = {"huge": Elsewhere(plain_copy, size, True), "small": Elsewhere(plain_copy, size, False)}
    times = medians_in_turns(pages, rounds)
    for page in pages.values():
        page.close()
    huge, small = times["huge"], times["small"]
    row("memcpy from huge pages", us(huge), f"from 4 KiB pages: {us(small)}", huge / small)


def prioritized(quick):
    """Sample and update the priorities."""
    size = 20_000 if quick else 100_000
    functions = {"uniform": make("pydqn", size, 6e9)[0].sample}
    for name, (_, _, has_priorities) in BUFFERS.items():
        if has_priorities:
            try:
                functions[name] = make(name, size, 6e9, prioritized=True)[0].sample_and_update
            except Exception as error:
                missing(name, error)
    times = in_turns(functions, 20 if quick else 60, 20)
    mine, uniform = times.pop("pydqn"), times.pop("uniform")
    stage = f"prioritized, ring of {size:,}"
    row(stage, us(mine), f"pydqn, uniform: {us(uniform)}", mine / uniform, ("<=", 1.3))
    for name, value in times.items():
        row(stage, us(mine), f"{name}: {us(value)}", mine / value, ("<=", 1.0))

"""The replay memory."""

from __future__ import annotations

import itertools

from peers import BATCH, MEMORIES, PlainCopy, RingCopy
from timing import in_turns, missing, row, us


def make(name, size, most_bytes, **options):
    """Return a full memory of `size` transitions, or of as many as fit into `most_bytes`, and how many they are."""
    kind, each, _ = MEMORIES[name]
    fits = int(min(size, most_bytes // each))
    memory = kind(fits, **options)
    for i in range(fits + 1):
        memory.add(i)
    return memory, fits


def append(quick):
    """One transition, as each takes it."""
    adders = {}
    for name in MEMORIES:
        try:
            memory, _ = make(name, 2_000 if quick else 20_000, 1.2e9)
        except Exception as error:
            missing(name, error)
            continue
        count = itertools.count()
        adders[name] = lambda memory=memory, count=count: memory.add(next(count))
    times = in_turns(adders, 20 if quick else 60, 50)
    mine = times.pop("pydqn")
    best = min(times, key=times.get, default=None)
    for name, value in times.items():
        row("append, one frame", us(mine), f"{name}: {us(value)}", mine / value, ("<=", 0.25) if name == best else None)


def sample(quick):
    """From a ring of a million frames; who needs more than 8 GB for so many gets a smaller one, which is easier."""
    size, rounds = (50_000, 20) if quick else (1_000_000, 60)
    ours, _ = make("pydqn", size, 8e9)
    stage = f"sample({BATCH}), ring of {size:,}"
    times = in_turns({"pydqn": ours.sample, "copy": RingCopy(ours.replay).sample}, rounds, 20)
    mine, value = times["pydqn"], times["copy"]
    row(stage, us(mine), f"memcpy from the same ring: {us(value)}", mine / value, ("<=", 1.5))
    found = {}
    for name in MEMORIES:
        if name == "pydqn":
            continue
        try:
            memory, fits = make(name, size, 8e9)
        except Exception as error:
            missing(name, error)
            continue
        found[name] = (in_turns({"pydqn": ours.sample, name: memory.sample}, rounds, 20), fits)
        del memory
    whole = {name: times[name] for name, (times, fits) in found.items() if fits == size}
    best = min(whole, key=whole.get, default=None)
    for name, (times, fits) in found.items():
        mine, value = times["pydqn"], times[name]
        note = "" if fits == size else f"(theirs: {fits:,})"
        row(stage, us(mine), f"{name}: {us(value)}", mine / value, ("<=", 0.5) if name == best else None, note)
    del ours
    copies = {"huge": PlainCopy(size // 4, True).sample, "small": PlainCopy(size // 4, False).sample}
    times = in_turns(copies, rounds, 20)
    huge, small = times["huge"], times["small"]
    row("memcpy from huge pages", us(huge), f"from 4 KiB pages: {us(small)}", huge / small)


def prioritized(quick):
    """Sample and update the priorities."""
    size = 20_000 if quick else 100_000
    functions = {"uniform": make("pydqn", size, 6e9)[0].sample}
    for name, (_, _, has_priorities) in MEMORIES.items():
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

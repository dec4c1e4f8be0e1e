"""How long it takes to save a million frames, the first time and again, and to write them uncompressed.

    python bench/saving.py [-o FILE] [--frames N] [--env-id ID]

The frames are those of random play, repeated. Every write is flushed to the disk.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

from pydqn import FrameReplay, preset
from pydqn._util.files import write_json
from pydqn.envs.make import make_envs
from pydqn.runs.provenance import provenance

NUM_ENVS, PLAYED = 8, 2_500  # steps that are played


def played(env_id):
    """Return (PLAYED, NUM_ENVS, 84, 84) frames."""
    envs = make_envs(preset("nature", env_id=env_id), NUM_ENVS, 0)
    frames, random = np.zeros((PLAYED, NUM_ENVS, *envs.frame_shape), np.uint8), np.random.default_rng(0)
    envs.reset(frames[0])
    for slot in frames[1:]:
        envs.send(random.integers(0, envs.num_actions, NUM_ENVS))
        envs.recv(slot)
    envs.close()
    return frames


def append(replay, frames, start, count):
    nothing, off = np.zeros(NUM_ENVS, np.int64), np.zeros(NUM_ENVS, bool)
    for step in range(start, start + count // NUM_ENVS):
        first = step % PLAYED == 0
        replay.append(frames[step % PLAYED], nothing, nothing, off, off, ~off if first else off)


def timed(function, *arguments):
    started = time.perf_counter()
    result = function(*arguments)
    return result, time.perf_counter() - started


def write_uncompressed(path, frames, count):
    """Write so many frames uncompressed."""
    with open(path, "wb") as file:
        for step in range(count // NUM_ENVS):
            file.write(frames[step % PLAYED].data)
        file.flush()
        os.fsync(file.fileno())


def resident():
    return psutil.Process().memory_info().rss / 1e6


def note(most, share):
    most.append(resident())


def megabytes(path):
    return sum(file.stat().st_size for file in path.iterdir()) / 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", help="also write the figures, versions and machine, .json")
    parser.add_argument("--frames", type=int, default=1_000_000)
    parser.add_argument("--env-id", nargs="+", default=["pong", "breakout", "seaquest"])
    arguments = parser.parse_args()
    count, more, rows = arguments.frames, arguments.frames // 20, []
    for env_id in arguments.env_id:
        frames = played(env_id)
        replay = FrameReplay(count, num_envs=NUM_ENVS, prioritized=True)
        append(replay, frames, 0, count)
        most = []
        with tempfile.TemporaryDirectory(dir=".") as scratch:
            folder = Path(scratch)
            before = resident()
            _, first = timed(replay.save, folder / "one", functools.partial(note, most))
            _, raw = timed(write_uncompressed, folder / "raw", frames, count)
            size = megabytes(folder / "one")
            append(replay, frames, count // NUM_ENVS, more)
            _, again = timed(replay.save, folder / "two")
            linked = {file.name for file in (folder / "one").iterdir()} & {f.name for f in (folder / "two").iterdir()}
            loaded, load = timed(FrameReplay.load, folder / "two")
            for ours, theirs in zip(replay.sample(256), loaded.sample(256), strict=True):
                np.testing.assert_array_equal(ours, theirs)
        row = {
            "env_id": env_id,
            "frames": count,
            "plain_seconds": raw,
            "plain_megabytes": count * 84 * 84 / 1e6,
            "first_seconds": first,
            "megabytes": size,
            "extra_memory_megabytes": max(most) - before,
            "frames_since": more,
            "again_seconds": again,
            "chunks_linked": len(linked),
            "load_seconds": load,
        }
        rows.append(row)
        texts = (f"{value:,.2f}" if isinstance(value, float) else str(value) for value in row.values())
        print(", ".join(f"{name} {text}" for name, text in zip(row, texts, strict=True)), flush=True)
        del replay, loaded
    if arguments.output:
        about = {"date": datetime.date.today().isoformat(), **provenance()}
        write_json(arguments.output, {"about": about, "rows": rows})


if __name__ == "__main__":
    main()

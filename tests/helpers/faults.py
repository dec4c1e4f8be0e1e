"""Kills a process at file operations, or lets them fail, one after the other. Needs faults.c; see test_faults.py.

    LD_PRELOAD=faults.so python faults.py faults.so ACTION STRIDE

ACTION is weights, replay, torchrl, checkpoints, training or resuming. Forks a child for every STRIDEth operation of an
action. The child is killed there, or halfway through the next write; or from there on the disk is full, or read-only.
Ends with an error if anything that was saved before is lost, or anything is half-written.
"""

from __future__ import annotations

import csv
import ctypes
import os
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path

import numpy as np
import torch

from pydqn import FrameReplay, preset
from pydqn._util.weights import load_weights, save_weights
from pydqn.adapters._torchrl.streams import EpisodeStreams
from pydqn.replay.saving import verify_saved
from pydqn.replay.transitions import TransitionReplay
from pydqn.runs.checkpoint import checkpoints, latest_checkpoint, load_checkpoint, save_checkpoint
from pydqn.training.loop import Run
from tests.helpers.reference import fill
from tests.helpers.runs import CLOCK

KINDS = {"kill": 1, "kill halfway": 2, "full disk": 3, "read only": 4}
UNHARMED, REFUSED, UNNAMED, UNFLUSHED = 0, 3, 4, 5


class Replay:
    """A replay buffer that is saved to the same folder again."""

    def __init__(self, root: Path) -> None:
        self.path = root / "replay"
        self.replay = fill(FrameReplay(40, (5,), num_envs=2, stack=2, dtype="float32", prioritized=True), 25)
        self.replay._saver.length = 8

    def prepare(self) -> None:
        self.replay.save(self.path)
        self.known = dict(self.replay._saver.known)
        self.before = content(self.path)
        fill(self.replay, 10)
        self.replay.save(self.path.with_name("next"))
        self.after = content(self.path.with_name("next"))
        shutil.rmtree(self.path.with_name("next"))

    def act(self) -> None:
        self.replay.save(self.path)

    def check(self) -> None:
        verify_saved(self.path)
        assert content(self.path) in (self.before, self.after)

    def check_again(self) -> None:
        self.act()
        assert content(self.path) == self.after
        assert len(list(self.path.iterdir())) == 2 + 4  # index, priorities, and chunks of the last 20 time steps


class TorchRL:
    """The streams of a TorchRL buffer that are saved to the same folder again."""

    def __init__(self, root: Path) -> None:
        self.path, self.steps = root / "streams", 0
        self.streams = EpisodeStreams(TransitionReplay(40, (5,), "float32", num_envs=2, prioritized=True))
        self.replay = self.streams.transitions.frame_replay
        self.replay._saver.length = 8
        self.feed(25)

    def feed(self, count: int) -> None:
        for step in range(self.steps, self.steps + count):
            seen, no = np.float32([[step] * 5, [step + 1000] * 5]), np.zeros(2, bool)
            first, number = np.ones(2, bool), torch.full((2,), step)
            self.streams.extend(seen, seen + 1, no, no, no, first, None, {("number",): number})
        self.steps += count

    def prepare(self) -> None:
        self.streams.save(self.path, {})
        self.known = dict(self.replay._saver.known)
        self.before = self.content(self.path)
        self.feed(10)
        self.streams.save(self.path.with_name("next"), {})
        self.after = self.content(self.path.with_name("next"))
        shutil.rmtree(self.path.with_name("next"))

    def content(self, path: Path) -> bytes:
        streams, _ = EpisodeStreams.load(path, 40, num_envs=2, prioritized=True)
        held = streams.transitions.frame_replay.valid_indices()
        numbers = streams.columns[("number",)].numpy()[streams.slots_at(held)]
        assert len(held) == 40
        assert ((streams.transitions.gather(held).obs[:, 0] - numbers) % 1000 == 0).all()
        return numbers.tobytes() + streams.transitions.sample(32).index.tobytes()

    def act(self) -> None:
        self.streams.save(self.path, {})

    def check(self) -> None:
        assert self.content(self.path) in (self.before, self.after)

    def check_that_nothing_is_left(self) -> None:
        assert len(list(self.path.iterdir())) == 3  # the manifest, frames, columns

    def check_again(self) -> None:
        self.act()
        assert self.content(self.path) == self.after
        self.check_that_nothing_is_left()


class Checkpoints:
    """A third checkpoint, with a replay buffer, after which the first one is removed."""

    def __init__(self, root: Path) -> None:
        self.run = root / "run"
        self.replay = fill(FrameReplay(40, (5,), num_envs=2, stack=2, dtype="float32"), 25)
        self.replay._saver.length = 8
        self.contents: dict[int, bytes] = {}

    def save(self, steps: int) -> None:
        save_checkpoint(self.run, steps, {"w": torch.full((50,), float(steps))}, {"mark": steps}, self.replay.save)

    def prepare(self) -> None:
        for steps in (100, 200, 300):
            self.save(steps)
            self.contents[steps] = content(self.run / "checkpoints" / f"step-{steps:012d}" / "replay")
            fill(self.replay, 5)
        shutil.rmtree(self.run)
        self.replay = fill(FrameReplay(40, (5,), num_envs=2, stack=2, dtype="float32"), 25)
        self.replay._saver.length = 8
        for steps in (100, 200):
            self.save(steps)
            fill(self.replay, 5)
        self.known = dict(self.replay._saver.known)

    def act(self) -> None:
        self.save(300)

    def check(self) -> None:
        kept = checkpoints(self.run)
        assert 2 <= len(kept) <= 3
        for path in kept:
            self.whole(path)
        assert int(kept[-1].name[5:]) in (200, 300)

    def check_that_nothing_is_left(self) -> None:
        """A checkpoint that could not be saved leaves no files, which would fill the disk further."""
        assert sorted((self.run / "checkpoints").iterdir()) == checkpoints(self.run)

    def whole(self, path: Path) -> None:
        checkpoint, steps = load_checkpoint(path), int(path.name[5:])
        assert checkpoint.state == {"mark": steps}
        assert (checkpoint.tensors["w"] == steps).all()
        assert content(checkpoint.replay) == self.contents[steps]

    def check_again(self) -> None:
        self.act()
        assert [int(path.name[5:]) for path in checkpoints(self.run)] == [200, 300]
        for path in checkpoints(self.run):
            self.whole(path)
        assert len(list((self.run / "checkpoints").iterdir())) == 2
        assert not list(self.run.rglob("*.part"))


class Weights:
    """Weights that replace others."""

    def __init__(self, root: Path) -> None:
        self.path = root / "best.safetensors"

    def prepare(self) -> None:
        save_weights(self.path, {"w": torch.zeros(1000)}, {"steps": 0})

    def act(self) -> None:
        save_weights(self.path, {"w": torch.ones(1000)}, {"steps": 1})

    def check(self) -> None:
        weights, metadata = load_weights(self.path)
        assert (weights["w"] == metadata["steps"]).all()

    def check_again(self) -> None:
        self.act()
        assert load_weights(self.path)[1] == {"steps": 1}


class Training:
    """A whole run; after a fault it is resumed, and becomes the same run as without."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "run"
        self.config = preset(
            "cartpole",
            total_steps=200,
            stop_successes=0,
            checkpoint_every_steps=60,
            log_every_steps=25,
            log_every_episodes=0,
            batch_size=8,
            hidden_units=(8,),
            prioritized=True,
            device="cpu",
            torch_threads=1,
        )

    def prepare(self) -> None:
        self.act()
        self.uninterrupted = result(self.folder)
        shutil.rmtree(self.folder)

    def act(self) -> None:
        resume = latest_checkpoint(self.folder) is not None
        if not resume:
            shutil.rmtree(self.folder, ignore_errors=True)
        with Run(self.config, self.folder, resume=resume) as run:
            for _ in run.reports():
                pass

    def check(self) -> None:
        for path in checkpoints(self.folder):
            verify_saved(load_checkpoint(path).replay)

    def check_again(self) -> None:
        pid = os.fork()  # training starts threads, after which this process could not fork
        if not pid:
            self.act()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        assert result(self.folder) == self.uninterrupted


class Resuming(Training):
    """A finished run that is resumed from an older checkpoint; after a kill it is resumed, and becomes the same run."""

    kinds = ("kill",)

    def prepare(self) -> None:
        pid = os.fork()  # as in `Training.check_again`
        if not pid:
            Training.act(self)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        self.uninterrupted = result(self.folder)
        older, latest = checkpoints(self.folder)
        assert int(older.name[5:]) < int(latest.name[5:]) == 200

    def act(self) -> None:
        Run(self.config, self.folder, resume=checkpoints(self.folder)[0])

    def check_again(self) -> None:
        pid = os.fork()
        if not pid:
            with Run(self.config, self.folder, resume=True) as run:
                list(run.reports())
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        assert result(self.folder) == self.uninterrupted


def content(path: Path) -> bytes:
    replay = FrameReplay.load(path)
    return b"".join(column.tobytes() for column in replay.gather(replay.valid_indices()))


def result(folder: Path) -> list[object]:
    found: list[object] = []
    for name in ("progress.csv", "episodes.csv"):
        with open(folder / name) as file:
            found += [[value for key, value in row.items() if key not in CLOCK] for row in csv.DictReader(file)]
    tensors = load_checkpoint(latest_checkpoint(folder)).tensors
    return found + [tensors[name].numpy().tobytes() for name in sorted(tensors)]


def main() -> None:
    library, name, stride = sys.argv[1], sys.argv[2], int(sys.argv[3])
    faults = ctypes.CDLL(library)
    faults.faults_arm.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_long]
    torch.set_num_threads(1)
    done, counts = 0, {}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch).resolve() / "here"
        root.mkdir()
        actions = {Replay, TorchRL, Checkpoints, Weights, Training, Resuming}
        action = next(action for action in actions if action.__name__.lower() == name)(root)
        action.prepare()
        shutil.copytree(root, root.with_name("prepared"))
        for kind in getattr(action, "kinds", KINDS):
            code, at = KINDS[kind], 1
            while True:
                shutil.rmtree(root)
                shutil.copytree(root.with_name("prepared"), root)
                if isinstance(action, (Replay, TorchRL, Checkpoints)):
                    action.replay._saver.known = dict(action.known)  # as after `prepare`
                pid = os.fork()
                if not pid:
                    faults.faults_arm(str(root).encode(), code, at)
                    try:
                        action.act()
                    except OSError as error:
                        if str(root) in str(error):
                            os._exit(REFUSED)
                        traceback.print_exception(error)
                        os._exit(UNNAMED)
                    os._exit(UNFLUSHED if faults.faults_unflushed() else UNHARMED)
                status = os.waitpid(pid, 0)[1]
                killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
                assert killed or os.WEXITSTATUS(status) in (REFUSED, UNHARMED), (kind, at, status)
                try:
                    if kind == "full disk" and isinstance(action, (TorchRL, Checkpoints)):
                        action.check_that_nothing_is_left()
                    action.check()
                    action.check_again()
                except Exception as error:
                    raise AssertionError(f"{kind} at operation {at} of {name}") from error
                if not killed and os.WEXITSTATUS(status) == UNHARMED:
                    break  # the action has fewer operations
                done, counts[kind] = done + 1, counts.get(kind, 0) + 1
                at += stride
    print(f"{name}: {done} faults: {counts}")


if __name__ == "__main__":
    np.seterr(all="raise")
    main()

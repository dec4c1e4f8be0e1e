"""Environments in processes of their own, which step while the learner works: for environments with slow steps.

A worker is a new interpreter: not a fork, which would inherit locks of other threads, and not a child of
`multiprocessing`, which would run the user's script again. Frames come back in shared memory, all else as messages.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from pydqn.config import Config
from pydqn.envs.base import Step
from pydqn.envs.frames import FrameLayout
from pydqn.envs.gym import GymEnvs
from pydqn.envs.ids import spec_of

_CLOSING_SECONDS = 5.0  # for a worker to close its environments, before it is killed
_MOST_RESTARTS = 100  # in one run
_SHARED = "/dev/shm"  # files in memory, on Linux
_PROGRAM = """
import json, sys
sys.path[:] = json.loads(sys.argv[3])
from pydqn.envs.workers import main
main()
"""


class _Start(NamedTuple):
    """The first message to a worker."""

    config: dict[str, Any]
    num_envs: int  # of all workers
    seed: int
    share: range
    render: bool
    spec: bytes  # the environment's EnvSpec


class _About(NamedTuple):
    """A worker's first answer."""

    num_actions: int
    action_names: tuple[str, ...]
    actions_described: str
    layout: FrameLayout
    fps: int


class _Failed(NamedTuple):
    """A worker's answer after an error."""

    message: str
    is_input: bool  # a ValueError, else a RuntimeError


class WorkerDied(RuntimeError):
    """A process with environments has ended; the message names the environments and how it ended."""


class _Worker:
    """One process, seen from outside."""

    def __init__(self, start: _Start) -> None:
        self.share, self._env_id = start.share, start.config["env_id"]
        ours, theirs = socket.socketpair()
        folder = _SHARED if os.access(_SHARED, os.W_OK) else None
        self._memory = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (open as long as the process runs)
        fds = (theirs.fileno(), self._memory.fileno())
        command = [sys.executable, "-c", _PROGRAM, *map(str, fds), json.dumps([*map(str, sys.path)])]
        self._process = subprocess.Popen(command, pass_fds=fds, stdin=subprocess.DEVNULL)
        theirs.close()
        self._connection = Connection(ours.detach())
        self.frames: NDArray[Any] = np.zeros(0)
        self.send(start)

    def map(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        """Share memory for frames of this shape and dtype with the process."""
        nbytes = int(np.prod(shape)) * dtype.itemsize
        self._memory.truncate(nbytes)
        self.frames = np.frombuffer(mmap.mmap(self._memory.fileno(), nbytes), dtype).reshape(shape)
        self.send(nbytes)

    def send(self, message: Any) -> None:
        """Send a message; that the process has ended is noticed when its answer is received."""
        with suppress(OSError):
            self._connection.send(message)

    def receive(self) -> Any:
        """Wait for an answer.

        Raises:
            WorkerDied: there will be none.
            RuntimeError, ValueError: the environments failed.
        """
        try:
            answer, noted = self._connection.recv()
        except (EOFError, OSError):
            self._died()
        for category, text in noted:
            warnings.warn(text, category, stacklevel=4)
        if isinstance(answer, _Failed):
            raise (ValueError if answer.is_input else RuntimeError)(answer.message)
        return answer

    def _died(self) -> NoReturn:
        try:
            code = self._process.wait(_CLOSING_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        names = {number.value: number.name for number in signal.Signals}
        how = f"by signal {names.get(-code, -code)}" if code < 0 else f"with exit code {code}"
        which = f"index {self.share[0]}" if len(self.share) == 1 else f"indices {self.share[0]} to {self.share[-1]}"
        raise WorkerDied(
            f"env_id: {self._env_id}, env {which}: the process (pid {self._process.pid}) ended {how}; what it printed "
            "says why; with --restart-envs (in Python restart_envs=True) a run replaces it and goes on"
        )

    def close(self) -> None:
        """End a process that has been told to (by the message None), and that may have something to say."""
        end = time.monotonic() + _CLOSING_SECONDS
        with suppress(EOFError, OSError):  # what comes at last
            while self._connection.poll(max(0.0, end - time.monotonic())):
                _, noted = self._connection.recv()
                for category, text in noted:
                    warnings.warn(text, category, stacklevel=3)
        self.kill()

    def kill(self) -> None:
        """End the process at once."""
        self._connection.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(0.2)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self.frames = np.zeros(0)
        self._memory.close()


class WorkerEnvs:
    """Gymnasium environments like `GymEnvs`, bit for bit, in processes that step at the same time.

    Args:
        config: names the environment. With `restart_envs`, a process that ends, or whose environments raise errors, is
            replaced: new episodes start there, and no transition leads from the lost ones.
        num_envs: how many environments.
        seed: of their episodes.
        workers: how many processes; each has a share of the environments.
        render: whether environment 0 must be able to render images.

    Raises:
        ValueError: see `GymEnvs`; or this system has no such processes.
        RuntimeError: an environment failed, or a process ended (`WorkerDied`).
    """

    def __init__(self, config: Config, num_envs: int, seed: int, workers: int, *, render: bool = False) -> None:
        if os.name != "posix":
            raise ValueError(f"env_workers: expected 0 on this system, got {workers}; it works on Linux and macOS")
        self.num_envs, self._restarts_left = num_envs, _MOST_RESTARTS if config.restart_envs else 0
        self._seed, self._render = seed, render
        self._start = _Start(config.to_dict(), num_envs, seed, range(0), render, _pickled(spec_of(config.env_id)))
        bounds = np.linspace(0, num_envs, min(workers, num_envs) + 1).round().astype(int)
        self._workers: list[_Worker] = []
        with ExitStack() as failed:
            failed.callback(self.close)
            for low, high in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
                share = range(low, high)
                self._workers.append(_Worker(self._start._replace(share=share, render=render and low == 0)))
            about = [worker.receive() for worker in self._workers]
            self._about: _About = about[0]
            for worker, other in zip(self._workers, about, strict=True):
                self._require_same(worker, other)
                self._share_memory(worker)
            failed.pop_all()
        self.num_actions, self.action_names = self._about.num_actions, self._about.action_names
        self.actions_described, self.layout, self.fps = self._about[2:]
        self.frame_shape, self.dtype = self.layout.frame_shape, self.layout.dtype
        self.stepping = f"{len(self._workers)} processes"

    def reset(self, out: NDArray[Any], seed: int | None = None) -> None:
        for worker in self._workers:
            worker.send(("reset", seed))
        for number in range(len(self._workers)):
            self._answer(number, out)

    def send(self, action: NDArray[np.int64]) -> None:
        for worker in self._workers:
            worker.send(("step", action[worker.share.start : worker.share.stop]))

    def recv(self, out: NDArray[Any]) -> Step:
        steps = [self._answer(number, out) for number in range(len(self._workers))]
        episodes = [
            episode._replace(env_index=worker.share.start + episode.env_index)
            for worker, step in zip(self._workers, steps, strict=True)
            for episode in step.episodes
        ]
        return Step(
            reward=np.concatenate([step.reward for step in steps]),
            terminated=np.concatenate([step.terminated for step in steps]),
            truncated=np.concatenate([step.truncated for step in steps]),
            first=np.concatenate([step.first for step in steps]),
            episodes=episodes,
            frames=sum(step.frames for step in steps),
        )

    def image(self) -> NDArray[np.uint8]:
        self._workers[0].send(("image", None))
        image: NDArray[np.uint8] = self._workers[0].receive()
        return image

    def close(self) -> None:
        for worker in self._workers:
            worker.send(None)
        while self._workers:
            self._workers.pop().close()

    def _answer(self, number: int, out: NDArray[Any]) -> Step:
        """Return a worker's step (of a reset, one of first frames), and copy its frames to their places."""
        worker = self._workers[number]
        try:
            step: Step = worker.receive()
        except RuntimeError as error:
            if not self._restarts_left:
                raise
            step = self._restart(number, error)
            worker = self._workers[number]
        out[worker.share.start : worker.share.stop] = worker.frames
        return step

    def _restart(self, number: int, error: RuntimeError) -> Step:
        """Replace a worker by a new one, whose environments start episodes with other seeds."""
        self._restarts_left -= 1
        warnings.warn(f"replaced: {error}", RuntimeWarning, stacklevel=5)
        old = self._workers[number]
        old.kill()
        seed = int(np.random.SeedSequence([self._seed, self._restarts_left]).generate_state(1)[0])
        render = self._render and old.share.start == 0
        worker = _Worker(self._start._replace(share=old.share, seed=seed, render=render))
        self._workers[number] = worker
        self._require_same(worker, worker.receive())
        self._share_memory(worker)
        worker.send(("reset", None))
        step: Step = worker.receive()
        return step

    def _require_same(self, worker: _Worker, about: _About) -> None:
        if about != self._about:
            raise ValueError(
                f"env_id: {self._start.config['env_id']}, env index {worker.share[0]}: its spaces or action masks are "
                "others than those of env index 0"
            )

    def _share_memory(self, worker: _Worker) -> None:
        layout = self._about.layout
        worker.map((len(worker.share), *layout.frame_shape), layout.dtype)


def _first_step(count: int) -> Step:
    """Return the step of environments that have been reset."""
    none = np.zeros(count, np.bool_)
    return Step(np.zeros(count), none, none, ~none, [], 0)


def _work(connection: Connection, memory: int) -> None:
    """Serve the environments of one worker until it is told to end, or until nobody is there any more."""
    start: _Start = connection.recv()
    import cloudpickle
    import gymnasium

    def answered(call: Callable[..., Any], *arguments: Any) -> bool:
        """Send what a call returns, its warnings and its error; return whether it had none."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            try:
                answer = call(*arguments)
            except (ValueError, RuntimeError) as error:
                answer = _Failed(str(error), isinstance(error, ValueError))
        noted = [(_category(warning.category), str(warning.message)) for warning in caught]
        connection.send((answer, noted))
        return not isinstance(answer, _Failed)

    envs: list[GymEnvs] = []

    def make() -> _About:
        gymnasium.registry[start.config["env_id"]] = cloudpickle.loads(start.spec)
        config = Config.from_dict(start.config)
        made = GymEnvs(config, start.num_envs, start.seed, render=start.render, share=start.share)
        envs.append(made)
        return _About(made.num_actions, made.action_names, made.actions_described, made.layout, made.fps)

    if not answered(make):
        return
    made, count = envs[0], len(start.share)
    nbytes = connection.recv()
    frames = np.frombuffer(mmap.mmap(memory, nbytes), made.dtype).reshape(count, *made.frame_shape)

    def reset(seed: int | None) -> Step:
        made.reset(frames, seed)
        return _first_step(count)

    def step(action: NDArray[np.int64]) -> Step:
        made.send(action)
        return made.recv(frames)

    calls: dict[str, Callable[[Any], Any]] = {"reset": reset, "step": step, "image": lambda _: made.image()}
    while (message := connection.recv()) is not None:
        name, argument = message
        answered(calls[name], argument)
    answered(made.close)


def _pickled(spec: Any) -> bytes:
    """Pickle an EnvSpec. What was defined in a notebook or script is sent by value."""
    import cloudpickle

    with ExitStack() as after:
        # The script's name in processes that `multiprocessing` has started with "spawn"; a worker cannot import it.
        script = sys.modules.get("__mp_main__")
        if script is not None and script.__name__ == "__mp_main__":
            cloudpickle.register_pickle_by_value(script)
            after.callback(cloudpickle.unregister_pickle_by_value, script)
        return bytes(cloudpickle.dumps(spec))


def _category(category: type[Warning]) -> type[Warning]:
    """Return a category that the other process has, too."""
    known = category.__module__.partition(".")[0] in ("builtins", "pydqn")
    return category if known else UserWarning


def main() -> None:
    """Serve the process that started this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, which ends its workers
    connection = Connection(int(sys.argv[1]))
    with suppress(EOFError, OSError):  # the run is gone
        _work(connection, int(sys.argv[2]))

"""One run writes in a folder; others are refused, readers are not."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import gc
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from pydqn import preset, resume, train
from pydqn._util.files import append_line
from pydqn.cli.main import main
from pydqn.runs import locks
from pydqn.runs.checkpoint import latest_checkpoint
from pydqn.runs.locks import LOCK, FolderInUse, FolderLock, lock_holder, lock_numbered
from pydqn.training.loop import Run

SHORT = {"total_steps": 60, "stop_successes": 0, "device": "cpu", "torch_threads": 1, "hidden_units": (8,)}

# Ten processes that run the same command at the same time.
TEN = """
import os, sys, time
from pydqn.cli.main import main
import pydqn.training.loop  # or they would not start at the same time
start = time.time() + 0.3
children = []
for number in range(10):
    child = os.fork()
    if not child:
        time.sleep(max(0, start - time.time()))
        options = ["--total-steps", "60", "--device", "cpu", "--torch-threads", "1", "--hidden-units", "8"]
        code = main(["train", "cartpole", "--seed", "0", "--learning-rate", f"0.{number + 1:02}", *options])
        sys.stdout.flush()
        os._exit(code)
    children.append(child)
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""

# A run without end, which prints a line when it has begun.
ENDLESS = """
import os, sys, time
from pydqn import preset
from pydqn.training.loop import Run
settings = dict(total_steps=10**9, stop_successes=0, total_episodes=0, device="cpu", torch_threads=1, hidden_units=(8,))
run = Run(preset("cartpole", **settings, log_every_steps=50), sys.argv[1])
reports = run.reports()
for _ in range(3):
    next(reports)
exec(sys.argv[2] if len(sys.argv) > 2 else "")
print("begun", flush=True)
for _ in reports:
    pass
"""


@pytest.fixture
def config():
    return preset("cartpole", **SHORT)


@pytest.fixture
def endless(tmp_path):
    """A function that starts a run in another process, in `tmp_path / "run"`; it is killed after the test."""
    started = []

    def start(*extra):
        command = [sys.executable, "-c", ENDLESS, str(tmp_path / "run"), *extra]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        lines = []
        while "begun" not in lines:
            lines.append(process.stdout.readline().strip())
            assert lines[-1], process.wait()
        return process, lines[:-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_ten_runs_started_together_are_ten_runs(tmp_path):
    done = subprocess.run([sys.executable, "-c", TEN], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    names = {"cartpole-0", *(f"cartpole-0.{number}" for number in range(2, 11))}
    folders = sorted((tmp_path / "runs").iterdir())
    assert {folder.name for folder in folders} == names
    rates = {json.loads((folder / "config.json").read_text())["learning_rate"] for folder in folders}
    assert rates == {(number + 1) / 100 for number in range(10)}
    for folder in folders:
        assert int(latest_checkpoint(folder).name.removeprefix("step-")) == 60
        assert (folder / "weights" / "last.safetensors").is_file()
        assert not (folder / LOCK).exists()
    assert sorted(re.findall(r"^run: runs/(\S+) ", done.stdout, re.MULTILINE)) == sorted(names)


def test_a_second_writer_is_refused_by_name_and_readers_are_not(config, endless, tmp_path, capsys):
    process, _ = endless()
    folder = tmp_path / "run"
    before = (folder / "config.json").read_bytes()
    name = f"process {process.pid} on {socket.gethostname()}, since 20"
    assert lock_holder(folder).startswith(name)
    for write in (lambda: train(config, folder), lambda: resume(folder), lambda: FolderLock(folder)):
        with pytest.raises(FolderInUse, match=f"^logdir: another run is writing in .*run' .{re.escape(name)}"):
            write()
    for arguments in (["cartpole", "--logdir", str(folder)], ["--resume", str(folder)]):
        assert main(["train", *arguments]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert name in err
    assert (folder / "config.json").read_bytes() == before
    assert main(["plot", str(folder), "-o", str(tmp_path / "a.png")]) == 0
    assert main(["evaluate", str(folder), "--episodes", "1", "--weights", "checkpoint"]) == 0
    assert main(["evaluate", str(folder), "--episodes", "2", "--weights", "checkpoint"]) == 0
    scores = (folder / "scores.jsonl").read_text().splitlines()
    assert [len(json.loads(line)["returns"]) for line in scores] == [1, 2]
    assert process.poll() is None


def test_a_kill_frees_the_folder(endless, tmp_path):
    process, _ = endless()
    process.kill()
    process.wait()
    assert (tmp_path / "run" / LOCK).is_file()
    assert lock_holder(tmp_path / "run") is None
    assert resume(tmp_path / "run", total_steps=200).steps == 200
    assert not (tmp_path / "run" / LOCK).exists()


@pytest.mark.parametrize(
    "child",
    [
        "child = os.fork()\nif not child: time.sleep(60); os._exit(0)",
        "import subprocess; child = subprocess.Popen(['sleep', '60'], close_fds=False).pid",
    ],
)
def test_a_child_does_not_keep_the_folder_of_a_parent_that_was_killed(endless, tmp_path, child):
    process, (pid,) = endless(child + "\nprint(child)")
    assert lock_holder(tmp_path / "run")
    process.kill()
    process.wait()
    try:
        os.kill(int(pid), 0)  # it lives
        assert lock_holder(tmp_path / "run") is None
    finally:
        os.kill(int(pid), signal.SIGKILL)


def test_a_child_that_ends_does_not_free_the_folder(endless, tmp_path):
    """Even if it exits normally, and so cleans up."""
    endless("child = os.fork()\nif not child: sys.exit()\nos.waitpid(child, 0)")
    assert lock_holder(tmp_path / "run")


def test_a_process_and_its_threads_write_one_run_in_a_folder(config, tmp_path):
    refused = []

    def another():
        try:
            Run(config, tmp_path / "run")
        except FolderInUse as error:
            refused.append(str(error))

    with Run(config, tmp_path / "run"):
        another()
        thread = threading.Thread(target=another)
        thread.start()
        thread.join()
        train(config, tmp_path / "other")
    assert len(refused) == 2
    assert all(f"(this process, {os.getpid()})" in message for message in refused)
    assert resume(tmp_path / "run").steps == 60


def test_threads_that_start_together_get_one_folder_each(tmp_path):
    locks_held, barrier = [], threading.Barrier(20)

    def take():
        barrier.wait()
        locks_held.append(lock_numbered(tmp_path / "run"))

    threads = [threading.Thread(target=take) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {lock.folder.name for lock in locks_held} == {"run", *(f"run.{number}" for number in range(2, 21))}
    for lock in locks_held:
        lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_another_thread_is_releasing_is_not_in_the_way(tmp_path):
    before = FolderLock(tmp_path)
    (hold,) = locks._held.values()
    hold.file.close()
    FolderLock(tmp_path).release()
    before.release()


def test_of_many_that_want_one_folder_one_gets_it(tmp_path):
    """Also when others have just unlocked it, and so removed the file and the folder."""
    holding, most, got, lock = 0, 0, 0, threading.Lock()

    def take():
        nonlocal holding, most, got
        mine, deadline = 0, time.monotonic() + 60
        while mine < 3 and time.monotonic() < deadline:
            try:
                taken = FolderLock(tmp_path / "deep" / "run")
            except FolderInUse:
                continue
            mine += 1
            with lock:
                holding, got = holding + 1, got + 1
                most = max(most, holding)
            time.sleep(0.001)
            with lock:
                holding -= 1
            taken.release()

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert got == 24


def test_a_run_that_was_garbage_collected_holds_no_lock(config, tmp_path):
    run = Run(config, tmp_path)
    run.close()
    run._log.close()
    assert lock_holder(tmp_path)
    del run
    gc.collect()
    assert lock_holder(tmp_path) is None


def test_folders_that_are_there_are_accepted_unless_they_hold_a_run(config, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "notes.txt").write_text("mine")
    for name in ("empty", "own", "deep/down/new"):
        assert train(config, tmp_path / name).steps == 60
        with pytest.raises(ValueError, match="holds a run already; choose another folder, or resume it"):
            train(config, tmp_path / name)
    (tmp_path / "stillborn").mkdir()
    (tmp_path / "stillborn" / "config.json").write_text("{}")  # as after a kill at the very start
    with pytest.raises(ValueError, match="or remove it: it has no checkpoint"):
        train(config, tmp_path / "stillborn")
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="file"):
        train(config, tmp_path / "file")


@pytest.mark.parametrize("locked", [False, True])
def test_a_mistyped_game_does_not_block_its_folder(config, tmp_path, locked):
    """Although an interactive session keeps the error, and everything that its traceback refers to."""
    wrong = dataclasses.replace(config, env_id="Pongg")
    with pytest.raises(ValueError, match="Pongg") as kept:
        Run(wrong, FolderLock(tmp_path / "run") if locked else tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert train(config, tmp_path / "run").steps == 60
    assert kept.value.__traceback__ is not None


def test_a_run_that_cannot_begin_leaves_folders_as_they_were(tmp_path):
    config = preset("cartpole", **{**SHORT, "env_id": "NoSuch-v0"})
    (tmp_path / "empty").mkdir()
    for name in ("deep/down", "empty"):
        with pytest.raises(ValueError, match="NoSuch"):
            train(config, tmp_path / name)
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


def test_a_folder_that_was_removed_and_made_again_is_free(config, tmp_path):
    run = Run(config, tmp_path / "run")
    os.rename(tmp_path / "run", tmp_path / "gone")
    (tmp_path / "gone" / LOCK).unlink()
    os.rename(tmp_path / "gone", tmp_path / "run")  # another folder may get the inode of one that was removed
    FolderLock(tmp_path / "run").release()
    with run:
        pass


def test_where_locking_is_impossible_there_is_one_warning(config, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(locks, "_warned", False)
    with pytest.warns(RuntimeWarning, match=r"cannot be locked here .No locks available.*no two runs"):
        lock = FolderLock(tmp_path / "run")
    with pytest.raises(FolderInUse, match="this process"):
        train(config, tmp_path / "run")
    lock.release()
    assert train(config, tmp_path / "run").steps == 60


def test_a_lock_that_is_a_link_is_refused(config, tmp_path):
    """It might lead anywhere. Text in the file is shown only if it is printable."""
    precious = tmp_path / "precious"
    precious.write_text("1")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(precious)
    with pytest.raises(OSError, match=LOCK):
        train(config, tmp_path / "run")
    assert precious.read_text() == "1"
    (tmp_path / "run" / LOCK).unlink()
    lock = FolderLock(tmp_path / "run")
    (tmp_path / "run" / LOCK).write_text("\x1b[2J" * 10)
    assert lock_holder(tmp_path / "run") == "another process"
    lock.release()


def test_lines_are_appended_whole(tmp_path):
    path = tmp_path / "scores.jsonl"
    path.write_text('{"half": ')
    threads = [threading.Thread(target=append_line, args=(path, str(number) * 50_000)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    half, *lines = path.read_text().splitlines()
    assert half == '{"half": '
    assert sorted(lines) == [str(number) * 50_000 for number in range(8)]

"""Runs beside other programs: how threads wait, how many there are, and the warning about slow updates."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import pydqn
from pydqn._util.machine import Pace, bound_spinning, default_torch_threads
from pydqn.learning.networks import make_network
from pydqn.learning.policy import torch_threads
from pydqn.training.loop import Run

WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME", "KMP_LIBRARY")
PRINT_SPINNING = "; import os, sys; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"


def python(program, **environment):
    """Run a program in a process with no settings for waiting threads except for `environment`."""
    clean = {name: value for name, value in os.environ.items() if name not in WAITING}
    out = subprocess.run(
        [sys.executable, "-c", program], env={**clean, **environment}, capture_output=True, text=True, check=True
    )
    return out.stdout.strip().splitlines()[-1]


def test_spinning_is_bounded_unless_the_user_has_chosen_how_threads_wait():
    environment: dict[str, str] = {}
    assert bound_spinning(environment)
    assert environment == {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}
    for name in WAITING:
        environment = {name: "as the user wants"}
        assert not bound_spinning(environment)
        assert environment == {name: "as the user wants"}


def test_spinning_is_bounded_before_torch_is_imported():
    assert python("from pydqn.cli.main import main; main(['presets'])" + PRINT_SPINNING) == "1000 False"
    for name in ("train", "resume", "evaluate"):
        assert python(f"import pydqn; pydqn.{name}" + PRINT_SPINNING) == "1000 True"
    # libgomp, which PyTorch brings, prints its settings.
    program = "import os; os.environ['OMP_DISPLAY_ENV'] = 'verbose'; import pydqn; pydqn.train; import torch"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True,
                         env={name: value for name, value in os.environ.items() if name not in WAITING})  # fmt: skip
    if "GOMP_SPINCOUNT" in out.stderr:
        assert "GOMP_SPINCOUNT = '1000'" in out.stderr


def test_the_settings_of_the_user_stay():
    assert python("import pydqn; pydqn.train" + PRINT_SPINNING, GOMP_SPINCOUNT="7") == "7 True"
    assert python("import pydqn; pydqn.train" + PRINT_SPINNING, OMP_WAIT_POLICY="active") == "None True"


def test_parts_used_alone_change_nothing_in_the_process(tmp_path, tiny):
    """Threads, environment variables and the C library's settings belong to the user of the parts."""
    pydqn.train(replace(tiny, total_steps=100), tmp_path / "run")
    program = f"""
import ctypes, os
before = dict(os.environ)
import numpy as np, torch, pydqn
torch.set_num_threads(2)
from pydqn import _core
_core.keep_freed_memory = None  # would be noticed if it were called
from types import SimpleNamespace
from pydqn.envs.frames import FrameLayout, Part
from pydqn.evaluation.evaluate import trained_policy, load_run
from pydqn.learning.networks import make_network
config = load_run({str(tmp_path / "run")!r})
assert config.torch_threads == 1
replay = pydqn.FrameReplay(100, (84, 84))
pydqn.TransitionReplay(100, (4,), dtype="float32")
pydqn.DeviceReplay(100, (84, 84), device="cpu")
network = make_network("small", 4, (84, 84), 6)
layout = FrameLayout((Part("", (84, 84), np.dtype(np.uint8), (0, 255), "none"),))
envs = SimpleNamespace(num_envs=1, layout=layout, num_actions=6)
trained_policy({str(tmp_path / "run")!r}, config, envs)
pydqn.Learner(network, pydqn.LearnerSettings.from_config(config), "cpu", replay.empty_batch(8))
pydqn.preprocess.resize_area(np.zeros((1, 210, 160), np.uint8))
changed = {{k for k in os.environ | before if os.environ.get(k) != before.get(k)}} - {{"KMP_INIT_AT_FORK"}}
print(torch.get_num_threads(), sorted(changed))
"""
    clean = {name: value for name, value in os.environ.items() if name not in WAITING}
    out = subprocess.run([sys.executable, "-c", program], env=clean, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert out.stdout.strip() == "2 []"


def test_a_run_restores_the_number_of_threads(tiny, tmp_path):
    before = torch.get_num_threads()
    other = before + 1
    config = replace(tiny, torch_threads=other)
    with Run(config, tmp_path / "whole"):
        assert torch.get_num_threads() == other
    assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match="env_id"):
        Run(replace(config, env_id="NoSuchThing-v0"), tmp_path / "none")
    assert torch.get_num_threads() == before
    pydqn.evaluate(tmp_path / "whole", 1, max_episode_steps=5)
    assert torch.get_num_threads() == before


def test_threads_suit_the_cores_and_the_network(tiny, monkeypatch):
    convolutions, linear = make_network("small", 4, (84, 84), 6), make_network("mlp", 1, (4,), 2)

    def default(convolutions, cores, **environment):
        return default_torch_threads(convolutions, cores, environment)

    assert [default(True, cores) for cores in (1, 2, 3, 4, 5, 8, 64)] == [1, 2, 2, 3, 4, 4, 4]
    assert [default(False, cores) for cores in (1, 2, 64)] == [1, 1, 1]
    assert default(True, 64, OMP_NUM_THREADS="16") == 0  # the choice of the user
    assert default(True, 64, MKL_NUM_THREADS="16") == 0
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pydqn.learning.policy.usable_cores", lambda: 3)
    config = replace(tiny, torch_threads=0)
    before = torch.get_num_threads()
    try:
        for already, expected in ((16, 2), (1, 1)):  # never more than PyTorch had before
            torch.set_num_threads(already)
            with torch_threads(config, convolutions) as count:
                assert count == torch.get_num_threads() == expected
            assert torch.get_num_threads() == already
            with torch_threads(config, linear) as count:
                assert count == 1
    finally:
        torch.set_num_threads(before)


def test_emulators_get_a_thread_per_core(tiny, monkeypatch):
    import ale_py

    from pydqn.envs import atari

    asked = []
    make = ale_py.AtariVectorEnv

    def vector(*arguments, **options):
        asked.append(options["num_threads"])
        return make(*arguments, **options)

    monkeypatch.setattr(ale_py, "AtariVectorEnv", vector)
    monkeypatch.setattr(atari, "usable_cores", lambda: 3)
    for num_envs, threads, expected in ((8, 0, 3), (2, 0, 2), (8, 5, 5)):
        config = replace(tiny, num_envs=num_envs, emulator_threads=threads)
        atari.AtariEnvs("pong", config, num_envs, 0).close()
        assert asked.pop() == expected


def durations(generator, count, usual, factor=1.0):
    """Yield durations of updates, in seconds. One in ten is undisturbed."""
    for number in range(count):
        slow = 1.0 if number % 10 == 5 else factor
        yield usual * slow * generator.uniform(0.95, 1.1)


@pytest.mark.parametrize(
    ("phases", "warns"),
    [
        ([(3000, 1.0)], False),
        ([(3000, 2.2)], False),  # one thread beside a busy process
        ([(1000, 1.0), (1000, 2.0), (1000, 1.0)], False),
        ([(1000, 27.0)], True),  # disturbed from the beginning
        ([(1000, 1.0), (200, 27.0), (1000, 1.0)], True),
        ([(30, 27.0), (1000, 1.0)], False),  # a start is slow
    ],
)
def test_the_warning_about_slow_updates_comes_once(phases, warns):
    generator, pace = np.random.default_rng(0), Pace(threads=2)
    messages = [pace.add(seconds) for count, factor in phases for seconds in durations(generator, count, 0.016, factor)]
    messages = [message for message in messages if message]
    assert len(messages) == warns
    if warns:
        assert "times as long" in messages[0]
        assert "--torch-threads 1" in messages[0]
        assert "GOMP_SPINCOUNT=1000" in messages[0]


def test_with_one_thread_the_warning_does_not_advise_one_thread():
    pace = Pace(threads=1)
    messages = [pace.add(seconds) for seconds in durations(np.random.default_rng(0), 200, 0.016, 27.0)]
    assert [message is None or "--torch-threads" in message for message in messages].count(False) == 1


def test_one_long_pause_gives_no_warning():
    pace = Pace(threads=2)
    assert not any(pace.add(3600.0 if number == 500 else 0.016) for number in range(2000))


def test_the_command_line_warns_of_slow_updates(tmp_path):
    program = f"""
from pydqn.cli import main as cli
from pydqn._util import machine
messages = iter(["updates take 99 ms"])
machine.Pace.add = lambda self, seconds: next(messages, None)
cli.main(["train", "cartpole", "--total-steps", "200", "--logdir", {str(tmp_path / "run")!r}])
"""
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    lines = out.stderr.replace("\r", "\n").splitlines()
    assert [line for line in lines if "99 ms" in line] == ["pydqn: warning: updates take 99 ms"]


def test_a_run_that_is_garbage_collected_leaves_the_threads_of_another_alone(tiny, tmp_path):
    """Else the sums of the other run would be rounded differently from then on."""
    with torch_threads(replace(tiny, torch_threads=1), make_network("small", 4, (84, 84), 6)):
        dropped = Run(replace(tiny, torch_threads=2), tmp_path / "dropped")
        dropped.close()
        with Run(replace(tiny, torch_threads=3), tmp_path / "other"):
            del dropped
            gc.collect()
            assert torch.get_num_threads() == 3

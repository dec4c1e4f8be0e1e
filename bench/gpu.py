"""The GPU path: checked against eager updates, then measured. It takes ten minutes and needs no network.

    pip install --no-build-isolation --no-deps .        # or: pip install .
    python bench/gpu.py -o rows.json                    # all stages, the whole loop, a learning run
    python bench/gpu.py --device cpu --quick            # the same code without a GPU: shows only that it runs

Times are medians; what is compared takes turns. "us" are microseconds per update or per step of all environments.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from stages_learning import NATURE
from timing import check_stages, in_turns, rates_in_turns

from pydqn import FrameReplay, Learner, LearnerSettings, preset, train
from pydqn._util.cuda import tensor_float_32
from pydqn._util.files import write_json
from pydqn.envs.make import make_envs
from pydqn.learning.candidates import Trial
from pydqn.learning.networks import make_network
from pydqn.learning.policy import Actor, Policy, resolve_device
from pydqn.replay.device import DeviceReplay
from pydqn.runs.provenance import provenance
from pydqn.training.loop import Run

ROWS = []
FRAMES = np.random.default_rng(0).integers(0, 256, (1024, 84, 84), dtype=np.uint8)
ROOT = Path(__file__).parents[1]
GPU_TESTS = (
    *("learning/test_learner.py", "learning/test_custom_loss.py", "learning/test_optimizers.py"),
    *("learning/test_candidates.py", "learning/test_fused.py", "learning/test_fused_kernels.py"),
    *("learning/test_policy.py", "replay/test_device.py", "replay/test_device_threads.py", "_util/test_cuda.py"),
)


def row(stage, value, unit, target=None, note=""):
    """Print and keep a figure; `target` is ("<=" or ">=", number)."""
    held = None if target is None else bool(value <= target[1] if target[0] == "<=" else value >= target[1])
    ROWS.append({"stage": stage, "value": value, "unit": unit, "target": target, "held": held, "note": note})
    aim = "" if target is None else f"{target[0]} {target[1]:g} {'held' if held else 'missed'}"
    shown = "-" if value is None else f"{value:,.1f}"
    print(f"{stage:58s} {shown:>12s} {unit:10s} {aim:16s} {note}".rstrip(), flush=True)


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def filled(kind, frames, envs=32, **settings):
    """Return a replay buffer of either kind, full of noise."""
    replay = kind(frames, num_envs=envs, **settings)
    zeros, off = np.zeros(envs, np.int64), np.zeros(envs, bool)
    for time_step in range(frames // envs + 1):
        start = time_step * envs % (len(FRAMES) - envs)
        replay.append(FRAMES[start : start + envs], zeros, zeros, off, off, ~off if time_step == 0 else off)
    return replay


def checks(device, quick):
    """The tests that need a GPU: graph against eager, no waits, row numbers against observations, real streams."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=append", *GPU_TESTS]
    if quick:
        command += ["-k", "at_once or needed"]
    # Not in the checkout's root, where the folder pydqn/ would hide the package that is installed.
    done = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True)
    text = (done.stdout + done.stderr).strip() or "no output"
    print(text[-3000:])
    row("tests of the GPU path", done.returncode, "exit code", ("<=", 0), text.splitlines()[-1])


def ceiling(device, quick):
    """The card's own limit: a large copy, bytes read plus bytes written."""
    size = 2**20 if quick else 2**31
    source, target = torch.randint(256, (2, size), dtype=torch.uint8, device=device)

    def copy():
        target.copy_(source)
        wait(device)

    row("copy within the device", 2 * size / in_turns({"": copy}, 10, 1)[""] / 1e9, "GB/s")


def update(device, quick):
    """One update of 32, Nature's network: frames on the host or on the device, eager or as a graph, one or eight."""
    captures = (False, True) if device.type == "cuda" else (False,)
    size = 20_000 if quick else 1_000_000
    replays = {
        "frames on the host": filled(FrameReplay, 20_000),
        "frames on the device": filled(DeviceReplay, size, device=device),
    }
    calls, counts = {}, {}
    # "float32" is PyTorch's default: convolutions may use TensorFloat-32, matrix products may not.
    for precision, (where, replay), capture, at_once in itertools.product(
        ("float32", "tf32", "bfloat16"), replays.items(), captures, (1, 8)
    ):
        if not capture and not quick and (at_once > 1 or precision == "tf32"):
            continue
        arithmetic = precision.replace("tf32", "float32")
        config = preset("pong", **NATURE, precision=arithmetic, target_update_period=0, update="plain")
        settings = LearnerSettings.from_config(config)
        batch = replay.empty_batch(32 * at_once)
        network = make_network("nature", 4, (84, 84), 4)
        learner = Learner(network, settings, device, batch, capture, getattr(replay, "frames", None))

        def call(learner=learner, replay=replay, batch=batch):
            learner.update(replay.sample(len(batch.action), batch))
            wait(device)

        if precision == "tf32":  # a graph keeps the settings of its capture
            with tensor_float_32(products=True, convolutions=True):
                call()
        how = "graph" if capture else "eager"
        name = f"update, {precision}, {where}, {how}" + (f" of {at_once}" if at_once > 1 else "")
        calls[name], counts[name] = call, at_once
    times = in_turns(calls, 3 if quick else 100, 3)
    for name, seconds in times.items():
        best = "float32, frames on the device, graph of 8" in name
        row(name, seconds / counts[name] * 1e6, "us", ("<=", 120) if best else None, "sampling and upload included")
    if len(captures) == 2:
        ratio = 8 * times["update, float32, frames on the device, eager"]
        ratio /= times["update, float32, frames on the device, graph of 8"]
        row("eager by graph of 8", ratio, "times", (">=", 3))


def forms(device, quick):
    """The forms of the update that a learner tries on this GPU, with what became of each."""
    for name in ("nature", "pong", "dopamine-dqn", "c51"):
        config = preset(name, device=str(device))
        settings, units = LearnerSettings.from_config(config), config.hidden_units
        scaling = {"pixel_mean": config.pixel_mean, "pixel_std": config.pixel_std}
        heads = {"hidden_units": units, "dueling": config.dueling}
        network = make_network(config.network, 4, (84, 84), 6, settings=settings, **heads, **scaling)
        replay = filled(DeviceReplay, 2_000, device=device, n_step=config.n_step)
        batch = replay.empty_batch(config.batch_size)
        learner = Learner(network, settings, device, batch, frames=replay.frames)
        learner.update(replay.sample(config.batch_size))
        for trial in learner.trials or [Trial(learner.form, None, "the only form on this device")]:
            note = "chosen" if trial.name == learner.form else trial.reason
            row(f"{name}: {trial.name}", None if trial.seconds is None else 1e6 * trial.seconds, "us", note=note)


def act(device, quick):
    """Action values of all environments, with the copies to and from the device."""
    calls = {}
    for envs in (8, 32, 128):
        replay = filled(DeviceReplay, 100 * envs, envs, device=device)
        policy = Policy(make_network("nature", 4, (84, 84), 4), device, "float32")
        for capture in (False, True) if device.type == "cuda" else (False,):
            actor = Actor(policy, replay.latest(), replay.frames, capture)
            name = f"act, {envs} environments, {'graph' if capture else 'eager'}"
            calls[name] = lambda actor=actor, replay=replay: actor.values(replay.latest())
    for name, seconds in in_turns(calls, 3 if quick else 200, 3).items():
        row(name, seconds * 1e6, "us")


def emulators(device, quick):
    """Breakout, random actions, nothing else running: by threads and environments."""
    threads = (1, 2) if quick else (4, 8, 12, 16)
    players = {}
    for envs, count in itertools.product((16,) if quick else (16, 32, 64, 128), threads):
        config = preset("nature", num_envs=envs, emulator_threads=count)
        players[f"emulators, {envs} environments, {count} threads"] = emulator_rate(config, 0.2 if quick else 0.4)
    for name, rate in rates_in_turns(players, 3).items():
        row(name, rate, "steps/s")


def emulator_rate(config, seconds):
    envs = make_envs(config, config.num_envs, 0)
    slot = np.empty((config.num_envs, 84, 84), np.uint8)
    envs.reset(slot)
    actions = np.random.default_rng(0).integers(envs.num_actions, size=(64, config.num_envs))

    def rate():
        started, steps = time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            envs.send(actions[steps % 64])
            envs.recv(slot)
            steps += 1
        return steps * config.num_envs / (time.perf_counter() - started)

    return rate


def loop_config(device, envs, quick, **changes):
    """Breakout, Nature's network and replay ratio: one update of 32 per 4 steps, the memory full from the start."""
    settings = {
        **NATURE,
        "env_id": "breakout",
        "num_envs": envs,
        "device": str(device),
        "precision": "float32",
        "storage": "device",
        "train_period_steps": 4,
        "target_update_period": 10 if quick else 2_500,
        "learning_starts_steps": 64 * envs,
        "replay_capacity_frames": 20_000 if quick else 1_000_000,
        "log_every_steps": 64 * envs,
        "checkpoint_every_steps": 0,
    }
    return preset("pong", **{**settings, **changes})


def warmed_up(run):
    """Return the run with a full replay buffer, after the capture of its graphs."""
    config, envs, replay = run.config, run.config.num_envs, run.replay
    next(run.reports())
    zeros, off = np.zeros(envs, np.int64), np.zeros(envs, bool)
    for time_step in range(config.replay_capacity_frames // envs):
        start = time_step * envs % (len(FRAMES) - envs)
        replay.append(FRAMES[start : start + envs], zeros, zeros, off, off, off)
    while run.learner.updates < 2 * config.target_update_period:  # graphs of every length that occurs
        run.step()
    return run


def loop(device, quick):
    """The whole training loop: by environments, place of the frames, and precision."""
    players = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        variants = [(envs, {}) for envs in ((8,) if quick else (16, 32, 64, 128))]
        variants += [(8 if quick else 32, {"storage": "host", "replay_capacity_frames": 20_000 if quick else 200_000})]
        variants += [(8 if quick else 64, {"precision": "bfloat16"})]
        for number, (envs, changes) in enumerate(variants):
            run = warmed_up(stack.enter_context(Run(loop_config(device, envs, quick, **changes), f"{folder}/{number}")))
            players[" ".join([f"loop, {envs} environments", *map(str, changes.values())])] = run

        def rate(run):
            wait(device)
            started, steps, updates = time.perf_counter(), run.steps, run.learner.updates
            while time.perf_counter() - started < (0.5 if quick else 3):
                run.step()
            wait(device)
            taken = time.perf_counter() - started
            assert abs((run.steps - steps) / 4 - (run.learner.updates - updates)) <= run.config.num_envs
            return (run.steps - steps) / taken

        rates = rates_in_turns({name: lambda run=run: rate(run) for name, run in players.items()}, 3)
        best = max((name for name in rates if "host" not in name and "bfloat16" not in name), key=rates.get)
        for name, value in rates.items():
            row(name, value, "steps/s", (">=", 30_000) if name == best else None)
        traffic(players[best])
        timeline(players[best], device)


def traffic(run):
    """Bytes to the device per step: new frames, and row numbers of batches and of observations to act on."""
    envs, batch = run.config.num_envs, run._batch
    updates = envs / run.config.train_period_steps * run.config.batch_size / len(batch.action)
    sent = 84 * 84 * envs + sum(part.nbytes for part in batch) * updates + run.replay.latest().nbytes
    row("host to device, per step", sent / envs, "bytes", ("<=", 8_192))


def timeline(run, device, steps=50):
    """Where the time of a step goes: the device's kernels, the clock, and the calls that wait."""
    wait(device)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        started = time.perf_counter()
        for _ in range(steps):
            run.step()
        wait(device)
        taken = time.perf_counter() - started
    events = profile.key_averages()
    # Only kernels and copies: operations of the host would count what they launch a second time.
    kernels = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    busy = {event.key: event.self_device_time_total for event in kernels}
    row("profiled: clock per step of all environments", taken / steps * 1e6, "us")
    row("profiled: device time summed per step of all environments", sum(busy.values()) / steps, "us")
    for key in sorted(busy, key=busy.get, reverse=True)[:12]:
        if busy[key] > 0:
            row(f"  {key[:54]}", busy[key] / steps, "us")
    for event in events:
        if "Synchronize" in event.key:
            row(f"  calls of {event.key} per step", event.count / steps, "calls")


def pong(device, quick):
    """`pydqn train pong` to a mean return of 18."""
    with tempfile.TemporaryDirectory() as folder:
        config = preset("pong", device=str(device), **({"total_steps": 600} if quick else {}))
        result = train(config, folder)
    row("pong to 18", result.seconds, "s", ("<=", 120), f"{result.steps:,} steps, {len(result.returns)} episodes")
    recent = result.returns[-config.mean_episodes :]
    row("  mean return at the end", float(np.mean(recent)) if recent else float("nan"), "points", (">=", 18))


STAGES = {f.__name__: f for f in (checks, ceiling, update, forms, act, emulators, loop, pong)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"some of: {', '.join(STAGES)}")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu to see that it runs")
    parser.add_argument("--quick", action="store_true", help="small and rough, to see that it runs")
    parser.add_argument("-o", "--output", help="JSON file for the rows, versions and machine")
    arguments = parser.parse_args()
    check_stages(parser, arguments.stages, STAGES)
    if arguments.device != "cpu" and not torch.cuda.is_available():
        print("skipped: PyTorch sees no CUDA device (--device cpu --quick shows that the script runs)")
        return
    device = resolve_device(arguments.device)
    about = {"date": datetime.date.today().isoformat(), **provenance(), "device": str(device)}
    if device.type == "cuda":
        about |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    for name in arguments.stages or STAGES:
        started = time.perf_counter()
        STAGES[name](device, arguments.quick)
        print(f"({name}: {time.perf_counter() - started:.0f} s)", flush=True)
        if arguments.output:
            write_json(Path(arguments.output), {"about": about, "rows": ROWS})


if __name__ == "__main__":
    main()

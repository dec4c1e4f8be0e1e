"""Every stage beside what others offer, in one run: ratios of medians, each next to what we aim at.

    pip install -c constraints.txt -e '.[test,peers]'
    python bench/compare.py                  # all stages, about 15 minutes on a quiet machine
    python bench/compare.py update loop      # some of them

What is compared takes turns, so that a machine whose speed drifts slows all of it alike. A peer that is not installed
is left out, and named. Times are of this machine; the ratios are what can be carried elsewhere.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from peers import BATCH, MEMORIES, PlainCopy

from pydqn import preset
from pydqn.logs import environment

HERE = Path(__file__).parent
ROWS = []


def row(stage, ours, other, ratio, target, note=""):
    """Print and keep one line. `target` is ("<=" or ">=", number), or None where the line only informs."""
    held = None if target is None else (ratio <= target[1] if target[0] == "<=" else ratio >= target[1])
    ROWS.append({"stage": stage, "ours": ours, "other": other, "ratio": ratio, "target": target, "held": held} | {"note": note})
    aim = "" if target is None else f"{target[0]} {target[1]}"
    verdict = {None: "", True: "held", False: "MISSED"}[held]
    print(f"{stage:44s} {ours:>15s} {other:>34s} {ratio:7.2f} {aim:>8s} {verdict:7s} {note}", flush=True)


def in_turns(functions, rounds, calls):
    """Time functions in turns; returns the median seconds per call of each."""
    times = {name: [] for name in functions}
    for name, function in functions.items():
        for _ in range(3):
            function()
    for _ in range(rounds):
        for name, function in functions.items():
            for _ in range(calls):
                started = time.perf_counter()
                function()
                times[name].append(time.perf_counter() - started)
    return {name: float(np.median(spent)) for name, spent in times.items()}


def missing(name, error):
    print(f"  ({name} is left out: {type(error).__name__}: {str(error).splitlines()[0][:90]})", flush=True)


def us(seconds):
    return f"{seconds * 1e6:.1f} us"


def ms(seconds):
    return f"{seconds * 1e3:.2f} ms"


def stage_emulators(quick):
    """Breakout, random actions, 32 environments: frames per second of the emulator."""
    import ale_py
    from ale_py import AtariVectorEnv, roms

    from pydqn import FrameReplay
    from pydqn.envs import make_lanes

    lanes_count, generator = 32, np.random.default_rng(0)
    lanes = make_lanes(preset("pong", env_id="breakout", num_envs=lanes_count, noop_max_frames=0), lanes_count, 0)
    replay = FrameReplay(100_000, num_envs=lanes_count)
    everything = np.ones(lanes_count, bool)
    lanes.reset(replay.next_slot())
    nothing = np.zeros(lanes_count, np.int64)
    replay.append(replay.next_slot(), nothing, nothing, ~everything, ~everything, everything)
    actions = generator.integers(4, size=(64, lanes_count))

    def ours(count):
        for i in range(count):
            lanes.send(actions[i % 64])
            slot = replay.next_slot()
            step = lanes.recv(slot)
            replay.append(slot, actions[i % 64], step.reward, step.terminated, step.truncated, step.first)

    games = {"pydqn, to the replay slot": (ours, 4 * lanes_count)}
    vector = AtariVectorEnv("breakout", lanes_count)
    vector.reset()

    def theirs(count):
        for i in range(count):
            vector.step(actions[i % 64])

    games["AtariVectorEnv 84x84, stack of 4"] = (theirs, 4 * lanes_count)
    try:
        envpool = importlib.import_module("envpool")
        pool = envpool.make_gymnasium("Breakout-v5", num_envs=lanes_count, num_threads=2)
        pool.reset()

        def pooled(count):
            for i in range(count):
                pool.step(actions[i % 64])

        games["EnvPool 84x84, stack of 4"] = (pooled, 4 * lanes_count)
    except Exception as error:
        missing("EnvPool", error)
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    console = ale_py.ALEInterface()
    console.loadROM(roms.get_rom_path("breakout"))
    minimal = console.getMinimalActionSet()

    def bare(count):
        for i in range(count * lanes_count):
            for _ in range(4):
                console.act(minimal[actions[i % 64, 0]])
            if console.game_over():
                console.reset_game()

    games["bare ALEInterface.act, one core"] = (bare, 4 * lanes_count)
    rates = {name: [] for name in games}
    for _ in range(3 if quick else 7):
        for name, (play, frames) in games.items():
            started = time.perf_counter()
            play(40)
            rates[name].append(40 * frames / (time.perf_counter() - started))
    rate = {name: float(np.median(values)) for name, values in rates.items()}
    mine = rate.pop("pydqn, to the replay slot")
    targets = {"AtariVectorEnv": (">=", 1.2), "EnvPool": (">=", 1.35), "bare": (">=", 1.8)}
    for name, value in rate.items():
        note = "twice it would be both cores" if name.startswith("bare") else ""
        target = targets[name.split(" ")[0]]
        row("emulators, frames/s, 32 lanes", f"{mine:.0f}", f"{name}: {value:.0f}", mine / value, target, note)
    lanes.close()


def stage_preprocess(quick):
    import bench_preprocess as cases

    for name, target in (("resize_area", 0.3), ("crop_area", 0.15), ("crop_nearest", 0.5)):
        ours, theirs = cases.CASES[name]
        out = np.empty((cases.LANES, 84, 84), np.uint8)
        times = in_turns({"ours": lambda f=ours, o=out: f(o), "cv2": theirs}, 20 if quick else 100, 5)
        np.testing.assert_array_equal(out, np.stack(theirs()))
        mine, other = (times[key] / cases.LANES for key in ("ours", "cv2"))
        row(f"{name}, one frame of 8", us(mine), f"NumPy and OpenCV: {us(other)}", mine / other, ("<=", target))


def made(size, prioritized=False, most_bytes=9e9):
    """Build the memories that fit and fill them."""
    found = {}
    for name, (make, each, has_priorities) in MEMORIES.items():
        if prioritized and not has_priorities:
            continue
        fits = int(min(size, most_bytes // each))
        try:
            memory = make(fits, prioritized=True) if prioritized else make(fits)
            for i in range(fits + 1):
                memory.add(i)
            found[name] = (memory, fits)
        except Exception as error:
            missing(name, error)
    return found


def stage_append(quick):
    memories = made(2_000 if quick else 20_000)
    counters = dict.fromkeys(memories, 0)

    def adder(name):
        def add():
            counters[name] += 1
            memories[name][0].add(counters[name])

        return add

    times = in_turns({name: adder(name) for name in memories}, 20 if quick else 60, 50)
    mine = times.pop("pydqn")
    best = min(times, key=times.get)
    for name, value in times.items():
        row("append, one frame", us(mine), f"{name}: {us(value)}", mine / value, ("<=", 0.25) if name == best else None)


def stage_sample(quick):
    size = 50_000 if quick else 1_000_000
    ours, _ = made(size)["pydqn"] if quick else (MEMORIES["pydqn"][0](size), size)
    if not quick:
        for i in range(size + 1):
            ours.add(i)
    copies = {
        "memcpy, huge pages": PlainCopy(size, True),
        "memcpy, 4 KiB pages": PlainCopy(size, False),
    }
    rounds = 20 if quick else 60
    times = in_turns({"pydqn": ours.sample} | {name: copy.sample for name, copy in copies.items()}, rounds, 20)
    mine = times.pop("pydqn")
    for name, value in times.items():
        target = ("<=", 1.5) if "huge" in name else None
        row(f"sample({BATCH}), ring of {size:,}", us(mine), f"{name}: {us(value)}", mine / value, target)
    del copies
    results = {}
    for name, (make, each, _) in MEMORIES.items():
        if name == "pydqn":
            continue
        fits = int(min(size, 8e9 // each))
        try:
            memory = make(fits)
            for i in range(fits + 1):
                memory.add(i)
        except Exception as error:
            missing(name, error)
            continue
        pair = in_turns({"pydqn": ours.sample, name: memory.sample}, rounds, 20)
        del memory
        results[name] = (pair["pydqn"], pair[name], fits)
    same_size = {name: value for name, (_, value, fits) in results.items() if fits == size}
    best = min(same_size, key=same_size.get) if same_size else None
    for name, (mine, value, fits) in results.items():
        note = "" if fits == size else f"its ring: {fits:,}, no more fits"
        target = ("<=", 0.5) if name == best else None
        row(f"sample({BATCH}), ring of {size:,}", us(mine), f"{name}: {us(value)}", mine / value, target, note)


def stage_prioritized(quick):
    size = 20_000 if quick else 100_000
    memories = made(size, prioritized=True, most_bytes=6e9)
    uniform = MEMORIES["pydqn"][0](size)
    for i in range(size + 1):
        uniform.add(i)
    functions = {"uniform": uniform.sample} | {name: memory.sample_and_update for name, (memory, _) in memories.items()}
    times = in_turns(functions, 20 if quick else 60, 20)
    mine = times.pop("pydqn")
    for name, value in times.items():
        target = ("<=", 1.3) if name == "uniform" else ("<=", 1.0)
        other = f"pydqn, uniform: {us(value)}" if name == "uniform" else f"{name}: {us(value)}"
        row(f"prioritized sample and update, {size:,}", us(mine), other, mine / value, target)


def default_update():
    """What one writes first: float32, NCHW, `torch.optim.Adam`."""
    from torch import nn

    def network():
        torch.manual_seed(0)
        return nn.Sequential(
            *(nn.Conv2d(4, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU(), nn.Conv2d(64, 64, 3, 1), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, 4)),
        )

    online, target = network(), network()
    optimizer = torch.optim.Adam(online.parameters(), lr=1e-4)

    def update(batch):
        obs, next_obs = torch.as_tensor(batch.obs) / 255.0, torch.as_tensor(batch.next_obs) / 255.0
        with torch.no_grad():
            y = torch.as_tensor(batch.reward) + torch.as_tensor(batch.discount) * target(next_obs).max(1).values
        q = online(obs).gather(1, torch.as_tensor(batch.action)[:, None]).squeeze(1)
        loss = nn.functional.smooth_l1_loss(q, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return update, online


NATURE = {
    **{"network": "nature", "hidden_units": (512,), "dueling": False, "double": False, "n_step": 1, "max_grad_norm": 0.0},
    **{"pixel_mean": 0.0, "pixel_std": 1.0, "learning_rate": 1e-4, "optimizer_epsilon": 1e-8, "target_sync_updates": 0},
}


def stage_update(quick):
    """One update of 32, Nature's network; after 20 of them, both have come to the same losses."""
    from pydqn import Learner
    from pydqn.learner import resolve_device
    from pydqn.networks import make_network

    memory = MEMORIES["pydqn"][0](5_000)
    for i in range(5_000):
        memory.add(i)
    out = memory.replay.empty_batch(BATCH)

    def make(precision):
        theirs, online = default_update()
        network = make_network("nature", 4, (84, 84), 4)
        with torch.no_grad():
            for mine, other in zip(network.parameters(), online.parameters(), strict=True):
                mine.copy_(other)
        return Learner(network, preset("pong", precision=precision, **NATURE), resolve_device("cpu"), out), theirs

    threads = torch.get_num_threads()
    for precision, tolerance in (("float32", 1e-4), ("auto", 0.05)):
        learner, theirs = make(precision)
        for _ in range(20):
            batch = memory.replay.sample(BATCH, out)
            learner.update(batch)
            expected = theirs(batch)
        np.testing.assert_allclose(learner.metrics().loss, expected, rtol=tolerance, atol=tolerance / 10)
        for count in sorted({1, threads}, reverse=True):
            torch.set_num_threads(count)
            batch = memory.replay.sample(BATCH, out)
            times = in_turns({"pydqn": lambda x=learner, b=batch: x.update(b), "default": lambda b=batch, f=theirs: f(b)}, 30 if quick else 80, 3)
            target = ("<=", 0.45) if precision == "auto" else None
            note = f"losses after 20 updates within {tolerance:g}"
            kind = str(learner.policy.computing.torso.convs[-1].weight.dtype).removeprefix("torch.")
            row(f"update of 32, {kind}, {count} threads", ms(times["pydqn"]), f"PyTorch eager: {ms(times['default'])}", times["pydqn"] / times["default"], target, note)
    torch.set_num_threads(threads)


def stage_loop(quick):
    """Breakout, Nature's network, one update of 32 per 4 steps: steps per second."""
    from pydqn.training import Run

    def ours(lanes):
        config = preset(
            "pong", env_id="breakout", **{**NATURE, "target_sync_updates": 250}, num_envs=lanes, steps_per_update=4,
            learning_starts_steps=1_000, replay_capacity_frames=20_000, log_every_steps=1_000,
        )
        folder = tempfile.TemporaryDirectory()
        run = Run(config, folder.name + "/run")
        reports = run.reports()
        next(reports)

        def go(seconds):
            started, steps, updates = time.perf_counter(), run.steps, run.learner.updates
            while time.perf_counter() - started < seconds:
                run.step()
            taken = time.perf_counter() - started
            assert abs((run.steps - steps) / 4 - (run.learner.updates - updates)) <= lanes
            return (run.steps - steps) / taken

        return go, (run, folder)

    def stable_baselines3(count):
        import ale_py
        import gymnasium
        from stable_baselines3 import DQN
        from stable_baselines3.common.callbacks import BaseCallback
        from stable_baselines3.common.env_util import make_atari_env
        from stable_baselines3.common.vec_env import VecFrameStack

        gymnasium.register_envs(ale_py)

        class Clock(BaseCallback):
            def _on_step(self):
                return time.perf_counter() < self.until

        env = VecFrameStack(make_atari_env("BreakoutNoFrameskip-v4", n_envs=count, seed=0), 4)
        often = {"train_freq": 4, "gradient_steps": 1} if count == 1 else {"train_freq": 1, "gradient_steps": count // 4}
        model = DQN(
            "CnnPolicy", env, buffer_size=20_000, learning_rate=1e-4, batch_size=32, learning_starts=1_000,
            target_update_interval=1_000, exploration_final_eps=0.01, **often,
        )  # fmt: skip
        model.learn(1_200)

        def go(seconds):
            clock = Clock()
            steps, started = model.num_timesteps, time.perf_counter()
            clock.until = started + seconds
            model.learn(10**7, callback=clock, reset_num_timesteps=False)
            return (model.num_timesteps - steps) / (time.perf_counter() - started)

        return go, env

    players = {f"pydqn, {lanes} lanes": ours(lanes) for lanes in (8, 16)}
    for count in (1, 8):
        try:
            players[f"stable-baselines3, {count} env{'s' * (count > 1)}"] = stable_baselines3(count)
        except Exception as error:
            missing("stable-baselines3", error)
    rates = {name: [] for name in players}
    for _ in range(2 if quick else 6):
        for name, (go, _) in players.items():
            rates[name].append(go(4 if quick else 8))
    rate = {name: float(np.median(values)) for name, values in rates.items()}
    mine = max((name for name in rate if name.startswith("pydqn")), key=rate.get)
    for name, value in rate.items():
        if name != mine:
            target = (">=", 4.0) if name == "stable-baselines3, 1 env" else None
            row("loop, steps/s", f"{rate[mine]:.0f}", f"{name}: {value:.0f}", rate[mine] / value, target, mine)
    for name, (_, kept) in players.items():
        if name.startswith("pydqn"):
            kept[0].__exit__(None, None, None)
            kept[1].cleanup()


def stage_start(quick):
    """`pydqn train pong` to its first steps and out again, the second time."""
    spent = []
    for _ in range(2 if quick else 4):
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            command = [str(Path(sys.executable).parent / "pydqn"), "train", "pong", "--total-steps", "8", "--logdir", folder + "/run"]
            subprocess.run(command, check=True, capture_output=True)
            spent.append(time.perf_counter() - started)
    again = float(np.median(spent[1:]))
    row("start of `pydqn train pong`, second time", f"{again:.2f} s", f"the first: {spent[0]:.2f} s", again, ("<=", 5.0), "seconds, not a ratio")


STAGES = {name.removeprefix("stage_"): function for name, function in list(globals().items()) if name.startswith("stage_")}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", choices=[*STAGES, []], help="which (all)")
    parser.add_argument("--quick", action="store_true", help="small and rough, to see that it runs")
    parser.add_argument("-o", "--output", help="JSON file for the rows")
    arguments = parser.parse_args()
    print(f"{'stage':44s} {'pydqn':>15s} {'beside':>34s} {'ratio':>7s} {'target':>8s}")
    for name in arguments.stages or STAGES:
        STAGES[name](arguments.quick)
    if arguments.output:
        about = {"date": datetime.date.today().isoformat(), **environment(), "peers": versions()}
        Path(arguments.output).write_text(json.dumps({"about": about, "rows": ROWS}, indent=1) + "\n")


def versions():
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("stable-baselines3", "cpprb", "torchrl", "tianshou", "envpool", "opencv-python-headless", "ale-py"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


if __name__ == "__main__":
    main()

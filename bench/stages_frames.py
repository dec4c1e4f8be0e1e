"""Comparisons of emulators and preprocessing."""

from __future__ import annotations

import importlib
import time

import ale_py
import bench_preprocess as cases
import numpy as np
from ale_py import AtariVectorEnv, roms
from timing import Elsewhere, in_turns, missing, rates_in_turns, row, us

from pydqn import FrameReplay, _core, preset
from pydqn.envs.make import make_envs

NUM_ENVS, STEPS = 32, 40
ACTIONS = np.random.default_rng(0).integers(4, size=(64, NUM_ENVS))


def timed(play):
    """Turn a function that plays STEPS steps of all environments into one that returns emulator frames per second."""

    def rate():
        started = time.perf_counter()
        play()
        return 4 * NUM_ENVS * STEPS / (time.perf_counter() - started)

    return rate


def pydqn_envs():
    _core.keep_freed_memory()  # as a training run does
    envs = make_envs(preset("pong", env_id="breakout", num_envs=NUM_ENVS, noop_max_frames=0), NUM_ENVS, 0)
    replay = FrameReplay(100 * NUM_ENVS, num_envs=NUM_ENVS)
    everything, nothing = np.ones(NUM_ENVS, bool), np.zeros(NUM_ENVS, np.int64)
    slot = replay.next_slot()
    envs.reset(slot)
    replay.append(slot, nothing, nothing, ~everything, ~everything, everything)

    def play():
        for i in range(STEPS):
            envs.send(ACTIONS[i])
            slot = replay.next_slot()
            step = envs.recv(slot)
            replay.append(slot, ACTIONS[i], step.reward, step.terminated, step.truncated, step.first)

    for _ in range(3):  # fill the replay buffer once, so that the system has provided all of its memory
        play()
    return timed(play)


def stepping(env):
    env.reset()

    def play():
        for i in range(STEPS):
            env.step(ACTIONS[i])

    return timed(play)


def ale_vector_env():
    return stepping(AtariVectorEnv("breakout", NUM_ENVS))


def envpool():
    return stepping(importlib.import_module("envpool").make_gymnasium("Breakout-v5", num_envs=NUM_ENVS, num_threads=2))


def bare():
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    console = ale_py.ALEInterface()
    console.loadROM(roms.get_rom_path("breakout"))
    minimal = console.getMinimalActionSet()

    def play():
        for i in range(STEPS):
            for action in ACTIONS[i]:
                for _ in range(4):
                    console.act(minimal[action])
                if console.game_over():
                    console.reset_game()

    return timed(play)


def emulators(quick):
    """Breakout with random actions: emulator frames per second."""
    players = {"pydqn": Elsewhere(pydqn_envs)}
    aims = {
        "AtariVectorEnv, 84x84, stack of 4": (ale_vector_env, 1.2),
        "EnvPool, 84x84, stack of 4": (envpool, 1.35),
        "bare ALEInterface.act, one core": (bare, 1.8),
    }
    for name, (make, _) in aims.items():
        try:
            players[name] = Elsewhere(make)
        except Exception as error:
            missing(name, error)
    rate = rates_in_turns(players, 3 if quick else 15)
    for player in players.values():
        player.close()
    ours = rate.pop("pydqn")
    for name, value in rate.items():
        aim = (">=", aims[name][1])
        row("emulators, 32 environments, frames/s", f"{ours:,.0f}", f"{name}: {value:,.0f}", ours / value, aim)


def preprocess(quick):
    """Eight frames at a time, compared with the definitions in NumPy and OpenCV."""
    for name, target in (("resize_area", 0.3), ("crop_area", 0.15), ("crop_nearest", 0.5)):
        kernel, definition = cases.CASES[name]
        out = np.empty((cases.NUM_ENVS, 84, 84), np.uint8)
        times = in_turns({"ours": lambda f=kernel, o=out: f(o), "cv2": definition}, 20 if quick else 100, 5)
        np.testing.assert_array_equal(out, np.stack(definition()))
        ours, other = (times[key] / cases.NUM_ENVS for key in ("ours", "cv2"))
        row(f"{name}, one frame of 8", us(ours), f"NumPy and OpenCV: {us(other)}", ours / other, ("<=", target))

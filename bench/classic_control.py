"""pydqn's preset `dqn` and Stable-Baselines3's DQN with RL Baselines3 Zoo's tuned settings, for equally many steps.

    python bench/classic_control.py results/classic-control                 # all tasks and seeds, two runs at a time
    python bench/classic_control.py DIR --tasks Acrobot-v1 --seeds 0 --libraries pydqn

Each run becomes DIR/TASK/LIBRARY-SEED.json with its settings, learning curve and final score: the mean return of 100
episodes of the final network's greedy policy, with the same seeds for all. What is there already is not run again.
pydqn's own run folders are kept in --runs. At the end, a table of means and standard deviations over seeds is printed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import csv
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

EPISODES, FIRST_SEED = 100, 1_000_000  # of the final evaluation
STEPS = {"CartPole-v1": 50_000, "Acrobot-v1": 100_000, "MountainCar-v0": 120_000, "LunarLander-v3": 100_000}
# What differs from the preset `dqn`, beside the number of steps.
PYDQN: dict[str, dict[str, float | bool]] = {
    "CartPole-v1": {},
    "Acrobot-v1": {},
    "MountainCar-v0": {
        "gamma": 0.98,
        "learning_rate": 4e-3,
        "learning_rate_end": 4e-4,
        "train_period_steps": 2.0,
        "target_update_period": 300,
        "epsilon_decay_steps": 24_000,
        "epsilon_end": 0.07,
        # Nothing is found where the policy changes at every other step: with no reward but -1, it only dithers.
        "updates_in_a_row": 8,
        "num_envs": 1,
        "double": False,
        "replay_capacity_frames": 10_000,
    },
    "LunarLander-v3": {
        "learning_rate": 6.3e-4,
        "learning_rate_end": 6.3e-4,
        "epsilon_decay_steps": 12_000,
        "epsilon_end": 0.1,
        "replay_capacity_frames": 50_000,
    },
}
# hyperparams/dqn.yml of RL Baselines3 Zoo 2.x; LunarLander-v2's settings for v3.
_ZOO = {"learning_rate": 6.3e-4, "batch_size": 128, "buffer_size": 50_000, "learning_starts": 0, "gamma": 0.99}
_ZOO |= {"target_update_interval": 250, "train_freq": 4, "gradient_steps": -1}
_ZOO |= {"exploration_fraction": 0.12, "exploration_final_eps": 0.1}
ZOO = {
    "CartPole-v1": {
        **{"learning_rate": 2.3e-3, "batch_size": 64, "buffer_size": 100_000, "learning_starts": 1000, "gamma": 0.99},
        **{"target_update_interval": 10, "train_freq": 256, "gradient_steps": 128},
        **{"exploration_fraction": 0.16, "exploration_final_eps": 0.04},
    },
    "Acrobot-v1": _ZOO,
    "MountainCar-v0": {
        **{"learning_rate": 4e-3, "batch_size": 128, "buffer_size": 10_000, "learning_starts": 1000, "gamma": 0.98},
        **{"target_update_interval": 600, "train_freq": 16, "gradient_steps": 8},
        **{"exploration_fraction": 0.2, "exploration_final_eps": 0.07},
    },
    "LunarLander-v3": _ZOO,
}


def score(act, task):
    """Return the returns of episodes in which `act` chooses each action from (1, ...) observations."""
    import gymnasium
    import numpy as np

    env, returns = gymnasium.make(task), []
    for episode in range(EPISODES):
        obs, _ = env.reset(seed=FIRST_SEED + episode)
        total, over = 0.0, False
        while not over:
            obs, reward, terminated, truncated, _ = env.step(int(act(np.asarray(obs)[None])[0]))
            total, over = total + float(reward), terminated or truncated
        returns.append(total)
    env.close()
    return returns


def with_pydqn(task, seed, steps, runs):
    import pydqn

    settings = {"total_steps": steps, "learning_rate_decay_steps": steps, **PYDQN[task]}
    config = pydqn.preset("dqn", env_id=task, seed=seed, **settings, device="cpu", torch_threads=1)
    logdir = Path(runs) / task / f"seed-{seed}"
    pydqn.train(config, logdir)
    with open(logdir / "progress.csv") as file:
        rows = list(csv.DictReader(file))
    curve = [[int(row["steps"]), float(row["mean_return"])] for row in rows if row["mean_return"]]
    environment = json.loads((logdir / "environment.json").read_text())
    policy = pydqn.load_policy(logdir, weights="last")
    return {"preset": "dqn", **settings}, curve, score(lambda obs: policy(obs[:, None]), task), environment


def with_sb3(task, seed, steps, runs):
    import stable_baselines3
    import torch
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    curve = []

    class Curve(BaseCallback):
        def _on_step(self):
            if self.num_timesteps % 1_000 == 0 and self.model.ep_info_buffer:
                curve.append([self.num_timesteps, statistics.mean(one["r"] for one in self.model.ep_info_buffer)])
            return True

    torch.set_num_threads(1)
    policy = {"policy_kwargs": {"net_arch": [256, 256]}}
    model = stable_baselines3.DQN("MlpPolicy", make_vec_env(task), **ZOO[task], **policy, seed=seed, device="cpu")
    model.learn(steps, callback=Curve())
    versions = {"stable-baselines3": stable_baselines3.__version__, "torch": torch.__version__}
    return ZOO[task], curve, score(lambda obs: model.predict(obs, deterministic=True)[0], task), versions


def one(chosen):
    """Train and evaluate once, in this process; print a line of JSON."""
    (task,), (seed,), (library,) = chosen.tasks, chosen.seeds, chosen.libraries
    start = time.monotonic()
    settings, curve, returns, environment = {"pydqn": with_pydqn, "sb3": with_sb3}[library](
        task, seed, STEPS[task], chosen.runs
    )
    done = {"task": task, "library": library, "seed": seed, "steps": STEPS[task], "settings": settings}
    done |= {"seconds": round(time.monotonic() - start, 1), "mean": statistics.mean(returns), "returns": returns}
    print(json.dumps({**done, "curve": curve, "environment": environment}))


def finished(command, path):
    """Run a command whose last line is the result, and keep that, unless somebody else has meanwhile."""
    if path.exists():
        return
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"{path.name} failed:\n{done.stderr[-2000:]}", file=sys.stderr)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(done.stdout.splitlines()[-1] + "\n")
    print(f"{path}: {json.loads(path.read_text())['mean']:.1f}", flush=True)


def run_all(program, chosen, option, jobs):
    """Run `program` for each (task, seed, what is compared), which has an option; print a table over the seeds."""
    with concurrent.futures.ThreadPoolExecutor(chosen.at_once) as pool:
        for task, seed, kind in jobs:
            named = ["--tasks", task, "--seeds", str(seed), option, kind, "--runs", chosen.runs]
            command = [sys.executable, program, str(chosen.directory), *named, "--one"]
            pool.submit(finished, command, chosen.directory / task / f"{kind}-{seed}.json")
    print(f"\nmean return of {EPISODES} episodes: mean (standard deviation) over seeds, lowest seed")
    for task, kind in sorted({(task, kind) for task, _, kind in jobs}):
        paths = sorted((chosen.directory / task).glob(f"{kind}-*.json"))
        means = [json.loads(path.read_text())["mean"] for path in paths]
        if len(means) > 1:
            spread = f"{statistics.mean(means):.1f} ({statistics.stdev(means):.1f}), {min(means):.1f}"
            print(f"{task:20} {kind:18} {spread}, {len(means)} seeds")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="Where results are written.")
    parser.add_argument("--tasks", nargs="+", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--libraries", nargs="+", default=["pydqn", "sb3"], choices=["pydqn", "sb3"])
    parser.add_argument("--runs", default="runs/classic-control", help="Where pydqn's run folders are kept.")
    parser.add_argument("--at-once", type=int, default=2, help="How many runs at a time, one thread each.")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        one(chosen)
        return
    jobs = [(task, seed, library) for seed in chosen.seeds for task in chosen.tasks for library in chosen.libraries]
    run_all(__file__, chosen, "--libraries", jobs)


if __name__ == "__main__":
    main()

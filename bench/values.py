"""Time of one update with each value representation, by that with scalar values, of the same network.

    python bench/values.py                    # about 2 minutes, on a machine that is otherwise quiet
    python bench/values.py --rounds 1         # checks that it runs

Double DQN with the default number of atoms, bins, quantiles and levels; Munchausen and noisy layers with scalar values
and without double. Nature's network with batches of 32 frames stacks, two layers of 256 with batches of 128 vectors.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path

import numpy as np
from timing import in_turns

VARIANTS = {
    "scalar": {},
    "categorical": {"value": "categorical"},
    "hl_gauss": {"value": "hl_gauss"},
    "quantile": {"value": "quantile"},
    "implicit_quantile": {"value": "implicit_quantile"},
    "implicit_quantile, 8 levels": {
        **{"value": "implicit_quantile", "num_taus": 8, "num_target_taus": 8, "num_action_taus": 8},
    },
    "munchausen": {"munchausen": True, "double": False},
    "noisy": {},
    "dueling": {},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch")
    parser.add_argument("-o", "--output", help="JSON file for the rows, versions and machine")
    arguments = parser.parse_args()

    from pydqn._util.machine import bound_spinning

    bound_spinning()  # before torch is imported
    import torch

    torch.set_num_threads(arguments.threads)
    rows = []
    print(f"{'network':8s} {'variant':28s} {'update, ms':>11s} {'by scalar':>10s}")
    for name in ("nature", "mlp"):
        updates = {variant: update_of(name, variant) for variant in VARIANTS}
        seconds = in_turns(updates, arguments.rounds, 4)
        for variant, spent in seconds.items():
            ratio = spent / seconds["scalar"]
            rows.append({"network": name, "variant": variant, "milliseconds": spent * 1e3, "by_scalar": ratio})
            print(f"{name:8s} {variant:28s} {spent * 1e3:11.2f} {ratio:10.2f}", flush=True)
    if arguments.output:
        from pydqn.runs.provenance import provenance

        about = {"date": datetime.date.today().isoformat(), "threads": arguments.threads, **provenance()}
        Path(arguments.output).write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


def update_of(name, variant):
    """Return a function that makes one update, and checks that it learned something finite."""
    import torch

    from pydqn import FrameReplay, Learner, LearnerSettings
    from pydqn.learning.networks import make_network

    pixels = name == "nature"
    size, shape, stack = (32, (84, 84), 4) if pixels else (128, (8,), 1)
    settings = LearnerSettings(**{"double": True, **VARIANTS[variant], "batch_size": size})
    replay = FrameReplay(2_000, shape, stack=stack, dtype="uint8" if pixels else "float32", seed=0)
    generator = np.random.default_rng(0)
    for step in range(1_000):
        frame = generator.integers(0, 256, (1, *shape)) if pixels else generator.normal(size=(1, *shape))
        end = [step % 100 == 99]
        replay.append(frame.astype(replay.dtype), [step % 6], [float(step % 3 - 1)], end, [False], [step % 100 == 0])
    network = make_network(
        name,
        stack,
        shape,
        6,
        hidden_units=(512,) if pixels else (256, 256),
        dueling=variant == "dueling",
        settings=settings,
        noisy_sigma=0.5 if variant == "noisy" else 0.0,
    )
    learner = Learner(network, settings, torch.device("cpu"), replay.empty_batch(size))
    batch = replay.sample(size)

    def update():
        learner.update(batch)
        assert np.isfinite(learner.td_errors()).all()

    return update


if __name__ == "__main__":
    main()

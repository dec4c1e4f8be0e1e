"""Exported policies compute the policy's values without pydqn."""

from __future__ import annotations

import importlib.util

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

import pydqn
from pydqn.cli.main import main
from pydqn.evaluation import export as exporting
from pydqn.learning.records import MASKED

ONNX = pytest.param(
    "policy.onnx",
    marks=pytest.mark.skipif(
        not all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime"))),
        reason="needs pip install 'pydqn[export]'",
    ),
)
QUICK = {"device": "cpu", "torch_threads": 1, "hidden_units": (16,), "total_steps": 100, "learning_starts_steps": 40}


class Pair(gymnasium.Env):
    """An image and two numbers, with masks."""

    observation_space = spaces.Dict(image=spaces.Box(0, 255, (12, 12, 3), np.uint8), numbers=spaces.Box(-1, 1, (2,)))
    action_space = spaces.Discrete(3)

    def _seen(self):
        self._steps += 1
        image = self.np_random.integers(0, 256, (12, 12, 3), np.uint8)
        mask = np.array([1, self._steps % 2, 1])
        return {"image": image, "numbers": self.np_random.random(2, np.float32)}, {"action_mask": mask}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._steps = 0
        return self._seen()

    def step(self, action):
        seen, info = self._seen()
        return seen, 1.0, self._steps == 7, False, info


def values_of(path, inputs):
    if path.suffix == ".pt2":
        tensors = [torch.from_numpy(values) for values in inputs.values()]
        return torch.export.load(path).module()(*tensors).detach().numpy()
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(["values"], inputs)[0]


@pytest.mark.parametrize("name", ["policy.pt2", ONNX])
@pytest.mark.parametrize("kind", ["cartpole", "pong", "masked parts"])
def test_a_file_computes_the_values_of_the_policy(tmp_path, kind, name, capsys):
    if kind == "masked parts":
        run = pydqn.train(pydqn.preset("dqn", **QUICK, stack=2, dueling=True), tmp_path / "run", make_env=Pair).logdir
        options = {"make_env": Pair}
        written = pydqn.export(run, tmp_path / name, **options)
    else:
        given = {"replay_capacity_frames": 1_000} if kind == "pong" else {}
        run = pydqn.train(pydqn.preset(kind, **{**QUICK, **given}), tmp_path / "run").logdir
        options = {}
        assert main(["export", str(run), str(tmp_path / name)]) == 0
        printed = capsys.readouterr()
        assert "checked: its values differ from the policy's by at most" in printed.out
        assert "warning" not in printed.err
        written = pydqn.export(run, tmp_path / name)
    policy = pydqn.load_policy(run, device="cpu", precision="float32", **options)
    expected_inputs = ["obs"] if kind != "masked parts" else ["image", "vector", "action_mask"]
    assert list(written.inputs) == expected_inputs
    env = policy.env()
    obs = np.stack([env.reset(seed=seed)[0] for seed in range(5)])
    expected = np.maximum(policy.values(obs), MASKED)
    for batch in (1, 5):
        found = values_of(tmp_path / name, policy.parts(obs[:batch]))
        np.testing.assert_allclose(found, expected[:batch], rtol=1e-3, atol=1e-3)
    if kind == "masked parts":
        assert (found[:, 1] > MASKED).all()
        obs, *_ = env.step(0)
        assert values_of(tmp_path / name, policy.parts(obs))[0, 1] == MASKED


@pytest.mark.parametrize("name", ["policy.pt2", ONNX])
def test_a_file_that_computes_something_else_is_not_written(tmp_path, name, monkeypatch):
    run = pydqn.train(pydqn.preset("cartpole", **QUICK), tmp_path / "run").logdir
    (tmp_path / name).write_bytes(b"before")
    original = exporting._program
    monkeypatch.setattr(exporting, "_program", lambda network, inputs: original(_Other(network), inputs))
    with pytest.raises(RuntimeError, match=r"^export: the file computes other values than the policy \(by up to 0\.5"):
        pydqn.export(run, tmp_path / name)
    assert (tmp_path / name).read_bytes() == b"before"


class _Other(torch.nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, obs):
        return self.network(obs) + 0.5


def test_wrong_arguments(tmp_path):
    run = pydqn.train(pydqn.preset("cartpole", **QUICK), tmp_path / "run").logdir
    with pytest.raises(ValueError, match=r"^export: expected a name that ends in \.onnx or \.pt2, got 'policy\.pt'"):
        pydqn.export(run, "policy.pt")
    with pytest.raises(ValueError, match="^export: there is no folder 'none'"):
        pydqn.export(run, "none/policy.pt2")
    with pytest.raises(ValueError, match="^run: 'nowhere' is not the folder of a run"):
        pydqn.export("nowhere", tmp_path / "policy.pt2")

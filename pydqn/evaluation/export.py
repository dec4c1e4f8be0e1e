"""Exporting a run's policy to ONNX or `torch.export`, for programs without pydqn."""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pydqn._util.files import atomic_write
from pydqn.evaluation.loaded import RunPolicy, load_policy
from pydqn.learning.custom import PartsNetwork
from pydqn.learning.records import MASKED

_EXAMPLES = 64  # observations on which the file is compared with the policy
_TOLERANCE = 1e-3  # of a value, relative to the largest one
_SUFFIXES = (".onnx", ".pt2")
_Inputs = dict[str, Tensor]
_Values = Callable[[_Inputs], Tensor]


class Exported(NamedTuple):
    """What `export` has written."""

    path: Path
    inputs: dict[str, str]  # dtype and shape, by name
    num_actions: int
    largest_difference: float  # of a value, from the policy's, on observations of played episodes


def export(
    run: str | os.PathLike[str], path: str | os.PathLike[str], *, weights: str | None = None, **options: Any
) -> Exported:
    """Write a run's policy to a file, and compare the file with the policy on observations of played episodes.

    The input "obs" is (B, stack, *frame_shape) as `policy.env()` gives it, for any B. Observations of several parts,
    and action masks, are several inputs, as `policy.parts(obs)` gives them. The output "values" is (B, num_actions)
    float32; masked actions have the lowest float32.

    Args:
        run: folder of the run.
        path: a name that ends in .onnx, or in .pt2 for `torch.export.load`.
        weights: see `load_policy`.
        options: make_env, network and fields of the run's `Config`, see `load_policy`.

    Raises:
        ValueError: another ending, no such folder, or no such run.
        RuntimeError: packages are missing (the message has the pip command); or the network cannot be exported, or its
            file computes other values, and nothing is written.
    """
    target = Path(path)
    if target.suffix not in _SUFFIXES:
        raise ValueError(f"export: expected a name that ends in .onnx or .pt2, got {str(path)!r}")
    if not target.absolute().parent.is_dir():
        raise ValueError(f"export: there is no folder {str(target.parent)!r}")
    if target.suffix == ".onnx":
        _require_onnx()
    policy = load_policy(run, weights=weights, **{"device": "cpu", "precision": "float32", **options})
    obs = _examples(policy)
    inputs = {name: torch.from_numpy(values) for name, values in policy.parts(obs).items()}
    network = policy.network if list(inputs) == ["obs"] else PartsNetwork(policy.network).eval()
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / target.name
        with _quiet():
            values_of = (_to_onnx if target.suffix == ".onnx" else _to_pt2)(network, inputs, part)
            difference = _difference(policy, obs, values_of, inputs)
        with atomic_write(target) as file:
            file.write(part.read_bytes())
    described = {name: _described(values) for name, values in inputs.items()}
    return Exported(target, described, policy.num_actions, difference)


def _described(values: Tensor) -> str:
    shape = ", ".join(["batch", *map(str, values.shape[1:])])
    return f"{str(values.dtype).removeprefix('torch.')} ({shape})"


def _examples(policy: RunPolicy) -> NDArray[Any]:
    """Return observations of episodes that the policy plays with epsilon 0.1."""
    env = policy.env()
    try:
        obs, _ = env.reset(seed=0)
        found = [obs]
        while len(found) < _EXAMPLES:
            obs, _, terminated, truncated, _ = env.step(policy(obs, 0.1))
            found.append(env.reset()[0] if terminated or truncated else obs)
    finally:
        env.close()
    return np.stack(found)


def _difference(policy: RunPolicy, obs: NDArray[Any], values_of: _Values, inputs: _Inputs) -> float:
    """Return the largest difference of a value, of all observations together and of some alone."""
    expected = torch.from_numpy(np.maximum(policy.values(obs), MASKED))
    alone = [values_of({name: values[i : i + 1] for name, values in inputs.items()}) for i in range(3)]
    with torch.no_grad():
        found, expected = torch.cat([values_of(inputs), *alone]), torch.cat([expected, expected[:3]])
    difference = (found - expected).abs().max().item() if found.shape == expected.shape else torch.inf
    allowed = expected[expected != MASKED]
    scale = max(1.0, allowed.abs().max().item()) if len(allowed) else 1.0
    if not difference <= _TOLERANCE * scale:
        raise RuntimeError(f"export: the file computes other values than the policy (by up to {difference:g})")
    return float(difference)


def _to_pt2(network: nn.Module, inputs: _Inputs, path: Path) -> _Values:
    program = _program(network, inputs)
    torch.export.save(program, path)
    module = program.module()
    return lambda batch: module(*batch.values())


def _to_onnx(network: nn.Module, inputs: _Inputs, path: Path) -> _Values:
    import onnxruntime

    options: dict[str, Any] = {"dynamo": True, "external_data": False, "verbose": False}
    onnx = torch.onnx.export(_program(network, inputs), input_names=[*inputs], output_names=["values"], **options)
    assert onnx is not None
    onnx.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def values_of(batch: _Inputs) -> Tensor:
        return torch.from_numpy(session.run(["values"], {name: value.numpy() for name, value in batch.items()})[0])

    return values_of


def _program(network: nn.Module, inputs: _Inputs) -> torch.export.ExportedProgram:
    try:
        batch = torch.export.Dim("batch")
        dynamic: Any = tuple({0: batch} for _ in inputs)
        dynamic = (dynamic,) if isinstance(network, PartsNetwork) else dynamic  # of `*inputs`
        return torch.export.export(
            network, tuple(values[:3] for values in inputs.values()), dynamic_shapes=dynamic, strict=False
        )
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        raise RuntimeError(f"export: PyTorch cannot export the network ({type(error).__name__}: {first})") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what PyTorch's exporter says about packages that are not needed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _require_onnx() -> None:
    try:
        import onnx
        import onnxruntime
        import onnxscript
    except ImportError as error:
        raise RuntimeError(f"export: .onnx files need pip install 'pydqn[export]' ({error})") from None
    del onnx, onnxruntime, onnxscript

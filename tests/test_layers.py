"""The house: rooms import only rooms below them, stay small, and unpickle nothing."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pydqn"
LAYERS = [
    {"kernels"},
    {
        "_core",
        "checked",
        "checks",
        "colours",
        "config",
        "encoder",
        "files",
        "envs",
        "losses",
        "machine",
        "orders",
        "pixels",
        "preprocess",
        "results",
        "scores",
        "seeds",
        "signals",
        "step_kernels",
        "transfers",
    },
    {
        "atari",
        "checkpoint",
        "entries",
        "locks",
        "logs",
        "networks",
        "optimizers",
        "chunks",
        "recording",
        "schedules",
        "spaces",
        "stopping",
    },
    {"best", "ids", "stored"},
    {"tasks"},
    {"envs", "films", "plots", "policies", "presets", "replay", "resuming"},
    {"device_replay", "evaluation", "learner", "transitions"},
    {"runs", "streams", "values"},
    {"tabular"},
    {"training", "options"},
    {"adapters", "benchmarks"},
    {"cli"},
]
ROOMS = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def imports(path):
    """Yield the dotted names that a room imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import by the full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer_of(room):
    found = [number for number, layer in enumerate(LAYERS) if room in layer]
    assert found, f"{room} has no layer"
    return found[0]


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: path.stem)
def test_rooms_import_only_lower_rooms(path):
    own = layer_of(path.relative_to(PACKAGE).parts[0].removesuffix(".py"))
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "pydqn" and parts[1] != "__version__":
            of_one = parts[:2] == ["pydqn", "adapters"] and parts[2] == f"_{path.stem}"  # a part of the same adapter
            assert of_one or layer_of(parts[1]) < own, f"{path.name} imports {name}"


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: path.stem)
def test_foreign_packages_stay_in_their_rooms(path):
    homes = {
        "gymnasium": {"checked", "cleanrl", "envs", "gymnasium", "ids", "sb3", "spaces"},
        "ale_py": {"atari"},
        "argparse": {"cli", "options"},
        "matplotlib": {"plots"},
        "stable_baselines3": {"sb3"},
        "torchrl": {"torchrl"},
        "tensordict": {"torchrl"},
        "tianshou": {"tianshou"},
    }
    for name in imports(path):
        home = homes.get(name.split(".")[0])
        assert home is None or path.stem.removeprefix("_") in home, f"{path.name} imports {name}"
        assert name.split(".")[0] not in {"pickle", "cv2", "dill", "joblib", "marshal", "shelve"}, (
            f"{path.name} imports {name}"
        )


def test_nothing_prints_or_exits_outside_the_command_line():
    for path in ROOMS:
        if path.stem != "cli":
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                    assert node.func.id not in ("print", "exit", "input"), f"{path.name}:{node.lineno}"


def test_nothing_is_unpickled():
    for path in [*ROOMS, *PACKAGE.parent.glob("csrc/*")]:
        text = path.read_text()
        for word in ("pickle.load", "pickle.dump", "torch.load(", "np.load(", "allow_pickle", "eval("):
            assert word not in text.replace(".eval(", ""), f"{path.name}: {word}"


def test_no_room_is_over_400_lines():
    sources = [*ROOMS, *ROOT.glob("csrc/*"), *ROOT.glob("bench/*.py"), *ROOT.glob("tests/*.py")]
    assert len(sources) > 20
    for path in sources:
        assert len(path.read_text().splitlines()) <= 400, path.name


def test_the_core_knows_no_python():
    for path in ROOT.glob("csrc/*"):
        if path.name not in ("bindings.cpp", "arrays.hpp"):
            assert "pybind" not in path.read_text()
            assert "Python.h" not in path.read_text()


def test_files_beside_the_code_are_packed():
    """What is neither Python nor compiled is only installed when it is named."""
    named = re.search(r"^pydqn = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE).group(1)
    beside = {path.name for path in PACKAGE.iterdir() if path.suffix not in (".py", ".so", ".pyd") and path.is_file()}
    assert {"player.html", "py.typed"} <= beside
    assert beside == set(re.findall(r'"([^"]+)"', named))


def test_the_replay_alone_needs_neither_torch_nor_emulators():
    program = (
        "import sys, pydqn\n"
        "pydqn.FrameReplay(10)\n"
        "print([m for m in ('torch', 'gymnasium', 'ale_py', 'matplotlib', 'numba') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"

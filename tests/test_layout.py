"""The structure of the project: packages import only lower packages, no import cycles, nothing is unpickled."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pydqn"
# The one table of the order. A package imports itself and those on lower lines. CONTRIBUTING.md quotes it.
ORDER = """
_util < config < published < preprocess < replay, envs < presets < learning < runs < evaluation < plotting < training
< adapters < cli
""".strip().replace("\n", " ")
RANKS = {name: rank for rank, names in enumerate(ORDER.split(" < ")) for name in names.split(", ")}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name not in ("__init__.py", "__main__.py"))
FOREIGN = {  # where other libraries may be imported
    "gymnasium": (
        "envs",
        "evaluation/framed",
        "adapters/_common",
        "adapters/cleanrl",
        "adapters/gymnasium",
        "adapters/sb3",
    ),
    "ale_py": ("envs/atari",),
    "argparse": ("cli",),
    "matplotlib": ("plotting/figure", "plotting/curves", "plotting/values"),
    "stable_baselines3": ("adapters/sb3",),
    "torchrl": ("adapters/torchrl",),
    "tensordict": ("adapters/torchrl",),
    "tianshou": ("adapters/tianshou", "adapters/_tianshou"),
}
UNSAFE = {"pickle", "cv2", "dill", "joblib", "marshal", "shelve"}


def name_of(path):
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


def imports(path):
    """Yield the dotted names that a module imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import by the full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_packages_import_only_lower_packages(path):
    own = name_of(path).split("/")[0]
    assert own in RANKS, f"{own} is not in the table"
    for name in imports(path):
        top, *rest = name.split(".")
        if top == "pydqn" and rest[0] not in ("__version__", "_core", own):
            assert RANKS[rest[0]] < RANKS[own], f"{name_of(path)} imports {name}"


def test_modules_have_no_import_cycles():
    """Not even one that an import inside a function hides."""
    names = {name_of(path).replace("/", "."): path for path in MODULES}
    graph = {}
    for own, path in names.items():
        imported = [name.removeprefix("pydqn.") for name in imports(path) if name.startswith("pydqn.")]
        graph[own] = {other for other in names for name in imported if name == other or name.startswith(f"{other}.")}
    assert sum(map(len, graph.values())) > 100
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError


def test_contributing_quotes_the_order():
    assert ORDER in (ROOT / "CONTRIBUTING.md").read_text()


def test_all_packages_are_installed():
    packages = {".".join(("pydqn", *path.parent.relative_to(PACKAGE).parts)) for path in MODULES}
    listed = re.search(r"^packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)[1]
    assert set(re.findall(r'"([^"]+)"', listed)) == packages


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_other_libraries_are_imported_in_their_places(path):
    for name in imports(path):
        top = name.split(".")[0]
        assert top not in UNSAFE, f"{name_of(path)} imports {name}"
        if top in FOREIGN:
            assert name_of(path).startswith(FOREIGN[top]), f"{name_of(path)} imports {name}"


def test_nothing_prints_or_exits_outside_the_command_line():
    for path in MODULES:
        if not name_of(path).startswith("cli/"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                    assert node.func.id not in ("print", "exit", "input"), f"{path.name}:{node.lineno}"


# A run sends the environment's constructor, which may be defined in a notebook, to the processes that it has started.
MESSAGES = {"workers.py": ("cloudpickle.dumps(spec)", "cloudpickle.loads(start.spec)")}


def test_no_file_is_unpickled():
    for path in [*MODULES, *ROOT.glob("csrc/*")]:
        text = path.read_text()
        for message in MESSAGES.get(path.name, ()):
            assert text.count(message) == 1
            text = text.replace(message, "")
        for word in ("pickle.load", "pickle.dump", "torch.load(", "np.load(", "allow_pickle", "eval("):
            assert word not in text.replace(".eval(", ""), f"{path.name}: {word}"


def test_the_core_knows_no_python():
    for path in ROOT.glob("csrc/*"):
        if path.name not in ("bindings.cpp", "arrays.hpp"):
            assert "pybind" not in path.read_text()
            assert "Python.h" not in path.read_text()


def test_files_beside_the_code_are_packed():
    """What is neither Python nor compiled is only installed when it is named."""
    text = (ROOT / "pyproject.toml").read_text()
    named = set(re.findall(r'"([^"]+)"', text.split("[tool.setuptools.package-data]")[1].split("[tool.ruff]")[0]))
    beside = {
        p.name
        for p in PACKAGE.rglob("*")
        if p.is_file() and p.suffix not in (".py", ".so", ".pyd", ".pyc", ".nbi", ".nbc")
    }
    assert {"player.html", "py.typed"} <= beside
    assert beside <= named


def test_the_replay_alone_needs_neither_torch_nor_emulators():
    program = (
        "import sys, pydqn\n"
        "pydqn.FrameReplay(10)\n"
        "print([m for m in ('torch', 'gymnasium', 'ale_py', 'matplotlib', 'numba') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_programs_import_what_exists():
    """Scripts and benchmarks that no other test runs."""
    files = [path for folder in ("bench", "examples", "scripts") for path in sorted((ROOT / folder).rglob("*"))]
    programs = [path for path in files if path.is_file() and (path.suffix == ".py" or _is_python(path))]
    assert len(programs) > 30
    for path in programs:
        for name in imports(path):
            if name.split(".")[0] == "pydqn":
                module, _, attribute = name.rpartition(".")
                found = importlib.import_module(module or name)
                assert not module or hasattr(found, attribute) or importlib.util.find_spec(name), f"{path}: {name}"


def _is_python(path):
    return path.read_bytes().startswith(b"#!/usr/bin/env python")

"""`--import`: environments of the user's own from the command line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import gymnasium
import pytest

from pydqn.cli.main import main
from pydqn.runs.layout import load_run

MODULE = """
import gymnasium
import numpy as np

class Walk(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)
    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, render_mode=None):
        self.render_mode, self.steps = render_mode, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.np_random.random(3, np.float32), {}

    def step(self, action):
        self.steps += 1
        return self.np_random.random(3, np.float32), 1.0, self.steps == 7, False, {}

    def render(self):
        return np.full((20, 30, 3), 9 * self.steps, np.uint8)

gymnasium.register("My-v0", entry_point=Walk)
"""
QUICK = ["--total-steps", "60", "--device", "cpu", "--torch-threads", "1", "--hidden-units", "8", "--logdir", "run"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a module that only it has, as for the installed command (no folder is on the path)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", os.getcwd())])
    (tmp_path / "my_walks.py").write_text(MODULE)
    yield tmp_path
    sys.modules.pop("my_walks", None)
    gymnasium.registry.pop("My-v0", None)


def forget():
    """Do what a new process does."""
    sys.modules.pop("my_walks")
    gymnasium.registry.pop("My-v0")


@pytest.mark.parametrize("named", [["--import", "my_walks", "--env-id", "My-v0"], ["--env-id", "my_walks:My-v0"]])
def test_every_command_takes_the_users_module(folder, capsys, named):
    assert main(["train", "cartpole", *named, *QUICK]) == 0
    printed = capsys.readouterr()
    assert "(pydqn play --import my_walks run --record episode.mp4" in printed.out
    assert "environment My-v0 (Gymnasium)" in printed.err
    assert load_run("run").env_id == "My-v0"
    assert json.loads((folder / "run" / "environment.json").read_text())["registered_by"] == "my_walks"
    for command in (["evaluate", "run", "--episodes", "2"], ["play", "run", "--record", "one.gif"]):
        forget()
        assert main(command) == 2
        error = capsys.readouterr().err
        assert error.startswith("pydqn: error: env_id: Gymnasium knows no 'My-v0', which it knew when the run was made")
        assert "--import my_walks" in error
        assert main([*command, "--import", "my_walks"]) == 0
    forget()
    resumed = ["train", "--resume", "run", "--total-steps", "90"]
    assert main(resumed) == 2
    assert "--import my_walks" in capsys.readouterr().err
    assert main([*resumed, "--import", "my_walks"]) == 0
    assert main(["plot", "run", "-o", "curve.png"]) == 0  # needs no environment


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("nowhere", r"import: nowhere cannot be imported \(ModuleNotFoundError: No module named 'nowhere'\)"),
        ("./my_walks.py", r"import: expected the name of a module, such as my_package.my_module, got './my_walks.py'"),
        ("broken", r"import: broken cannot be imported \(ZeroDivisionError: division by zero\)"),
        ("leaves", r"import: leaves cannot be imported \(SystemExit: 3\)"),
    ],
)
def test_a_module_that_cannot_be_imported_is_one_line(folder, capsys, module, message):
    (folder / "broken.py").write_text("1 / 0")
    (folder / "leaves.py").write_text("raise SystemExit(3)")
    assert main(["train", "cartpole", "--import", module, *QUICK]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.match(f"pydqn: error: {message}", error)
    assert not (folder / "run").exists()


def test_a_file_never_imports_a_module(folder, capsys):
    assert main(["train", "cartpole", "--import", "my_walks", "--env-id", "My-v0", *QUICK]) == 0
    forget()
    (folder / "my_walks.py").write_text("open('imported', 'w')")
    hint = folder / "run" / "environment.json"
    for module in ("my_walks", "my_walks; import os", 3, None, ["my_walks"]):
        hint.write_text(json.dumps({"registered_by": module}))
        assert main(["evaluate", "run"]) == 2
        assert "Gymnasium knows no 'My-v0'" in capsys.readouterr().err
    hint.unlink()
    assert main(["evaluate", "run"]) == 2
    assert not (folder / "imported").exists()
    gymnasium.registry.pop("My-v0", None)
    sys.modules["my_walks"] = None  # for the fixture


def test_as_a_process(tmp_path):
    """Without the current folder on Python's path, as for the installed command."""
    (tmp_path / "my_walks.py").write_text(MODULE)
    program = "import sys; sys.path.remove(''); from pydqn.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "train", "cartpole", "--env-id", "my_walks:My-v0", *QUICK]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "done: 60 steps" in done.stdout

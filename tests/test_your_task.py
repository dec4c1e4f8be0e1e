"""docs/your-task.md, block by block in its order, in an empty folder."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from pydqn import Config

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "your-task.md").read_text()
BLOCK = re.compile(r"<!-- (file: (?P<name>\S+)|run) -->\n```(?P<language>\w*)\n(?P<text>.*?)```", re.DOTALL)


def test_every_block_is_marked():
    assert PAGE.count("\n```") == 2 * len(BLOCK.findall(PAGE)) > 10


def test_the_page_works_as_printed(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def run(*command):
        out = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert out.returncode == 0, (command, out.stderr)
        return out.stdout + out.stderr

    program = ""
    for block in BLOCK.finditer(PAGE):
        text = block["text"]
        if block["name"]:
            (tmp_path / block["name"]).write_text(text)
        elif block["language"] == "python":
            program += text
        else:
            for line in text.splitlines():
                name, *words = shlex.split(line)
                assert name == "pydqn"
                threads = ["--torch-threads", "1", "--device", "cpu"] if words[0] == "train" else []
                run(sys.executable, "-m", "pydqn", *words, *threads)
    for name in ("corridor.gif", "corridor.png", "corridor.pt2"):
        assert (tmp_path / name).stat().st_size > 0
    about = json.loads((tmp_path / "runs" / "corridor" / "environment.json").read_text())
    assert about["registered_by"] == "corridor"
    assert about["inputs"] == "10 float32 as they are, actions masked"
    program += "\nprint(returns, action, values)\n"
    (tmp_path / "program.py").write_text(program)
    printed = run(sys.executable, "program.py")
    returns, action, values = re.search(r"\[([\d., ]+)\] (\d+) \[(.*?)\]", printed, re.DOTALL).groups()
    assert set(map(float, returns.split(","))) == {1.0}
    assert values.count("-inf") == 8
    assert int(action) in (0, 1)


def test_options_exist():
    others = {"import", "record", "resume", "logdir", "episodes"}
    options = set(re.findall(r"--([a-z][a-z-]+)", re.sub(r"<!--|-->", "", PAGE))) - others
    assert {"image-channels", "env-workers", "init-weights"} <= options
    assert {option.removeprefix("no-").replace("-", "_") for option in options} <= set(Config.__dataclass_fields__)

"""CleanRL's tests of its DQN scripts, each with our buffer's import (see `scripts/upstream-tests`)."""

from __future__ import annotations

import re
import shutil
from importlib.metadata import version
from importlib.util import find_spec

PACKAGES, NEEDS, TESTS_IN = ["gymnasium", "torch"], ["tyro", "tensorboard"], "tests"
EXPECTED_TO_FAIL: dict[str, str] = {}
# CleanRL pins Gymnasium 0.29. Later ones name wrappers otherwise, and register no Atari games by themselves.
MAY_FAIL = {"*test_atari_gymnasium.py::*": "needs Gymnasium 0.29"} if int(version("gymnasium")[0]) else {}
if find_spec("huggingface_hub") is None:
    MAY_FAIL["*::test_qdagger*"] = "needs huggingface_hub"
_THEIRS = re.compile(r"from (cleanrl_utils|stable_baselines3\.common)\.buffers import ReplayBuffer\n")
_CLASS = re.compile(r"class PrioritizedReplayBuffer:\n(?:(?: .*)?\n)+?(?=\S)")


def paths(root):
    """Return where the scripts import from."""
    return [str(root)]


def prepared(checkout, scratch):
    """Return a copy of the checkout in which the scripts, each of which a test starts, import our buffer."""
    root = scratch / "cleanrl"
    shutil.copytree(checkout, root, ignore=shutil.ignore_patterns(".git", "docs", "benchmark"))
    for path in (root / "cleanrl").glob("*.py"):
        # Not every version of Gymnasium knows Atari games unless their module is imported.
        ours = "import ale_py\nfrom pydqn.adapters.cleanrl import {}\n"
        text = _THEIRS.sub(ours.format("ReplayBuffer"), path.read_text())
        path.write_text(_CLASS.sub(ours.format("PrioritizedReplayBuffer") + "\n\n", text))
    return root


def selection(root):
    """Return the arguments with which pytest chooses the tests of the checkout `root`."""
    tests = [root / "tests" / name for name in ("test_atari_gymnasium.py", "test_classic_control_gymnasium.py")]
    return [*map(str, tests), "-k", "(dqn or c51 or rainbow) and not eval"]


def substitute():
    """Do nothing: `prepared` has changed the scripts."""

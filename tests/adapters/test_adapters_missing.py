"""Without the other library, an adapter says what to install."""

from __future__ import annotations

import importlib
import sys

import pytest


@pytest.mark.parametrize(
    ("adapter", "package"), [("sb3", "stable_baselines3"), ("torchrl", "torchrl"), ("tianshou", "tianshou")]
)
def test_what_is_missing_is_named(adapter, package, monkeypatch):
    monkeypatch.delitem(sys.modules, f"pydqn.adapters.{adapter}", raising=False)
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(ImportError, match=r"pip install 'pydqn\[adapters\]'"):
        importlib.import_module(f"pydqn.adapters.{adapter}")

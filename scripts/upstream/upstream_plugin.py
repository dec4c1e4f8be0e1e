"""The pytest plugin of `scripts/upstream-tests`: puts our buffer in place and records the result of each test."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path

import pytest

from pydqn.replay.transitions import TransitionReplay

made = 0  # buffers of ours


def pytest_configure(config):
    """Before any test is imported."""
    importlib.import_module(os.environ["PYDQN_UPSTREAM"]).substitute()
    init = TransitionReplay.__init__

    def counted(self, *args, **settings):
        global made
        made += 1
        init(self, *args, **settings)

    TransitionReplay.__init__ = counted


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item, nextitem):
    """Write a line for each test."""
    before = made
    yield
    rows = item.stash.get(ROWS, [])
    failed = [row for row in rows if row.failed]
    skipped = [row for row in rows if row.skipped]
    outcome = "failed" if failed else "skipped" if skipped else "passed"
    text = str((failed or skipped or rows)[-1].longrepr or "").strip().splitlines()
    row = {"test": item.nodeid, "outcome": outcome, "used": made > before, "reason": text[-1] if text else ""}
    with Path(os.environ["PYDQN_UPSTREAM_REPORT"]).open("a") as file:
        file.write(json.dumps(row) + "\n")


ROWS = pytest.StashKey()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Keep the reports of a test's setup, call and end."""
    result = yield
    item.stash.setdefault(ROWS, []).append(result.get_result())

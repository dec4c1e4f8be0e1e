"""The progress bar."""

from __future__ import annotations

import dataclasses
import re
import time

import pytest

from pydqn.cli.progress import ProgressBar
from pydqn.runs.logs import Report


def report_at(steps):
    numbers = {field.name: 0.0 for field in dataclasses.fields(Report)}
    return Report(**{**numbers, "steps": steps})


@pytest.mark.parametrize("start", [0, 900_000])
def test_the_time_left_follows_from_the_steps_of_this_process(capsys, start):
    """A run that is resumed near its end has not done its first steps in no time."""
    with ProgressBar(1_000_000) as bar:
        bar.show(report_at(start + 1_000))
        time.sleep(0.3)
        bar.show(report_at(start + 2_000))
    lines = capsys.readouterr().err.split("\r")
    minutes, seconds = map(int, re.search(r"<(\d+):(\d+)\]", lines[-1]).groups())
    least = 0.3 * (998_000 - start) / 1_000  # this machine may sleep longer
    assert 60 * minutes + seconds >= least - 1

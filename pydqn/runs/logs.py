"""The logs of a run: CSV files and TensorBoard events."""

from __future__ import annotations

import csv
import io
import math
import os
from array import array
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from pydqn._util.files import atomic_write, named_errors
from pydqn.runs.layout import EPISODES, PROGRESS

if TYPE_CHECKING:
    from pydqn.learning.statistics import Statistics

_LARGEST_SHOWN = 1e20  # TensorBoard's histograms end there
# TensorBoard shows each group as one row of charts.
GROUPS = {
    "episodes": (
        "mean_return",
        "last_return",
        "mean_length_steps",
        "last_length_steps",
        "episodes",
        "evaluation_return",
    ),
    "learning": ("loss", "mean_q", "max_q", "grad_norm", "epsilon"),
    "process": ("cpu_percent", "memory_mb", "memory_percent"),
    "speed": ("frames_per_second", "updates_per_second", "frames", "updates", "seconds"),
}
_EPISODE_COLUMNS = ["episode", "steps", "env_index", "return", "length_steps"]
_RENAMED_COLUMNS = {"lane": "env_index"}  # of episodes.csv: the name in older runs, and now


@dataclass(frozen=True)
class Report:
    """The state of a run at one time. Fields that have no value yet are NaN."""

    seconds: float  # since the first step
    steps: int  # agent steps, over all environments
    frames: int  # emulator frames: steps times frame-skip
    updates: int
    episodes: int
    epsilon: float
    mean_return: float  # of the last `mean_episodes` whole episodes
    last_return: float
    mean_length_steps: float
    last_length_steps: float
    loss: float
    mean_q: float
    max_q: float
    grad_norm: float
    frames_per_second: float  # since the report before
    updates_per_second: float
    evaluation_return: float  # mean of the latest evaluation
    cpu_percent: float  # of this process, since the report before; 100 is one core
    memory_mb: float  # of this process, resident
    memory_percent: float  # of the machine's

    @property
    def scalars(self) -> dict[str, float]:
        """All fields by name."""
        return asdict(self)


class RunLog:
    """Writes a run's `progress.csv`, `episodes.csv` and TensorBoard events.

    Args:
        logdir: folder of the run.
        steps: of the checkpoint that a run was resumed from: later rows are dropped, as the run will write them again.
        episodes: the number of episodes that had ended then.
    """

    def __init__(self, logdir: Path, steps: int = 0, episodes: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        progress = list(Report.__annotations__)
        self._progress_file, self._progress = _open(logdir / PROGRESS, progress, "steps", steps)
        self._episodes_file, self._episodes = _open(logdir / EPISODES, _EPISODE_COLUMNS, "episode", episodes)
        with named_errors(logdir):
            self._board = SummaryWriter(str(logdir), purge_step=steps + 1 if steps else None)

    def report(self, report: Report, statistics: Statistics) -> None:
        """Add one row, visible to readers at once, and histograms of the statistics' samples."""
        self._progress.writerow({name: _text(value) for name, value in report.scalars.items()})
        self._flush()
        with self._board_errors():
            for group, names in GROUPS.items():
                for name in names:
                    value = getattr(report, name)
                    if not math.isnan(value):
                        self._board.add_scalar(f"{group}/{name}", value, report.steps)
            for name, values in statistics.samples.items():
                if values.size and np.abs(values).max() < _LARGEST_SHOWN:  # (false for NaN)
                    self._board.add_histogram(f"learning/{name}", values, report.steps)

    def episode(self, episode: int, steps: int, env_index: int, total: float, length: int, epsilon: float) -> None:
        """Add an episode that ended when the run had made `steps` steps."""
        row = (episode, steps, env_index, _exact(total), length)
        self._episodes.writerow(dict(zip(_EPISODE_COLUMNS, row, strict=True)))
        with self._board_errors():
            for name, value in (("return", total), ("length_steps", length), ("epsilon", epsilon)):
                self._board.add_scalar(f"each episode/{name}", value, steps)

    def sync(self) -> None:
        """Flush all rows to the disk: a checkpoint counts them, so a resumed run does not write them again."""
        self._flush()
        for file in (self._progress_file, self._episodes_file):
            with named_errors(Path(file.name)):
                os.fsync(file.fileno())
        with self._board_errors():
            self._board.flush()

    def close(self) -> None:
        """Close the files."""
        with ExitStack() as files:  # closes all, even if closing one fails
            files.enter_context(self._board_errors())
            files.callback(self._board.close)
            for file in (self._episodes_file, self._progress_file):
                files.enter_context(named_errors(Path(file.name)))
                files.callback(file.close)

    def _board_errors(self) -> AbstractContextManager[None]:
        """Name the folder in errors of TensorBoard, whose own thread writes: they are raised by some later call."""
        return named_errors(Path(self._board.log_dir))

    def _flush(self) -> None:
        for file in (self._progress_file, self._episodes_file):
            with named_errors(Path(file.name)):
                file.flush()


def read_returns(logdir: Path, episodes: int) -> array[float]:
    """Return the returns of a run's first episodes, up to where episodes.csv ends or is damaged."""
    returns = array("d")
    with suppress(KeyError, ValueError):  # a damaged header or field: the caller sees that some are missing
        for row in _rows(logdir / EPISODES, "episode", episodes):
            returns.append(float(row["return"] or "nan"))
    return returns


def _rows(path: Path, column: str, most: int) -> Iterator[dict[str, str]]:
    """Yield the rows of a CSV until `column` exceeds `most` or a row is damaged."""
    if not most or not path.is_file():
        return
    with path.open(newline="") as file, suppress(csv.Error, KeyError, ValueError):  # after a crash, or an edit
        reader = csv.DictReader(file)
        reader.fieldnames = [_RENAMED_COLUMNS.get(name, name) for name in reader.fieldnames or ()]
        for row in reader:
            if None in row.values() or int(row[column]) > most:
                break
            yield row


def _open(path: Path, columns: list[str], column: str, most: int) -> tuple[IO[str], csv.DictWriter[str]]:
    """Rewrite a CSV with its rows until `column` exceeds `most`, and open it to append to it."""
    with atomic_write(path) as beside:
        text = io.TextIOWrapper(beside, newline="")
        writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(_rows(path, column, most))
        text.flush()
        text.detach()  # otherwise it would close the file
    file = path.open("a", newline="")
    return file, csv.DictWriter(file, columns)


def read_csv(path: str | os.PathLike[str]) -> dict[str, list[float]]:
    """Read a run's CSV as one list of numbers per column (empty fields are NaN).

    Raises:
        ValueError: the file is not such a CSV.
    """
    try:
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
        if rows and None in rows[-1].values():
            del rows[-1]  # a line that is being written, or was when the process was killed
        return {name: [float(row[name] or "nan") for row in rows] for name in reader.fieldnames or ()}
    except (TypeError, ValueError, csv.Error):
        raise ValueError(f"{path}: not a CSV of numbers") from None


def _exact(value: float) -> str:
    """Return text that is read back as exactly this number: returns are stored nowhere else."""
    text = _text(value)
    return text if math.isnan(value) or float(text) == value else repr(float(value))


def _text(value: float) -> str:
    if isinstance(value, int):
        return str(value)
    return "" if math.isnan(value) else f"{value:.6g}"

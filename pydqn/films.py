"""Films of whole games while a run goes on."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pydqn.recording import Recorder

_FPS = 30


class Film:
    """Films one game after another into a folder, each in a file named by the run's frames and the game's return."""

    def __init__(self, folder: Path, suffix: str) -> None:
        self._folder = folder
        self._suffix = suffix
        self._path = folder / f"unfinished.{suffix}"
        self._recorder: Recorder | None = None

    def start(self, picture: NDArray[np.uint8]) -> None:
        """Begin with a game's first picture; a film that was not finished is dropped."""
        self.drop()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._recorder = Recorder(self._path, _FPS).__enter__()
        self.add(picture)

    def add(self, picture: NDArray[np.uint8]) -> None:
        """Append a picture of the game that is being filmed."""
        assert self._recorder is not None
        self._recorder.add(picture)

    @property
    def filming(self) -> bool:
        """Whether a game is being filmed."""
        return self._recorder is not None

    def finish(self, frames: int, total: float) -> None:
        """End the film of a game that came to the return `total` when the run had seen `frames` frames."""
        if self._recorder is not None:
            self._recorder.__exit__(None, None, None)
            self._recorder = None
            os.replace(self._path, self._folder / f"frame-{frames:012d}-return-{total:g}.{self._suffix}")

    def drop(self) -> None:
        """Forget a film that is not finished."""
        if self._recorder is not None:
            recorder, self._recorder = self._recorder, None
            recorder.__exit__(RuntimeError, RuntimeError("not finished"), None)

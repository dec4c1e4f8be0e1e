"""Videos of whole episodes during training."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pydqn.plotting.recording import Recorder


class EpisodeVideos:
    """Writes one video per episode to a folder, named by the run's frames and the episode's return.

    A video that cannot be written is dropped with a warning: it does not end a run.
    """

    def __init__(self, folder: Path, suffix: str, fps: int = 30) -> None:
        self._folder = folder
        self._fps = fps
        self._suffix = suffix
        self._path = folder / f"unfinished.{suffix}"
        self._recorder: Recorder | None = None

    def start(self, image: NDArray[np.uint8]) -> None:
        """Begin a video with an episode's first image; an unfinished one is dropped."""
        self.drop()
        with self._reporting():
            self._folder.mkdir(parents=True, exist_ok=True)
            self._recorder = Recorder(self._path, self._fps).__enter__()
        self.add(image)

    def add(self, image: NDArray[np.uint8]) -> None:
        """Append an image to the current video, if there is one."""
        if self._recorder is not None:
            with self._reporting():
                self._recorder.add(image)

    @property
    def recording(self) -> bool:
        """Whether an episode is being recorded."""
        return self._recorder is not None

    def finish(self, frames: int, total: float) -> None:
        """Finish the video of an episode with return `total`, which ended when the run had taken `frames` frames."""
        if self._recorder is not None:
            recorder, self._recorder = self._recorder, None
            with self._reporting():
                recorder.__exit__(None, None, None)
                os.replace(self._path, self._folder / f"frame-{frames:012d}-return-{total:g}.{self._suffix}")

    def drop(self) -> None:
        """Drop an unfinished video."""
        if self._recorder is not None:
            recorder, self._recorder = self._recorder, None
            with suppress(OSError):
                recorder.__exit__(RuntimeError, RuntimeError("not finished"), None)

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            self.drop()
            warnings.warn(f"videos: an episode was not recorded: {error}", RuntimeWarning, stacklevel=2)

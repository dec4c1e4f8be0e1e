"""H.264 videos by ffmpeg, whose end is looked at: a video that it could not write is an error, not an empty file."""

from __future__ import annotations

import errno
import os
import subprocess
import tempfile
from contextlib import suppress
from typing import IO

import numpy as np
from numpy.typing import NDArray

from pydqn.plotting.images import Caption, Writer, enlarged

_QUALITY = "25"  # constant rate factor: 0 is without loss, 51 the worst


class VideoEncoder:
    """Writes RGB frames to an open file, as MP4.

    Args:
        file: where to write; ffmpeg opens it by its name.
        fps: frames per second.
        height: of a frame; even, as H.264 asks.
        width: the same.

    Raises:
        OSError: there is no ffmpeg; in `add` and `close`: ffmpeg has failed. The message is its own.
    """

    def __init__(self, file: IO[bytes], fps: int, height: int, width: int) -> None:
        import imageio_ffmpeg

        try:
            program = imageio_ffmpeg.get_ffmpeg_exe()
        except RuntimeError as error:
            raise OSError(errno.ENOENT, str(error)) from None
        source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "-", "-an"]
        target = ["-vcodec", "libx264", "-pix_fmt", "yuv420p", "-crf", _QUALITY, "-f", "mp4", file.name]
        self._path = file.name
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the video)
        self._process = subprocess.Popen(
            [program, "-y", "-v", "error", *source, *target],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            start_new_session=True,  # Ctrl-C is for us: ffmpeg ends when its input does
        )

    def add(self, frame: NDArray[np.uint8]) -> None:
        """Append a frame, (height, width, 3)."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(np.ascontiguousarray(frame).data)
        except OSError as error:
            raise self._failure() from error

    def close(self) -> None:
        """End the video."""
        assert self._process.stdin is not None
        with suppress(OSError):  # the exit code tells
            self._process.stdin.close()
        if self._process.wait() or not os.path.getsize(self._path):
            raise self._failure()
        self._errors.close()

    def abandon(self) -> None:
        """End ffmpeg, whatever it has written."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()
        self._errors.close()

    def _failure(self) -> OSError:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        self._errors.close()
        why = lines[-1] if lines else "it gave no reason"
        return OSError(errno.EIO, f"ffmpeg ended with exit code {code} ({why})" if code else "ffmpeg wrote nothing")


class VideoWriter(Writer):
    """H.264 by ffmpeg, whose images have even sizes."""

    def __init__(self, file: IO[bytes], fps: int, scale: int, height: int, width: int) -> None:
        self._scale = scale
        self._padding = ((0, height * scale % 2), (0, width * scale % 2), (0, 0))
        large = [side * scale + side * scale % 2 for side in (height, width)]
        self._encoder = VideoEncoder(file, fps, *large)

    def add(self, image: NDArray[np.uint8], caption: Caption | None) -> None:
        self._encoder.add(np.pad(enlarged(image, self._scale), self._padding, mode="edge"))

    def close(self) -> None:
        self._encoder.close()

    def abandon(self) -> None:
        self._encoder.abandon()

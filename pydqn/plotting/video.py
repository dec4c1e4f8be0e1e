"""H.264 videos, encoded by ffmpeg."""

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

_QUALITY = "25"  # constant rate factor: 0 is lossless, 51 the worst


class VideoWriter(Writer):
    """Writes an MP4 through a pipe to ffmpeg. Sizes are padded to be even, as H.264 requires.

    Args:
        file: an open file; ffmpeg opens it by its name.
        fps: frames per second.
        scale: factor by which images are enlarged.
        height: of the images.
        width: of the images.

    Raises:
        OSError: ffmpeg is not installed; in `add` and `close`: ffmpeg has failed. The message is ffmpeg's own.
    """

    def __init__(self, file: IO[bytes], fps: int, scale: int, height: int, width: int) -> None:
        import imageio_ffmpeg

        try:
            program = imageio_ffmpeg.get_ffmpeg_exe()
        except RuntimeError as error:
            raise OSError(errno.ENOENT, str(error)) from None
        self._scale = scale
        self._padding = ((0, height * scale % 2), (0, width * scale % 2), (0, 0))
        size = f"{width * scale + width * scale % 2}x{height * scale + height * scale % 2}"
        source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-r", str(fps), "-i", "-", "-an"]
        target = ["-vcodec", "libx264", "-pix_fmt", "yuv420p", "-crf", _QUALITY, "-f", "mp4", file.name]
        self._path = file.name
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the video)
        self._process = subprocess.Popen(
            [program, "-y", "-v", "error", *source, *target],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            start_new_session=True,  # Ctrl-C must not reach ffmpeg, which ends when its input does
        )

    def add(self, image: NDArray[np.uint8], caption: Caption | None) -> None:
        assert self._process.stdin is not None
        frame = np.pad(enlarged(image, self._scale), self._padding, mode="edge")
        try:
            self._process.stdin.write(np.ascontiguousarray(frame).data)
        except OSError as error:
            raise self._failure() from error

    def close(self) -> None:
        assert self._process.stdin is not None
        with suppress(OSError):  # ffmpeg has ended: its exit code is checked next
            self._process.stdin.close()
        if self._process.wait() or not os.path.getsize(self._path):
            raise self._failure()
        self._errors.close()

    def abandon(self) -> None:
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

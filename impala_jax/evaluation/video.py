"""Videos of games, made from the frames that environments render."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from impala_jax.config import ConfigError
from impala_jax.environments import base
from impala_jax.types import Closed

_SHORTEST_GIF_FRAME_MS = 20  # Browsers display frames with shorter durations for 100 ms.


class VideoError(ConfigError):
    """A video cannot be written; the message is one line, and the scores are not lost."""

    scores: dict[str, Any] | None = None
    """Scores that `impala_jax.evaluate` would have returned."""


class Recording:
    """Frames of one game.

    Args:
      frames_per_second: Frame rate of the video.
    """

    def __init__(self, frames_per_second: float):
        self.frames_per_second = frames_per_second
        self.frames: list[np.ndarray] = []
        """Frames, [H, W, 3] uint8, all of the size of the first one."""
        self.problem: str | None = None
        """Reason why the recording stopped, in one line; None while it continues."""

    def add(self, render: Callable[[], np.ndarray]) -> None:
        """Renders and appends a frame. If rendering fails, sets `problem` and ignores later calls.

        Args:
          render: Function that renders a frame.

        Raises:
          Closed: The run has ended.
          TimeoutError: The environment does not answer, so it cannot be played either.
        """
        if self.problem is not None:
            return
        try:
            picture = render()
        except NotImplementedError as error:
            self.problem = ' '.join(str(error).split())
            return
        except (Closed, TimeoutError):
            raise
        except Exception as error:  # Environments can raise anything; the games continue without a video.
            # In errors of worker processes, the reason follows a traceback.
            *_, reason = str(error).strip().splitlines() or [type(error).__name__]
            self.problem = f'render() failed: {reason}'
            return
        if self.frames and picture.shape != self.frames[0].shape:
            picture = base.picture(picture, *self.frames[0].shape[:2])
        self.frames.append(picture)

    def write(self, path: Path) -> None:
        """Writes an mp4 or gif file; an existing file is replaced only when the new one is complete.

        Raises:
          ConfigError: `check_video` would raise it.
          VideoError: Rendering failed, or the file cannot be written.
        """
        check_video(path)
        if self.problem is not None:
            raise VideoError(f'--video {path}: {self.problem}')
        partial = path.with_name(f'.{path.stem}.partial{path.suffix}')
        try:
            _write(partial, self.frames, self.frames_per_second)
            os.replace(partial, path)
        except Exception as error:  # imageio's exceptions have no common base class.
            raise VideoError(f'--video {path}: cannot be written: {base.one_line(error)}') from error
        finally:
            partial.unlink(missing_ok=True)


def check_video(path: Path) -> None:
    """Checks that a video can be written to `path`; to be called before long work.

    Raises:
      ConfigError: The suffix is not .mp4 or .gif, the folder does not exist, or imageio is not installed.
    """
    if path.suffix not in ('.mp4', '.gif'):
        raise ConfigError(f'--video {path}: the name must end in .mp4 or .gif')
    if not path.absolute().parent.is_dir():
        raise ConfigError(f'--video {path}: there is no directory {path.absolute().parent}')
    if path.is_dir():
        raise ConfigError(f'--video {path}: there is a directory of this name; give a file')
    try:
        import imageio.v2  # noqa: F401

        if path.suffix == '.mp4':
            import imageio_ffmpeg

            imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        reason = ' '.join(str(error).split())
        raise ConfigError(f"--video needs imageio: pip install 'impala_jax[video]' ({reason})") from error


def _write(path: Path, frames: list[np.ndarray], frames_per_second: float) -> None:
    import imageio.v2 as imageio

    # Most players require an even width and height.
    frames = [frame[: frame.shape[0] // 2 * 2, : frame.shape[1] // 2 * 2] for frame in frames]
    if path.suffix == '.gif':
        duration_ms = max(1000 / frames_per_second, _SHORTEST_GIF_FRAME_MS)
        imageio.mimsave(path, frames, duration=duration_ms, loop=0)  # pyright: ignore[reportCallIssue, reportArgumentType]
    else:
        with imageio.get_writer(path, fps=frames_per_second, macro_block_size=2, ffmpeg_log_level='error') as writer:
            for frame in frames:
                writer.append_data(frame)  # pyright: ignore[reportAttributeAccessIssue]

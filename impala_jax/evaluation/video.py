"""Videos of games: the pictures that environments render, checked, collected and written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from impala_jax.config import ConfigError
from impala_jax.environments import base
from impala_jax.types import Closed

_SHORTEST_GIF_FRAME_MS = 20  # Browsers show shorter ones for 100 ms.


class VideoError(ConfigError):
    """A video that could not be made; the message is one line, and no game or score is lost."""

    scores: dict[str, Any] | None = None
    """What `impala_jax.evaluate` would have returned."""


class Recording:
    """Pictures of one game.

    Args:
      frames_per_second: Of the video.
    """

    def __init__(self, frames_per_second: float):
        self.frames_per_second = frames_per_second
        self.frames: list[np.ndarray] = []
        """uint8 [H, W, 3], all of the first one's size."""
        self.problem: str | None = None
        """Why there are no more pictures, in one line."""

    def add(self, render: Callable[[], np.ndarray]) -> None:
        """Takes a picture, or notes in `problem` that there is none, and takes no more.

        Raises:
          Closed: the run has ended.
          TimeoutError: the environment does not answer, and so cannot be played either.
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
        except Exception as error:  # Any can come from an environment; the games go on without it.
            *_, reason = str(error).strip().splitlines() or [type(error).__name__]  # A worker's follows its traceback.
            self.problem = f'render() failed: {reason}'
            return
        if self.frames and picture.shape != self.frames[0].shape:
            picture = base.picture(picture, *self.frames[0].shape[:2])
        self.frames.append(picture)

    def write(self, path: Path) -> None:
        """Writes an mp4 or gif file; what was there stays until the new one is complete.

        Raises:
          ConfigError: as `check_video`.
          VideoError: a picture is missing, or the file cannot be written.
        """
        check_video(path)
        if self.problem is not None:
            raise VideoError(f'--video {path}: {self.problem}')
        partial = path.with_name(f'.{path.stem}.partial{path.suffix}')
        try:
            _write(partial, self.frames, self.frames_per_second)
            os.replace(partial, path)
        except Exception as error:  # imageio's have no common class.
            raise VideoError(f'--video {path}: cannot be written: {base.one_line(error)}') from error
        finally:
            partial.unlink(missing_ok=True)


def check_video(path: Path) -> None:
    """Raises ConfigError if no video could be written there; to be asked before long work."""
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

    # Most players want even sides.
    frames = [frame[: frame.shape[0] // 2 * 2, : frame.shape[1] // 2 * 2] for frame in frames]
    if path.suffix == '.gif':
        duration_ms = max(1000 / frames_per_second, _SHORTEST_GIF_FRAME_MS)
        imageio.mimsave(path, frames, duration=duration_ms, loop=0)  # pyright: ignore[reportCallIssue, reportArgumentType]
    else:
        with imageio.get_writer(path, fps=frames_per_second, macro_block_size=2, ffmpeg_log_level='error') as writer:
            for frame in frames:
                writer.append_data(frame)  # pyright: ignore[reportAttributeAccessIssue]

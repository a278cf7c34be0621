"""Metrics of a run, written to `metrics.jsonl`, to TensorBoard and to the progress display."""

from __future__ import annotations

import atexit
import math
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from impala_jax.rundir.files import EVALUATIONS, METRICS, TENSORBOARD
from impala_jax.rundir.progress import PlainProgress, ProgressLine, is_live
from impala_jax.rundir.rows import append_row, drop_rows
from impala_jax.rundir.stats import Histogram, Number
from impala_jax.rundir.tensorboard import TensorBoardWriter


class MetricsLogger:
    """Writes rows to `metrics.jsonl` and TensorBoard, and displays the progress of the run.

    A terminal shows one progress line below the log messages; any other output gets a plain line every ten seconds. Use
    the logger as a context manager, so the terminal is restored after an error.

    Args:
      workdir: Folder of the run.
      config: Configuration of the run, which determines its total number of frames.
      console: Output of the progress display; None creates one for standard output.
    """

    def __init__(self, workdir: Path, total_frames: int, *, console: Console | None = None):
        self._workdir = Path(workdir)
        self._total_frames = total_frames
        self._console = console or Console()
        self._view = ProgressLine(self._console) if is_live(self._console) else PlainProgress(self._console)
        self._view_open = False
        self._tensorboard: TensorBoardWriter | None = None
        self._start = time.monotonic()
        self._last_frames = 0
        self._last_time = self._start
        self._smooth_rate: float | None = None
        self._resumed_from: int | None = None
        self._closed = False

    def __enter__(self) -> MetricsLogger:
        self._open_view()
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def resume(self, frames: int, wall_time_s: float | None = None) -> None:
        """Continues after `frames`; call it on every start, before the first row, with 0 for a new run.

        Drops rows beyond `frames`, which the run will write again, and a line left incomplete by a kill.

        Args:
          frames: Frames of the checkpoint.
          wall_time_s: Wall time of the checkpoint, in seconds; None takes it from the last row that is kept.
        """
        kept = drop_rows(self._workdir / METRICS, frames)
        drop_rows(self._workdir / EVALUATIONS, frames)
        recorded = kept[-1].get('wall_time_s', 0.0) if kept else 0.0
        self._last_time = time.monotonic()
        self._start = self._last_time - (recorded if wall_time_s is None else wall_time_s)
        self._last_frames = self._resumed_from = frames

    @property
    def wall_time_s(self) -> float:
        """Time that the run has taken over all its starts, in seconds, for the metadata of a checkpoint."""
        return time.monotonic() - self._start

    def write(self, row: dict[str, Number | Histogram]) -> None:
        """Writes a row, with `wall_time_s` and `frames_per_second` (since the last row) added.

        Args:
          row: Values keyed by metric; `frames`, an int, is required. Non-finite numbers are omitted.
        """
        now = time.monotonic()
        frames = int(row['frames'])  # pyright: ignore[reportArgumentType]
        rate = (frames - self._last_frames) / max(now - self._last_time, 1e-9)
        self._last_frames, self._last_time = frames, now
        self._smooth_rate = rate if self._smooth_rate is None else 0.8 * self._smooth_rate + 0.2 * rate
        clock = {'wall_time_s': now - self._start, 'frames_per_second': rate}
        histograms = {name: value for name, value in row.items() if isinstance(value, Histogram)}
        finite = _finite({name: value for name, value in (row | clock).items() if name not in histograms})
        append_row(self._workdir / METRICS, as_json(row | clock))
        if self._tensorboard is None:
            self._tensorboard = TensorBoardWriter(self._workdir / TENSORBOARD, self._resumed_from)
        self._tensorboard.write(finite, histograms)
        self._open_view()
        self._view.update(frames, self._total_frames, self._smooth_rate, finite)

    def close(self) -> None:
        """Restores the terminal and flushes all outputs; further calls do nothing."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        if self._view_open:
            self._view.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _open_view(self) -> None:
        if not self._view_open:
            self._view_open = True
            atexit.register(self.close)  # Restores the cursor of the terminal if the caller does not close the logger.
            self._view.open(self._last_frames, self._total_frames)


def as_json(row: dict[str, Number | Histogram]) -> dict[str, Any]:
    """Returns a row as it is written to `metrics.jsonl`."""
    histograms = {name: value._asdict() for name, value in row.items() if isinstance(value, Histogram)}
    return _finite({name: value for name, value in row.items() if name not in histograms}) | histograms


def _finite(row: dict[str, Any]) -> dict[str, float | int]:
    plain = {name: value.item() if hasattr(value, 'item') else value for name, value in row.items()}
    return {name: value for name, value in plain.items() if math.isfinite(value)}

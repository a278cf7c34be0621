"""TensorBoard event files of a run."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from impala_jax.rundir.stats import Histogram

_logger = logging.getLogger(__name__)


class TensorBoardWriter:
    """Writes scalars and histograms to a TensorBoard event file; the x axis counts frames.

    The SummaryWriter of tensorboardX is not used: a full disk kills its thread, and then its callers block forever.

    Args:
      folder: Folder of the event files.
      purge_step: Frames of the checkpoint that the run resumes from, beyond which TensorBoard drops earlier events.
    """

    def __init__(self, folder: Path, purge_step: int | None):
        # Imported here, because programs that only read a run do not need it.
        from tensorboardX import event_file_writer
        from tensorboardX.proto import event_pb2, summary_pb2

        self._proto: Any = event_pb2  # Generated code, which type checkers cannot analyse.
        self._summary_proto: Any = summary_pb2
        self._writer: event_file_writer.EventsWriter | None = None
        with self._reported():
            folder.mkdir(parents=True, exist_ok=True)
            self._writer = event_file_writer.EventsWriter(str(folder / 'events'), f'.{os.getpid()}')
            if purge_step is not None:  # TensorBoard drops the events of earlier files from this step on.
                start = self._proto.SessionLog(status=self._proto.SessionLog.START)
                self._write(purge_step + 1, session_log=start)

    def write(self, row: dict[str, float | int], histograms: dict[str, Histogram]) -> None:
        """Writes scalars and histograms at step `row['frames']`."""
        with self._reported():
            if self._writer is not None:
                proto = self._summary_proto
                values = [proto.Summary.Value(tag=tag, simple_value=value) for tag, value in row.items()]
                for tag, (edges, counts) in histograms.items():
                    histogram = proto.HistogramProto(
                        min=edges[0], max=edges[-1], num=sum(counts), bucket_limit=edges[1:], bucket=counts
                    )
                    values.append(proto.Summary.Value(tag=tag, histo=histogram))
                self._write(int(row['frames']), summary=proto.Summary(value=values))
                self._writer.flush()

    def close(self) -> None:
        """Flushes and closes the file."""
        with self._reported():
            if self._writer is not None:
                self._writer.close()

    def _write(self, frames: int, **content: Any) -> None:
        if self._writer is not None:
            self._writer.write_event(self._proto.Event(wall_time=time.time(), step=frames, **content))

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        """Logs a failure to write instead of raising it, because `metrics.jsonl` holds the same rows."""
        try:
            yield
        except OSError as error:
            self._writer = None
            _logger.warning('TensorBoard events are no longer written: %s', error)

"""Hooks of every run's training loop: metrics, checkpoints, and checks of the updates."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from impala_jax.config import Config, LoggingConfig
from impala_jax.learner import LearnerState, Schedule
from impala_jax.loss import LOG_RHO_EDGES
from impala_jax.optimizer import Hyperparameters
from impala_jax.rundir.checkpoint import DIRECTORY, Checkpointer
from impala_jax.rundir.metrics import MetricsLogger
from impala_jax.rundir.run_config import write_run_config
from impala_jax.rundir.stats import Histogram, LearnerStats
from impala_jax.training.hosts import Updated
from impala_jax.training.loop import Hook, TrainingLoop
from impala_jax.types import Array, PyTree

_logger = logging.getLogger(__name__)

NON_FINITE_GRADIENTS = (
    'updates in a row had gradients that are not finite (learner.max_nonfinite_updates); lower '
    'optimizer.learning_rate, or look for NaN in the environment'
)
Source = Callable[[], dict[str, Any]]


class NonFiniteGradients(RuntimeError):
    """Too many consecutive updates had non-finite gradients."""


class RunConfig(Hook):
    """Writes `config.json` when training begins."""

    def __init__(self, workdir: Path, config: Config):
        self._workdir, self._config = workdir, config

    def begin(self, loop: TrainingLoop) -> None:
        """Writes the file."""
        write_run_config(self._workdir, self._config)


class Checkpoints(Hook):
    """Reads the checkpoint from which a run resumes, and writes new ones at intervals of time and at the end.

    Nothing is written before training begins.

    Args:
      workdir: Folder of the run.
      config: Configuration of the experiment.
      state: PyTree with the structure, shapes and dtypes of the learner's state.
      is_primary: Whether this host reads and writes checkpoints; true on host 0 only.

    Raises:
      CheckpointError: As for `Checkpointer`.
    """

    def __init__(self, workdir: Path, config: Config, state: LearnerState, is_primary: bool = True):
        self._interval_s = config.checkpoint.interval_s
        self._sources: list[Source] = []
        self._metadata_sources: list[Source] = []
        self._last = time.monotonic()
        self._is_wanted = False
        self.restored_state: LearnerState | None = None
        """State of the learner in the checkpoint from which this run resumes; None in a new run."""
        self.restored_runtime_state: dict[str, Any] = {}
        """Other arrays of that checkpoint, keyed by name; see `save_with`."""
        self.restored_metadata: dict[str, Any] | None = None
        self.restored_config: Config | None = None
        """Configuration of that checkpoint."""
        self._checkpointer = None
        if is_primary:
            self._checkpointer = Checkpointer(workdir / DIRECTORY, config, config.checkpoint.keep)
            checkpoint = self._checkpointer.restore_latest({'learner': state, 'runtime': None})
            if checkpoint is not None:
                self.restored_state = checkpoint.state['learner']
                self.restored_runtime_state = checkpoint.state['runtime'] or {}
                self.restored_metadata = checkpoint.metadata
                self.restored_config = checkpoint.config

    def save_with(self, source: Source, metadata: Source = dict) -> None:
        """Adds the results of functions to every checkpoint.

        Args:
          source: Function that returns arrays keyed by name.
          metadata: Function that returns JSON-serialisable values keyed by name.
        """
        self._sources.append(source)
        self._metadata_sources.append(metadata)

    def want(self) -> None:
        """Makes a checkpoint due, regardless of the time."""
        self._is_wanted = True

    @property
    def is_due(self) -> bool:
        """Whether a checkpoint is due."""
        return self._is_wanted or time.monotonic() - self._last >= self._interval_s

    def save(self, loop: TrainingLoop) -> None:
        """Writes a checkpoint; does nothing after a failed update, to which the state was donated."""
        loop.begin()
        self._last, self._is_wanted = time.monotonic(), False
        if self._checkpointer is None or loop.state is None:
            return
        runtime = {name: value for source in self._sources for name, value in source().items()}
        metadata = {name: value for source in self._metadata_sources for name, value in source().items()}
        self._checkpointer.save(loop.num_updates, {'learner': loop.state, 'runtime': runtime}, metadata)

    def published(self, loop: TrainingLoop) -> None:
        """Writes a checkpoint if one is due."""
        if self.is_due:
            self.save(loop)

    def finish(self, loop: TrainingLoop) -> None:
        """Writes the last checkpoint."""
        self.save(loop)


class Metrics(Hook):
    """Collects statistics of batches, and writes rows of metrics at intervals of time.

    Args:
      workdir: Folder of the run.
      config: Configuration with the interval between rows.
      total_frames: Number of environment frames of the run.
      num_fresh: Number of new trajectories per batch.
      tasks: Names of a suite's tasks; () for a single environment.
      checkpoints: Hook that saves the statistics.
      is_primary: Whether this host writes metrics; true on host 0 only.
    """

    def __init__(
        self,
        workdir: Path,
        config: LoggingConfig,
        total_frames: int,
        num_fresh: int,
        tasks: tuple[str, ...],
        checkpoints: Checkpoints,
        is_primary: bool = True,
    ):
        self.stats = LearnerStats(tasks)
        self._interval_s = config.interval_s
        self._num_fresh = num_fresh
        self._sources: list[Source] = []
        self._last, self._last_frames = time.monotonic(), -1
        self._logger = None
        metadata = checkpoints.restored_metadata
        self._restored_wall_time_s = None if metadata is None else metadata['wall_time_s']
        if is_primary:
            self._logger = logger = MetricsLogger(workdir, total_frames)
            if 'stats' in checkpoints.restored_runtime_state:
                self.stats.restore(checkpoints.restored_runtime_state['stats'])
            checkpoints.save_with(lambda: {'stats': self.stats.state()}, lambda: {'wall_time_s': logger.wall_time_s})

    def log_with(self, source: Source) -> None:
        """Adds the result of `source`, values keyed by metric, to every row."""
        self._sources.append(source)

    def log(self, loop: TrainingLoop) -> None:
        """Writes a row."""
        loop.begin()
        self._last, self._last_frames = time.monotonic(), loop.frames
        if self._logger is None:
            return
        extra = {name: value for source in self._sources for name, value in source().items()}
        self._logger.write(row(loop.frames, loop.num_updates, self.stats, extra, loop.logs))

    def begin(self, loop: TrainingLoop) -> None:
        """Continues the files of a resumed run."""
        self._last_frames = loop.frames
        if self._logger is not None:
            self._logger.resume(loop.frames, self._restored_wall_time_s)

    def updated(self, loop: TrainingLoop, update: Updated) -> None:
        """Adds the batch to the statistics."""
        if self._logger is None:
            return
        assert update.counts is not None
        info, version, task, game_version = update.counts
        self.stats.add_batch(info, loop.num_updates - 1 - version, self._num_fresh, task, game_version)
        self.stats.add_wait(update.waited_s)

    def published(self, loop: TrainingLoop) -> None:
        """Writes a row if one is due."""
        if time.monotonic() - self._last >= self._interval_s:
            self.log(loop)

    def finish(self, loop: TrainingLoop) -> None:
        """Writes the last row if the budget is spent; otherwise the resumed run will write it."""
        if loop.done and self._last_frames != loop.frames:
            self.log(loop)

    def close(self) -> None:
        """Closes the files and restores the terminal."""
        if self._logger is not None:
            self._logger.close()


class NonFiniteUpdates(Hook):
    """Logs updates that were skipped because of a non-finite gradient; ends the run after too many in a row.

    Args:
      limit: Number of consecutive skipped updates that ends the run, `learner.max_nonfinite_updates`.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._previous: Array | None = None

    def updated(self, loop: TrainingLoop, update: Updated) -> None:
        """Checks the update BEFORE the last one, whose result is available, so that the device never waits.

        Raises:
          NonFiniteGradients: If too many consecutive updates were skipped.
        """
        previous, self._previous = self._previous, update.logs['skipped_in_a_row']
        in_a_row = 0 if previous is None else int(previous)
        if in_a_row:
            _logger.warning('update %d skipped: its gradient was not finite', loop.num_updates - 1)
        if in_a_row >= self._limit:
            raise NonFiniteGradients(f'{in_a_row} {NON_FINITE_GRADIENTS}')


class ScheduleJumps(Hook):
    """Warns if a schedule jumps back to a higher value because `total_frames` was raised.

    Args:
      before: Schedule of the checkpoint from which the run resumes.
      now: Schedule of this run.
      values: Hyperparameters at the start of the run.
    """

    def __init__(self, before: Schedule, now: Schedule, values: Hyperparameters):
        self._schedules, self._values = (before, now), values

    def begin(self, loop: TrainingLoop) -> None:
        """Compares the schedules at the current number of applied updates."""
        assert loop.state is not None
        applied = loop.num_updates - int(loop.state.skipped)
        values = loop.hyperparameters or self._values
        old, new = (schedule(values, applied) for schedule in self._schedules)
        for name in ('learning_rate', 'entropy_cost'):
            was, is_now = float(getattr(old, name)), float(getattr(new, name))
            if is_now > 1.001 * was:
                _logger.warning(
                    'the %s jumps back from %.3g to %.3g at %d frames, because its linear schedule ends later now; '
                    'optimizer.schedule_frames, given from the start, keeps a schedule when total_frames is raised',
                    name.replace('_', ' '),
                    was,
                    is_now,
                    loop.frames,
                )


def row(
    frames: int, num_updates: int, stats: LearnerStats, extra: dict[str, Any], logs: dict[str, Array]
) -> dict[str, Any]:
    """Returns a row of metrics, without times.

    Args:
      frames: Number of environment frames of the run.
      num_updates: Number of updates of the run.
      stats: Statistics since the last row.
      extra: Other values, keyed by metric.
      logs: Scalars of the last update.
    """
    values = {
        'frames': frames,
        'learner_steps': num_updates,
        **stats.row(),
        **extra,
        **{name: _to_metric(name, value) for name, value in logs.items()},
    }
    return values | {name: int(values.get(name, 0)) for name in ('skipped_updates', 'skipped_in_a_row')}


def _to_metric(name: str, value: PyTree) -> float | Histogram:
    if name == 'log_rho_histogram':
        return Histogram(LOG_RHO_EDGES.tolist(), np.asarray(value).tolist())
    return float(value)

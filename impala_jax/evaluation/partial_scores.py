"""A file with the scores of the tasks that an evaluation of a suite has played, so that it can be resumed."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from impala_jax.config import ConfigError
from impala_jax.rundir.rows import append_row, read_rows

_logger = logging.getLogger(__name__)


class PartialScores:
    """A file of JSON lines, one per task that has been played.

    Every row identifies its evaluation. Rows of a different evaluation are from an earlier start; they are removed with
    a warning. Incomplete lines, left by a process that was killed while writing, are ignored.

    Args:
      path: The file, created when the first task has been played.
      evaluation: JSON values by name that identify the evaluation; a task is only skipped if all of them are equal.
      episodes: Number of games of a task.

    Raises:
      ConfigError: The file cannot be read, or does not contain partial scores.
    """

    def __init__(self, path: Path, evaluation: Mapping[str, Any], episodes: int):
        self._path = path
        self._evaluation = json.loads(json.dumps(evaluation))  # Tuples become lists, as in the rows that are read.
        self.rows: dict[str, dict[str, Any]] = {}
        """Rows by task, with the `returns`, [episodes], and the other values given to `add`."""
        try:
            rows = read_rows(path)
            self._ends_in_a_line = not path.exists() or path.read_bytes()[-1:] in (b'', b'\n')
        except OSError as error:
            raise ConfigError(f'the partial scores {path} cannot be read: {error.strerror}; remove them') from error
        if any('evaluation' not in row for row in rows):
            raise ConfigError(f'{path} does not contain the scores of an evaluation; rename it')
        for row in rows:
            if row['evaluation'] == self._evaluation and _is_whole(row, episodes):
                self.rows[row['task']] = row
        if rows and not self.rows:
            difference = self._difference(rows[-1])
            _logger.warning('%s is from a different evaluation (%s): all tasks are played', path, difference)
            self.remove()

    def add(self, task: str, row: Mapping[str, Any]) -> None:
        """Appends the scores of a task; a failure to write, as on a full disk, only logs a warning."""
        self.rows[task] = {'task': task, **row, 'evaluation': self._evaluation}
        try:
            if not self._ends_in_a_line:
                with self._path.open('ab') as file:
                    file.write(b'\n')
                self._ends_in_a_line = True
            append_row(self._path, self.rows[task])
        except OSError as error:
            self._ends_in_a_line = False
            _logger.warning(
                'partial scores cannot be written to %s: %s; a restart would play %s again',
                self._path,
                error.strerror,
                task,
            )

    def remove(self) -> None:
        """Removes the file."""
        self._path.unlink(missing_ok=True)
        self._ends_in_a_line = True

    def _difference(self, row: Mapping[str, Any]) -> str:
        """Describes how the evaluation differs from that of a row."""
        of_row = row['evaluation'] if isinstance(row['evaluation'], dict) else {}
        differences = [
            f'{name} {of_row.get(name)!r} instead of {value!r}' if not isinstance(value, dict) else f'another {name}'
            for name, value in self._evaluation.items()
            if of_row.get(name) != value
        ]
        return ', '.join(differences) or 'its rows are damaged'


def _is_whole(row: Mapping[str, Any], episodes: int) -> bool:
    returns = row.get('returns')
    return (
        isinstance(row.get('task'), str)
        and isinstance(row.get('truncated_episodes'), int)
        and isinstance(returns, list)
        and len(returns) == episodes
        and all(isinstance(value, (int, float)) for value in returns)
    )

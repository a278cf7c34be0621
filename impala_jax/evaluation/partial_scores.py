"""The tasks of a suite that an evaluation has played so far, in a file: one that was stopped goes on where it was."""

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

    Every row says of which evaluation it is. Rows of another one are removed, which is reported: they are of an older
    start. A line that was torn by a kill does not count.

    Args:
      path: The file, made when the first task has been played.
      evaluation: What must be equal for a task not to be played again; JSON values by name.
      episodes: Returns of a task.
    Raises:
      ConfigError: The file cannot be read, or is something else.
    """

    def __init__(self, path: Path, evaluation: Mapping[str, Any], episodes: int):
        self._path = path
        self._evaluation = json.loads(json.dumps(evaluation))  # As rows have it: tuples are lists.
        self.rows: dict[str, dict[str, Any]] = {}
        """By task: `returns`, [episodes], and what else `add` was given."""
        try:
            rows = read_rows(path)
            self._ends_in_a_line = not path.exists() or path.read_bytes()[-1:] in (b'', b'\n')
        except OSError as error:
            raise ConfigError(f'the partial scores {path} cannot be read: {error.strerror}; remove them') from error
        if any('evaluation' not in row for row in rows):
            raise ConfigError(f'{path} is in the way: it has other rows than those of an evaluation; rename it')
        for row in rows:
            if row['evaluation'] == self._evaluation and _is_whole(row, episodes):
                self.rows[row['task']] = row
        if rows and not self.rows:
            _logger.warning('%s is of another evaluation (%s): all tasks are played', path, self._difference(rows[-1]))
            self.remove()

    def add(self, task: str, row: Mapping[str, Any]) -> None:
        """Appends a task; where that is impossible, as on a full disk, it is reported, and the evaluation goes on."""
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
                'partial scores cannot be written to %s: %s; %s would be played again by another start',
                self._path,
                error.strerror,
                task,
            )

    def remove(self) -> None:
        """Removes the file."""
        self._path.unlink(missing_ok=True)
        self._ends_in_a_line = True

    def _difference(self, row: Mapping[str, Any]) -> str:
        """What of the evaluation differs from that of a row, in words."""
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

"""Names of the files in a run's folder, and atomic writes."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

METRICS = 'metrics.jsonl'
EVALUATIONS = 'evaluations.jsonl'
SCHEDULE = 'pbt.jsonl'
RUN_CONFIG = 'config.json'
TENSORBOARD = 'tensorboard'


@contextlib.contextmanager
def errors_name(path: Path) -> Iterator[None]:
    """Adds `path` to an `OSError` without a file name, such as that of a write, in the body of the `with`."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_atomically(path: Path, content: str) -> None:
    """Writes a file; readers see the old content or all of the new.

    Raises:
      OSError: If the file cannot be written; the error names a file.
    """
    temporary = path.with_name(f'.{re.sub(r"[^a-z.]", "", path.name)}-{os.getpid()}')
    try:
        with errors_name(path), temporary.open('w', encoding='utf-8', errors='backslashreplace') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)

"""Files of JSON lines: a row is appended by one write, and a line torn by a kill does not count."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from impala_jax.rundir.files import write_atomically


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Appends one JSON object as one line, written at once.

    Raises:
      OSError: the file cannot be written.
    """
    line = json.dumps(row, allow_nan=False) + '\n'
    with path.open('ab', buffering=0) as file:
        try:
            file.write(line.encode())
        except OSError as error:
            raise OSError(error.errno, f'cannot write a row: {error.strerror}', str(path)) from error


def read_rows(path: Path, last_bytes: int | None = None) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines, or of its end; lines that are none (torn by a kill) are left out."""
    rows = []
    try:
        with path.open('rb') as file:
            if last_bytes is not None:
                file.seek(max(0, file.seek(0, os.SEEK_END) - last_bytes))
            lines = file.read().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    for line in lines:
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and line.endswith(b'\n'):
                rows.append(row)
    return rows


def drop_rows(path: Path, frames: int) -> list[dict[str, Any]]:
    """Rewrites `path` without the rows beyond `frames` and without torn lines, atomically; returns what is left."""
    rows = [row for row in read_rows(path) if row.get('frames', 0) <= frames]
    content = ''.join(json.dumps(row) + '\n' for row in rows)
    if path.exists() and path.read_bytes() != content.encode():
        write_atomically(path, content)
    return rows

"""Files of JSON lines: each row is appended by a single write, and an incomplete line is ignored."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from impala_jax.rundir.files import write_atomically


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Appends a JSON object as one line, in a single write.

    Raises:
      OSError: If the file cannot be written.
    """
    line = json.dumps(row, allow_nan=False) + '\n'
    with path.open('ab', buffering=0) as file:
        try:
            file.write(line.encode())
        except OSError as error:
            raise OSError(error.errno, f'cannot write a row: {error.strerror}', str(path)) from error


def read_rows(path: Path, last_bytes: int | None = None) -> list[dict[str, Any]]:
    """Reads the rows of a file of JSON lines; skips lines that a kill left incomplete.

    Args:
      path: Path of the file; a missing file has no rows.
      last_bytes: Number of bytes at the end of the file to read; None reads the whole file.
    """
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
    """Atomically removes the rows beyond `frames`, and incomplete lines; returns the remaining rows."""
    rows = [row for row in read_rows(path) if row.get('frames', 0) <= frames]
    content = ''.join(json.dumps(row) + '\n' for row in rows)
    if path.exists() and path.read_bytes() != content.encode():
        write_atomically(path, content)
    return rows

"""Messages that C++ libraries write to standard error."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import absl.logging


@contextlib.contextmanager
def native_messages_to(path: Path) -> Iterator[None]:
    """Redirects the standard error of C++ libraries to a file; messages of Python still reach the terminal.

    Reverb logs every server and sampler to standard error, and has no setting that disables it.
    """
    previous = sys.stderr
    previous.flush()
    terminal = os.dup(2)
    with (
        open(path, 'ab') as file,
        open(os.dup(terminal), 'w', buffering=1, errors='backslashreplace') as stderr,
    ):
        os.dup2(file.fileno(), 2)
        _write_to(stderr)
        try:
            yield
        finally:
            _write_to(previous)
            os.dup2(terminal, 2)
            os.close(terminal)


def _write_to(stderr: TextIO) -> None:
    """Replaces `sys.stderr`, also in log handlers, which otherwise keep their original stream."""
    handlers = [*logging.getLogger().handlers, absl.logging.get_absl_handler().python_handler]
    for handler in handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stderr:
            handler.setStream(stderr)
    sys.stderr = stderr

"""NumPy arrays written and read by Orbax, in a single process and without its log messages."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint._src.multihost import multihost as orbax_processes


def save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes non-empty arrays into the new folder `path`."""
    if arrays:
        with _quiet_orbax(), _quiet_tensorstore(), _checkpointer() as checkpointer:
            checkpointer.save(path, args=ocp.args.PyTreeSave(arrays))


def restore(path: Path, names: list[str]) -> dict[str, np.ndarray]:
    """Reads the arrays with the given names from the folder `path`."""
    if not names:
        return {}
    restore_args = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
    with _quiet_orbax(), _checkpointer() as checkpointer:
        return checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=restore_args))


@contextlib.contextmanager
def _checkpointer() -> Iterator[ocp.Checkpointer]:
    """A checkpointer for a single process; it is synchronous, so no thread outlives it."""
    # With one active process Orbax waits for no other host. It writes NumPy arrays in process 0 only, whatever the
    # options are, so a host that saves must appear as process 0.
    options = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})
    process_index = orbax_processes.process_index
    orbax_processes.process_index = lambda: 0
    try:
        handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=options)
        with contextlib.closing(ocp.Checkpointer(handler, multiprocessing_options=options)) as checkpointer:
            yield checkpointer
    finally:
        orbax_processes.process_index = process_index


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Silences Orbax, which logs every stage through absl, even as warnings."""
    logger = logging.getLogger('absl')
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _quiet_tensorstore() -> Iterator[None]:
    """Silences the tracebacks that TensorStore prints for pending writes after one of them failed."""
    previous = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == 'Event loop is closed'):
            previous(unraisable)

    sys.unraisablehook = hook
    yield
    sys.unraisablehook = previous  # Not after an error: the tracebacks follow later.

"""NumPy arrays written and read by Orbax, in this process alone and without its log messages."""

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
    """Writes arrays, none of them empty, into the new folder `path`."""
    if arrays:
        with _quiet_orbax(), _quiet_tensorstore(), _checkpointer() as checkpointer:
            checkpointer.save(path, args=ocp.args.PyTreeSave(arrays))


def restore(path: Path, names: list[str]) -> dict[str, np.ndarray]:
    """Reads the arrays of these names from the folder `path`."""
    if not names:
        return {}
    restore_args = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
    with _quiet_orbax(), _checkpointer() as checkpointer:
        return checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=restore_args))


@contextlib.contextmanager
def _checkpointer() -> Iterator[ocp.Checkpointer]:
    """A checkpointer of this process alone; synchronous, it leaves no thread behind."""
    # One active process means no barrier between hosts. NumPy arrays are written in process 0 only, whatever the
    # options say, so each host that saves is that one to Orbax.
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
    """Orbax reports every stage through absl, as warnings too."""
    logger = logging.getLogger('absl')
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _quiet_tensorstore() -> Iterator[None]:
    """After a write that failed, TensorStore prints a traceback for each other one: nobody waits for them any more."""
    previous = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == 'Event loop is closed'):
            previous(unraisable)

    sys.unraisablehook = hook
    yield
    sys.unraisablehook = previous  # Not after an error: they still come.

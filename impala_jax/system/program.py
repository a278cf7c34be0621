"""The command that started this program, and commands to show to the user."""

from __future__ import annotations

import sys
from pathlib import Path

MODULE = 'python -m impala_jax'

_SCRIPTS = {'train': 'local', 'pod': 'tpu_pod'}  # in launch/; all other scripts have the name of their command


def itself() -> list[str]:
    """Returns the command line that started this program, without its options."""
    num_options = len(sys.argv) - 1
    return [sys.executable, *sys.orig_argv[1 : len(sys.orig_argv) - num_options]]


def command(name: str) -> str:
    """Returns the command line for `impala NAME` in the form in which this program was started.

    The form is `python launch/NAME.py` (or `make doctor`) for scripts in `launch/`, which need a checkout,
    `python -m impala_jax NAME` for the module, and `impala NAME` otherwise.
    """
    if Path(sys.argv[0]).parent.name == 'launch':
        return 'make doctor' if name == 'doctor' else f'python launch/{_SCRIPTS.get(name, name)}.py'
    return f'{MODULE if sys.argv[0].startswith(MODULE) else "impala"} {name}'

"""How this program was started: the command that starts it again, and commands to show to the user."""

from __future__ import annotations

import sys
from pathlib import Path

MODULE = 'python -m impala_jax'

_SCRIPTS = {'train': 'local', 'pod': 'tpu_pod'}  # in launch/; the others have the command's name


def itself() -> list[str]:
    """The command line that started this program, without its options."""
    num_options = len(sys.argv) - 1
    return [sys.executable, *sys.orig_argv[1 : len(sys.orig_argv) - num_options]]


def command(name: str) -> str:
    """What a user types for the command `impala NAME`, in the form in which this program was started.

    A script of `launch/`, which needs a checkout, gives `python launch/evaluate.py` and `make doctor`, the module
    `python -m impala_jax evaluate`, and all else `impala evaluate`.
    """
    if Path(sys.argv[0]).parent.name == 'launch':
        return 'make doctor' if name == 'doctor' else f'python launch/{_SCRIPTS.get(name, name)}.py'
    return f'{MODULE if sys.argv[0].startswith(MODULE) else "impala"} {name}'

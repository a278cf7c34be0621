"""Version of the code that a process runs; all processes of a run must have the same."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import impala_jax

SUFFIXES = ('.cc', '.csv', '.py')
"""Suffixes of the files that determine results.

Compiled kernels are not among them, so machines with different processors can take part in one run.
"""


@functools.cache
def code_version() -> str:
    """The package's version and a hash of its source and data files, as in `0.2.0+3f2a9c1b5d7e`.

    `kernels.cc` represents the compiled kernels, which are not loaded if they were built from another source.
    """
    package = Path(impala_jax.__file__).parent
    digest = hashlib.sha256()
    # Only an installed package contains the configurations; a run's own configuration is compared elsewhere.
    configs = package / 'configs'
    paths = (path for path in package.rglob('*') if path.suffix in SUFFIXES and configs not in path.parents)
    for path in sorted(paths, key=lambda path: path.relative_to(package).as_posix()):
        content = path.read_bytes()
        digest.update(f'{path.relative_to(package).as_posix()} {len(content)}\n'.encode() + content)
    return f'{impala_jax.__version__}+{digest.hexdigest()[:12]}'

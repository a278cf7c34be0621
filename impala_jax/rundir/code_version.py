"""Which code a program runs: programs that work on one run together must all run the same."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import impala_jax

SUFFIXES = ('.cc', '.csv', '.py')
"""Of the files that decide what is computed. Which instructions the kernels were compiled to does not matter: machines
with different processors work together."""


@functools.cache
def code_version() -> str:
    """The version and a hash of the package's source and data files, as in `0.2.0+3f2a9c1b5d7e`.

    `kernels.cc` stands for the compiled kernels: those of another source are not loaded.
    """
    package = Path(impala_jax.__file__).parent
    digest = hashlib.sha256()
    # Installed packages have configurations inside, checkouts do not; the one of a run is compared by itself.
    configs = package / 'configs'
    paths = (path for path in package.rglob('*') if path.suffix in SUFFIXES and configs not in path.parents)
    for path in sorted(paths, key=lambda path: path.relative_to(package).as_posix()):
        content = path.read_bytes()
        digest.update(f'{path.relative_to(package).as_posix()} {len(content)}\n'.encode() + content)
    return f'{impala_jax.__version__}+{digest.hexdigest()[:12]}'

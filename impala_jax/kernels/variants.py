"""The variants of the compiled kernels, and the environment variable that selects one of them or none."""

from __future__ import annotations

import os

from impala_jax.config import ConfigError

VARIABLE = 'IMPALA_JAX_KERNELS'
"""Environment variable: auto (the default), off, or a name in `VARIANTS`."""

VARIANTS = {'avx512': ('avx512f', 'avx512vl', 'avx512bw', 'avx512dq', 'avx2', 'fma'), 'avx2': ('avx2', 'fma')}
"""Instruction sets that each variant uses, by their names in Linux and in compilers; the fastest variant is first."""


def selected() -> tuple[str, ...]:
    """Returns the names of the variants that may be used, in order of preference.

    Raises:
      ConfigError: If the environment variable has an unknown value.
    """
    choice = os.environ.get(VARIABLE) or 'auto'
    if choice not in ('auto', 'off', *VARIANTS):
        raise ConfigError(f'{VARIABLE}={choice} is unknown; it must be auto, off, {" or ".join(VARIANTS)}')
    return {'auto': tuple(VARIANTS), 'off': ()}.get(choice, (choice,))

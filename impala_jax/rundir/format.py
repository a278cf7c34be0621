"""The number of the format of what a run writes: `config.json`, and the manifest of each checkpoint."""

from __future__ import annotations

import impala_jax

FORMAT = 2
"""Grows when an older version could not read, or would misread, what is written.

1: version 0.1, whose `config.json` has no number. 2: version 0.2."""


def problem(number: object) -> str:
    """Why files of this format cannot be read, in half a sentence; '' if they can.

    Args:
      number: as it stands in the file.
    """
    if isinstance(number, int) and 1 <= number <= FORMAT:
        return ''
    return (
        f'has format {number!r}, and impala_jax {impala_jax.__version__} reads formats 1 to {FORMAT}: use the version '
        'that wrote it, or a newer one'
    )

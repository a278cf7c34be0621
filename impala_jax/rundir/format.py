"""Format number of the files that a run writes: `config.json`, `population.json`, and each checkpoint's manifest."""

from __future__ import annotations

import impala_jax

FORMAT = 2
"""Current format; increased when an older version of the package cannot read the files, or would misread them.

1: version 0.1, whose `config.json` and `population.json` have no format number. 2: version 0.2.
"""


def problem(number: object) -> str:
    """Returns why files of this format cannot be read, as a predicate ("has format ..."); '' if they can.

    Args:
      number: Format number found in the file, of any type.
    """
    if isinstance(number, int) and 1 <= number <= FORMAT:
        return ''
    return (
        f'has format {number!r}, and impala_jax {impala_jax.__version__} reads formats 1 to {FORMAT}: use the version '
        'that wrote it, or a newer one'
    )

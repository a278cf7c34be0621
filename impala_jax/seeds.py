"""Seeds of the parts of a run, derived from the run's."""

from __future__ import annotations

import numpy as np


def sequence(*entropy: int) -> np.random.SeedSequence:
    """Randomness that is independent of that of any other `entropy`.

    Args:
      *entropy: any number of integers in [0, 2**64).
    """
    # By itself, SeedSequence takes (5), (5, 0) and (5, 0, 0) for the same, and (1, 2) for (1 + 2**33).
    words = [word for number in entropy for word in divmod(number, 2**32)]
    return np.random.SeedSequence([*words, len(entropy)])


def derived_seed(*entropy: int) -> int:
    """A seed in [0, 2**31), independent of that of any other `entropy`; see `sequence`."""
    return int(sequence(*entropy).generate_state(1)[0] >> 1)

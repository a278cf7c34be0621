"""Seeds for the parts of a run, derived from the seed of the run."""

from __future__ import annotations

import numpy as np


def sequence(*entropy: int) -> np.random.SeedSequence:
    """Returns a seed sequence that is independent of the sequence of any other `entropy`.

    Args:
      *entropy: Any number of integers in [0, 2**64).
    """
    # SeedSequence itself does not distinguish (5), (5, 0) and (5, 0, 0), nor (1, 2) and (1 + 2**33).
    words = [word for number in entropy for word in divmod(number, 2**32)]
    return np.random.SeedSequence([*words, len(entropy)])


def derived_seed(*entropy: int) -> int:
    """Returns a seed in [0, 2**31) that is independent of the seed of any other `entropy`; see `sequence`."""
    return int(sequence(*entropy).generate_state(1)[0] >> 1)

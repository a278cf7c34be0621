"""The number of updates in a call of a compiled program."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from impala_jax.config import Config

_CALL_S = 1.0  # Wanted time of a call, after which signals and checkpoints are looked at.


class Pace:
    """Divides a run into calls of about a second. Results do not depend on it.

    Args:
      config: Configuration of the run.
      size: Largest number of updates in a call.
    """

    def __init__(self, config: Config, size: int):
        self._interval, self._total, self._size = config.logging.interval_updates, config.total_updates, size
        self._next = 1

    @contextlib.contextmanager
    def call(self, num_updates: int) -> Iterator[int]:
        """Measures the body of the `with`, a call after `num_updates` updates; yields its number of updates.

        A call ends at the latest where a row of metrics is due, because rows must not depend on the clock.
        """
        count = min(self._next, self._size, self._total - num_updates, self._interval - num_updates % self._interval)
        start = time.monotonic()
        yield count
        took = max(time.monotonic() - start, 1e-6)
        self._next = max(1, min(2 * self._next, int(count * _CALL_S / took)))

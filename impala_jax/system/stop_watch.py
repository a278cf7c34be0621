"""Processes that are stopped, as by SIGSTOP: nobody waits for them for ever."""

from __future__ import annotations

import time

STOPPED_S = 30.0  # Longest time for which a process may be stopped; JAX notices it after two minutes.


class StopWatch:
    """Measures for how long a process has been stopped, as by SIGSTOP; to be polled."""

    def __init__(self, process: int):
        self._path = f'/proc/{process}/stat'
        self._since: float | None = None

    def too_long(self) -> bool:
        """Whether it is more than `STOPPED_S` since the first poll that found the process stopped; False if it runs."""
        try:
            with open(self._path) as file:
                state = file.read().rpartition(')')[2].split()[0]
        except OSError:  # The process has ended, or there is no /proc.
            state = ''
        if state != 'T':
            self._since = None
            return False
        self._since = self._since or time.monotonic()
        return time.monotonic() - self._since > STOPPED_S

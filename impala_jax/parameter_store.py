"""The parameter store between learner and actors: its protocol, and an implementation within a process."""

from __future__ import annotations

import threading
from typing import Protocol

from impala_jax.types import Closed, PyTree


class ParameterStore(Protocol):
    """A store of the newest parameters, safe for threads."""

    def publish(self, version: int, params: PyTree) -> None:
        """Replaces the parameters.

        Args:
          version: Number of learner updates.
          params: Parameters, NumPy arrays that are not modified afterwards.
        """
        ...

    def latest(self) -> tuple[int, PyTree]:
        """Returns the newest version and parameters; waits for the first ones.

        Raises:
          Closed: If the store is closed.
          TimeoutError: If no parameters are published in time.
        """
        ...

    def close(self) -> None:
        """Ends all waits, present and future, with `Closed`; further calls do nothing."""
        ...


class LocalParameterStore:
    """A `ParameterStore` for the threads of one process.

    Args:
      timeout_s: Longest wait for the first parameters, in seconds.
    """

    def __init__(self, timeout_s: float):
        self._timeout_s = timeout_s
        self._latest: tuple[int, PyTree] | None = None
        self._closed = False
        self._changed = threading.Condition()

    def publish(self, version: int, params: PyTree) -> None:
        """Replaces the parameters; they are not copied."""
        with self._changed:
            self._latest = (version, params)
            self._changed.notify_all()

    def latest(self) -> tuple[int, PyTree]:
        """Returns the newest version and parameters; waits for the first ones."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._closed or self._latest is not None, self._timeout_s):
                raise TimeoutError(f'waited {self._timeout_s:g} s for the learner to publish its first parameters')
            if self._closed:
                raise Closed
            assert self._latest is not None
            return self._latest

    def close(self) -> None:
        """Ends all waits with `Closed`."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

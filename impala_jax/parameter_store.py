"""The way of the parameters from learner to actors: its protocol, and the one that lives in the process."""

from __future__ import annotations

import threading
from typing import Protocol

from impala_jax.types import Closed, PyTree


class ParameterStore(Protocol):
    """Holds the newest parameters. All methods may be called by threads."""

    def publish(self, version: int, params: PyTree) -> None:
        """Replaces the parameters; `params` are numpy arrays that nobody writes to afterwards."""
        ...

    def latest(self) -> tuple[int, PyTree]:
        """The newest parameters and their version (learner updates done); waits for the first ones.

        Raises:
          Closed: the store was closed.
          TimeoutError: nothing was ever published.
        """
        ...

    def close(self) -> None:
        """Ends all waits, now and later, with `Closed`. May be called twice."""
        ...


class LocalParameterStore:
    """A `ParameterStore` for the threads of one process."""

    def __init__(self, timeout_s: float):
        self._timeout_s = timeout_s
        self._latest: tuple[int, PyTree] | None = None
        self._closed = False
        self._changed = threading.Condition()

    def publish(self, version: int, params: PyTree) -> None:
        with self._changed:
            self._latest = (version, params)
            self._changed.notify_all()

    def latest(self) -> tuple[int, PyTree]:
        with self._changed:
            if not self._changed.wait_for(lambda: self._closed or self._latest is not None, self._timeout_s):
                raise TimeoutError(f'waited {self._timeout_s:g} s for the learner to publish its first parameters')
            if self._closed:
                raise Closed
            assert self._latest is not None
            return self._latest

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

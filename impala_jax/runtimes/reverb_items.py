"""Items of Reverb tables: sealed when they are written, verified when they are read, with bounded waits.

Reverb has no authentication. Every item carries a seal (`seals`); those that do not fit are dropped and counted.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import reverb
from reverb.errors import DeadlineExceededError

from impala_jax.runtimes.seals import Opened, Opener, Refusals, Refused, Sealer
from impala_jax.types import Closed

_ANSWER_TIMEOUT_S = 10
STOP_NOTICE_S = 3.0
SLICE_MS = 200  # How long a wait goes on before it looks whether the run has ended.
_AFTER_MALFORMED_S = 0.05
_T = TypeVar('_T')


class ServerLost(ConnectionError):
    """The server cannot be reached, or has failed. (Reverb's own errors share no base class.)"""


class ServerTimeout(ServerLost, TimeoutError):
    """It was waited for too long; the message says who waited for whom."""


class ItemWriter:
    """Seals and inserts items, lists of arrays, with a bounded wait."""

    def __init__(
        self,
        client: reverb.Client,
        tables: Sequence[str],
        sealer: Sealer,
        closed: threading.Event,
        timeout_s: float,
        waits_for: str,
    ):
        self._writer = client.trajectory_writer(num_keep_alive_refs=1, validate_items=False)
        self._tables = tables
        self._sealer = sealer
        self._closed = closed
        self._timeout_s = timeout_s
        self._waits_for = waits_for

    def write(self, items: Sequence[list[Any]]) -> None:
        """Returns when the server has them all: they are sent together, which takes half as long as one by one."""
        unless_closed(lambda: self._write(items), self._closed)

    def _write(self, items: Sequence[list[Any]]) -> None:
        for leaves in items:
            self._writer.append([*leaves, self._sealer.seal(leaves)])
            history: Any = self._writer.history
            for table in self._tables:
                self._writer.create_item(table, 1.0, [column[-1:] for column in history])
        deadline = time.monotonic() + self._timeout_s
        while not self._closed.is_set():
            try:
                self._writer.flush(timeout_ms=SLICE_MS)
                return
            except DeadlineExceededError:
                if time.monotonic() > deadline:
                    raise ServerTimeout(f'waited {self._timeout_s:g} s for {self._waits_for}') from None
        raise Closed


def read_items(
    client: reverb.Client,
    table: str,
    opener: Opener,
    refusals: Refusals,
    closed: threading.Event,
    num_samples: int = 1 << 30,
    *,
    once: bool,
) -> Iterator[Opened | None]:
    """A table's items; None for one that does not fit, or with `once` was there before. Waits for each without end.

    Raises:
      Exception: What Reverb's client raises when the server is gone.
    """
    newest: dict[bytes, int] = {}  # of each writer, whose items keep their order
    num_left = num_samples
    while num_left and not closed.is_set():
        try:
            sample: Any
            for sample in client.sample(table, num_left, emit_timesteps=False):
                num_left -= 1
                try:
                    opened = opener.open([np.asarray(column) for column in sample.data])
                    if once and opened.count <= newest.get(opened.writer, -1):
                        raise Refused('it was read before')
                    newest[opened.writer] = opened.count
                except Refused as reason:
                    refusals.add(reason)
                    opened = None
                yield opened
        except Exception as error:
            # Reverb's client raises all kinds for an item that it cannot unpack, and where the server is gone.
            try:
                table_info(client, table)
            except Exception:
                raise error from None
            num_left -= 1
            refusals.add(error)
            closed.wait(_AFTER_MALFORMED_S)
            yield None


def table_info(client: reverb.Client, table: str) -> Any:
    """What the server tells of a table; raises KeyError if it has none of that name."""
    return client.server_info(timeout=_ANSWER_TIMEOUT_S)[table]


def unless_closed(fn: Callable[[], _T], closed: threading.Event) -> _T:
    """Calls, and takes any failure of a server that is going away for the end of the run."""
    if closed.is_set():
        raise Closed
    try:
        return fn()
    except (Closed, ServerTimeout):
        raise
    except Exception as error:
        # Reverb's errors share no base class. A server that stops may do so a moment before this node is told.
        if closed.wait(STOP_NOTICE_S):
            raise Closed from None
        raise ServerLost(f'{type(error).__name__}: {error}') from error

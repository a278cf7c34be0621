"""Items of Reverb tables, sealed when written and verified when read, with bounded waits.

Reverb has no authentication. Every item carries a seal (`seals`); items that fail verification are dropped and counted.
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
SLICE_MS = 200  # Time after which a wait checks whether the run has ended, in milliseconds.
_AFTER_MALFORMED_S = 0.05
_T = TypeVar('_T')


class ServerLost(ConnectionError):
    """The server cannot be reached, or has failed; Reverb's own errors have no common base class."""


class ServerTimeout(ServerLost, TimeoutError):
    """A wait for the server took too long; the message says what was waited for."""


class ItemWriter:
    """Seals and inserts items, which are lists of arrays, with a bounded wait.

    Args:
      client: Client of the server.
      tables: Names of the tables into which each item is inserted.
      sealer: Sealer of the items.
      closed: Event that ends a wait with `Closed`.
      timeout_s: Longest wait for room in the tables, in seconds.
      waits_for: Phrase for the message of a timeout.
    """

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
        """Sends items together, which takes half as long as one by one, and waits until the server has them.

        Raises:
          Closed: If `closed` is set.
          ServerLost: If the server cannot be reached.
          ServerTimeout: If the tables stay full for `timeout_s`.
        """
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
    """Yields the items of a table, and None for each refused item; waits for each without a timeout.

    Args:
      client: Client of the server.
      table: Name of the table.
      opener: Verifier of the items.
      refusals: Counter of refused items.
      closed: Event that ends the iteration.
      num_samples: Number of items to read.
      once: Whether to refuse an item that was read before.

    Raises:
      Exception: If the server is gone; the type is that of Reverb's client.
    """
    newest: dict[bytes, int] = {}  # Highest count per writer; the items of a writer are in order.
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
            # Reverb's client raises many types, both for an item that it cannot unpack and for a lost server.
            try:
                table_info(client, table)
            except Exception:
                raise error from None
            num_left -= 1
            refusals.add(error)
            closed.wait(_AFTER_MALFORMED_S)
            yield None


def table_info(client: reverb.Client, table: str) -> Any:
    """Returns the server's information on a table; raises KeyError if there is no such table."""
    return client.server_info(timeout=_ANSWER_TIMEOUT_S)[table]


def unless_closed(fn: Callable[[], _T], closed: threading.Event) -> _T:
    """Calls `fn`; raises Closed for a failure of the server if the run is ending, else ServerLost."""
    if closed.is_set():
        raise Closed
    try:
        return fn()
    except (Closed, ServerTimeout):
        raise
    except Exception as error:
        # Reverb's errors have no common base class. A server may stop shortly before this node is notified.
        if closed.wait(STOP_NOTICE_S):
            raise Closed from None
        raise ServerLost(f'{type(error).__name__}: {error}') from error

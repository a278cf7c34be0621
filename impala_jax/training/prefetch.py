"""Prefetching: the next batch is fetched and transferred during the current update."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from impala_jax.types import Closed

_Batch = TypeVar('_Batch')
_logger = logging.getLogger(__name__)


class Prefetcher(Generic[_Batch]):
    """Fetches, assembles and transfers the next batch in a thread, during the current update.

    Args:
      fetch: Function that returns a batch, called in the thread; `get` raises its exceptions, such as `Closed`.
    """

    def __init__(self, fetch: Callable[[], _Batch]):
        self._batches: queue.Queue[_Batch | BaseException] = queue.Queue(maxsize=1)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(fetch,), name='prefetch', daemon=True)
        self._thread.start()

    def get(self, stop: threading.Event) -> _Batch:
        """Waits for the next batch; the wait is bounded because `fetch` is.

        Raises:
          Closed: If the queue was closed or `stop` was set.
        """
        while not stop.is_set():
            try:
                item = self._batches.get(timeout=0.1)
            except queue.Empty:
                continue
            if isinstance(item, BaseException):
                raise item
            return item
        raise Closed

    def close(self) -> None:
        """Ends the thread; the queue from which it fetches must be closed already."""
        self._closed.set()
        self._thread.join(timeout=10.0)
        if self._thread.is_alive():
            _logger.warning('the prefetch thread did not end within 10 s')

    def _run(self, fetch: Callable[[], _Batch]) -> None:
        item: _Batch | BaseException
        while not self._closed.is_set():
            try:
                item = fetch()
            except BaseException as error:  # noqa: BLE001 - raised by `get` in the learner's thread.
                item = error
            while not self._closed.is_set():
                try:
                    self._batches.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return

"""Trajectory queue and parameter store over Reverb, with trajectories and parameters as plain tensors."""

from __future__ import annotations

import logging
import queue
import threading
import time
from typing import Any

import jax
import numpy as np
import reverb

from impala_jax.agent import Agent
from impala_jax.runtimes import seals
from impala_jax.runtimes.host_share import HostShare
from impala_jax.runtimes.reverb_items import (
    SLICE_MS,
    STOP_NOTICE_S,
    ItemWriter,
    ServerLost,
    ServerTimeout,
    read_items,
    table_info,
    unless_closed,
)
from impala_jax.runtimes.reverb_tables import PARAMETERS, REPLAY, REPLAY_IN_ORDER, TRAJECTORIES
from impala_jax.runtimes.seals import Opened, Opener, Refusals, Sealer
from impala_jax.trajectory_queue import LocalTrajectoryQueue, batch_size, columns, concatenate
from impala_jax.types import Closed, PyTree, Trajectory

_logger = logging.getLogger(__name__)
_WRITTEN_TOGETHER = 64  # Number of trajectories.
_CHECK_S = 1.0  # Interval at which the writer of parameters checks that they are still in the table.


class ReverbTrajectoryQueue:
    """A `TrajectoryQueue` over Reverb tables, for use in several processes. An item is a trajectory of one environment.

    Args:
      client: Client of the server with `tables`.
      key: Key of this start of the run, [32] bytes; items that were not written with it are dropped.
      share: This host's share of the experiment. A batch has `num_fresh` trajectories from the queue, then
        `num_replayed` from replay.
      agent: Agent that determines the structure of trajectories.
      suffix: Suffix of the tables' names, as in `tables`.
    """

    def __init__(self, client: reverb.Client, key: bytes, share: HostShare, agent: Agent, suffix: str = ''):
        self._client = client
        self._key = key
        self._closed = threading.Event()
        self._timeout_s = share.timeout_s
        self._writer: ItemWriter | None = None
        self._replay_tables = [REPLAY + suffix, REPLAY_IN_ORDER + suffix] if share.num_replayed else []
        self._tables = [TRAJECTORIES + suffix, *self._replay_tables]
        example = agent.empty_trajectory(share.unroll_length, 1)
        self._structure = jax.tree.structure(example)
        self._fresh = Opener(key, [seals.TRAJECTORY], jax.tree.leaves(example))
        self._replayed = Opener(key, [seals.TRAJECTORY, seals.REPLAYED], jax.tree.leaves(example))
        tables = [(TRAJECTORIES, self._fresh, share.num_fresh), (REPLAY, self._replayed, share.num_replayed)]
        self._readers = [
            _Reader(
                client, table + suffix, num, self._structure, opener, self._closed, self._timeout_s, table != REPLAY
            )
            for table, opener, num in tables
            if num
        ]

    def put(self, trajectories: Trajectory) -> None:
        """Writes trajectories [T + 1, N]; waits while the queue is full."""
        if self._writer is None:
            waits_for = 'the learner to take trajectories from a full queue'
            sealer = Sealer(self._key, seals.TRAJECTORY)
            self._writer = ItemWriter(self._client, self._tables, sealer, self._closed, self._timeout_s, waits_for)
        self._writer.write(_items(trajectories))

    def put_replay(self, trajectories: Trajectory) -> None:
        """Fills the replay tables with trajectories [T + 1, N], oldest first; raises the errors of `put`."""
        sealer = Sealer(self._key, seals.REPLAYED)
        writer = ItemWriter(
            self._client, self._replay_tables, sealer, self._closed, self._timeout_s, 'the replay tables'
        )
        for start in range(0, batch_size(trajectories), _WRITTEN_TOGETHER):
            writer.write(_items(columns(trajectories, start, start + _WRITTEN_TOGETHER)))

    def take_replay(self) -> Trajectory | None:
        """Removes all trajectories from replay; can be called after `close`.

        Returns:
          Trajectories [T + 1, N], oldest first; None if there are none.

        Raises:
          ServerLost: If the server cannot be reached.
          TimeoutError: If the server does not answer in time.
        """
        table = self._replay_tables[-1]
        size = table_info(self._client, table).current_size
        if not size:
            return None
        refusals, closed = Refusals(table), threading.Event()
        taken: list[Trajectory] = []
        errors: list[Exception] = []

        def take() -> None:
            try:
                for opened in read_items(self._client, table, self._replayed, refusals, closed, size, once=True):
                    if opened is not None:
                        taken.append(jax.tree.unflatten(self._structure, opened.leaves))
            except Exception as error:  # Reverb's errors have no common base class.
                errors.append(error)

        thread = threading.Thread(target=take, name=f'reverb reader of {table}', daemon=True)
        thread.start()
        thread.join(self._timeout_s)
        closed.set()
        if errors:
            raise ServerLost(f'{type(errors[0]).__name__}: {errors[0]}') from errors[0]
        if thread.is_alive():
            raise ServerTimeout(f'waited {self._timeout_s:g} s for the replay tables')
        return concatenate(taken) if taken else None

    @property
    def replay_size(self) -> int:
        """Number of trajectories in replay."""
        return table_info(self._client, self._replay_tables[0]).current_size

    @property
    def num_refused(self) -> int:
        """Number of items that failed verification and were dropped."""
        return sum(reader.refusals.count for reader in self._readers)

    def get_batch(self) -> Trajectory:
        """Waits for a batch [T + 1, B]: new trajectories, then replayed ones."""
        return concatenate([reader.get() for reader in self._readers])

    def close(self) -> None:
        """Ends all waits of this process with `Closed`."""
        self._closed.set()
        for reader in self._readers:
            reader.close()


def _items(trajectories: Trajectory) -> list[list[np.ndarray]]:
    """Trajectories [T + 1, N] as N lists of arrays."""
    return [
        [np.ascontiguousarray(leaf) for leaf in jax.tree.leaves(columns(trajectories, i, i + 1))]
        for i in range(batch_size(trajectories))
    ]


class _Reader:
    """Reads a table of trajectories in a thread, so that the wait for a batch is bounded, as Reverb's own is not."""

    def __init__(
        self,
        client: reverb.Client,
        table: str,
        num_trajectories: int,
        structure: PyTree,
        opener: Opener,
        closed: threading.Event,
        timeout_s: float,
        once: bool,
    ):
        self.refusals = Refusals(table)
        self._client = client
        self._table = table
        self._structure = structure
        self._opener = opener
        self._once = once
        self._closed = closed
        self._read = LocalTrajectoryQueue(num_trajectories, num_trajectories, timeout_s)
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def get(self) -> Trajectory:
        """Returns the next trajectories; starts the thread at the first call."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=f'reverb reader of {self._table}', daemon=True)
            self._thread.start()
        try:
            return self._read.get_batch()
        except Closed:
            if self._error is not None:
                raise self._error from None
            raise

    def close(self) -> None:
        """Ends the wait of `get` with `Closed`."""
        self._read.close()

    def _run(self) -> None:
        """Moves items from the server to `_read` until the server fails or the queue is closed."""
        try:
            for opened in read_items(
                self._client, self._table, self._opener, self.refusals, self._closed, once=self._once
            ):
                if opened is not None:
                    self._read.put(jax.tree.unflatten(self._structure, opened.leaves))
        except Closed:
            return
        except Exception as error:  # Reverb's errors have no common base class; `get` raises it.
            if not self._closed.wait(STOP_NOTICE_S):
                self._error = error
                self._read.close()


class ReverbParameterStore:
    """A `ParameterStore` over a Reverb table of size 1.

    `latest` never returns items that fail verification, nor parameters older than those of the last call. The writer
    checks every second whether another client has written to the table or emptied it, and then publishes again.

    Args:
      client: Client of the server with `tables`.
      key: Key of this start of the run, [32] bytes.
      structure: Parameters with the shapes and dtypes of the experiment.
      timeout_s: Longest wait, in seconds.
      table: Name of the table.
      purpose: Purpose of the items, one of those in `seals`.
    """

    def __init__(
        self,
        client: reverb.Client,
        key: bytes,
        structure: PyTree,
        timeout_s: float,
        table: str = PARAMETERS,
        purpose: bytes = seals.PARAMETERS,
    ):
        self._client = client
        self._table = table
        leaves, self._treedef = jax.tree.flatten(structure)
        self._opener = Opener(key, [purpose], [np.int64(0), *leaves])
        self._timeout_s = timeout_s
        self._closed = threading.Event()
        self._sealer = Sealer(key, purpose)
        self._writer: ItemWriter | None = None
        self._newest: tuple[int, PyTree] | None = None  # Newest version and parameters that were read.
        self._refusals = Refusals(table)
        # Samples in a thread, because a client waits forever if its server stops in the middle of a sample.
        self._requests: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Opened | Exception | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._published: list[Any] | None = None
        self._publishing = threading.Lock()
        self._num_inserts = 0  # Expected number of inserts into the table.

    def publish(self, version: int, params: PyTree) -> None:
        """Writes parameters into the table; waits at most `timeout_s`."""
        with self._publishing:
            if self._writer is None:
                waits_for = 'the parameter server'
                self._writer = ItemWriter(
                    self._client, [self._table], self._sealer, self._closed, self._timeout_s, waits_for
                )
                threading.Thread(target=self._restore, name=f'checker of {self._table}', daemon=True).start()
            self._published = [np.int64(version), *jax.tree.leaves(params)]
            self._num_inserts += 1
            self._writer.write([self._published])

    def latest(self) -> tuple[int, PyTree]:
        """Returns the newest version and parameters; waits at most `timeout_s` for the first ones."""
        deadline = time.monotonic() + self._timeout_s
        while not self._closed.is_set():
            opened = unless_closed(lambda: self._sample(deadline), self._closed)
            if opened is not None:
                version, *leaves = opened.leaves
                # For the same version it returns the same object, which actors need not transfer again.
                if self._newest is None or int(version) > self._newest[0]:
                    self._newest = int(version), jax.tree.unflatten(self._treedef, leaves)
                elif int(version) < self._newest[0]:
                    self._refusals.add(f'it has version {version}, and {self._newest[0]} was there before')
            if self._newest is not None:
                return self._newest
            if time.monotonic() > deadline:
                raise ServerTimeout(f'waited {self._timeout_s:g} s for the learner to publish its first parameters')
            self._closed.wait(SLICE_MS / 1000)
        raise Closed

    def close(self) -> None:
        """Ends all waits of this process with `Closed`."""
        self._closed.set()
        self._requests.put(False)

    def _sample(self, deadline: float) -> Opened | None:
        """Returns the item in the table; None if the table is empty or the item fails verification.

        Waits in slices for the thread, which itself waits without a timeout.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name='reverb reader of parameters', daemon=True)
            self._thread.start()
        self._requests.put(True)
        while not self._closed.is_set():
            try:
                answer = self._answers.get(timeout=SLICE_MS / 1000)
            except queue.Empty:
                if time.monotonic() > deadline:
                    raise ServerTimeout(f'waited {self._timeout_s:g} s for the parameter server') from None
                continue
            if isinstance(answer, Exception):
                raise answer
            return answer
        raise Closed

    def _run(self) -> None:
        while self._requests.get():
            try:
                # A sample from an empty table would wait forever.
                filled = table_info(self._client, self._table).current_size
                opened = read_items(
                    self._client, self._table, self._opener, self._refusals, self._closed, 1, once=False
                )
                self._answers.put(next(opened, None) if filled else None)
            except Exception as error:  # Reverb's errors have no common base class; `latest` raises it.
                self._answers.put(error)

    def _restore(self) -> None:
        """Publishes again if another client has changed the table; ends with the server, which `publish` reports."""
        refusals = Refusals(self._table)
        try:
            while not self._closed.wait(_CHECK_S):
                with self._publishing:
                    info = table_info(self._client, self._table)
                    inserts = info.rate_limiter_info.insert_stats.completed
                    if info.current_size and inserts == self._num_inserts:
                        continue
                    refusals.add('it replaced the newest, which is written again')
                    self._num_inserts = inserts + 1
                    assert self._writer is not None and self._published is not None
                    self._writer.write([self._published])
        except Exception as error:  # Reverb's errors have no common base class.
            _logger.debug('the table %s is no longer checked: %s', self._table, error)

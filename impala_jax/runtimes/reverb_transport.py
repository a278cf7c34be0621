"""Queue and store over Reverb: trajectories and parameters cross as plain tensors, through one server and one port."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
import reverb
from reverb.errors import DeadlineExceededError

from impala_jax.agent import Agent
from impala_jax.config import Config
from impala_jax.trajectory_queue import LocalTrajectoryQueue, batch_size, columns, concatenate
from impala_jax.types import Closed, PyTree, Trajectory

_logger = logging.getLogger(__name__)

_T = TypeVar('_T')

TRAJECTORIES = 'trajectories'
REPLAY = 'replay'
REPLAY_IN_ORDER = 'replay_in_order'
"""The items of the replay table once more, without copies, to be read out one by one: a table is only ever sampled."""
PARAMETERS = 'parameters'
SESSION = 'session'
"""What actors of other machines must know of a run, where they may join; see `reverb_actors`."""
_ANSWER_TIMEOUT_S = 10
_WRITTEN_TOGETHER = 64  # trajectories
_STOP_NOTICE_S = 3.0
_SLICE_MS = 200  # How long a wait goes on before it looks whether the run has ended.


class ServerLost(ConnectionError):
    """The server cannot be reached, or has failed. (Reverb's own errors share no base class.)"""


class ServerTimeout(ServerLost, TimeoutError):
    """It was waited for too long; the message says who waited for whom."""


def tables(config: Config, suffix: str = '') -> list[reverb.Table]:
    """The server's tables: a first-in-first-out queue of trajectories, the newest parameters only, and replay.

    A trajectory is written into queue and replay at once, and stored once.

    Args:
      config: the experiment.
      suffix: of the tables' names; another one at each start of a program that serves the same port. Reverb's clients
        go on by themselves with whatever server comes after the one they lost, with trajectories that may not fit
        there: the new one then has no table of that name, and refuses them.
    """
    replay = reverb.Table(
        REPLAY + suffix,
        sampler=reverb.selectors.Uniform(),
        remover=reverb.selectors.Fifo(),
        max_size=config.replay.capacity,
        rate_limiter=reverb.rate_limiters.MinSize(1),
    )
    in_order = reverb.Table(
        REPLAY_IN_ORDER + suffix,
        sampler=reverb.selectors.Fifo(),
        remover=reverb.selectors.Fifo(),
        max_size=config.replay.capacity,
        max_times_sampled=1,
        rate_limiter=reverb.rate_limiters.MinSize(1),
    )
    return [
        reverb.Table.queue(TRAJECTORIES + suffix, max_size=config.queue_capacity),
        *([replay, in_order] if config.num_replayed else []),
        _newest(PARAMETERS + suffix),
        *([_newest(SESSION)] if config.serve_actors is not None else []),
    ]


def _newest(name: str) -> reverb.Table:
    """A table that keeps its newest item only."""
    return reverb.Table(
        name,
        sampler=reverb.selectors.Lifo(),
        remover=reverb.selectors.Fifo(),
        max_size=1,
        rate_limiter=reverb.rate_limiters.MinSize(1),
    )


class _Writer:
    """Inserts items, lists of arrays, with a bounded wait."""

    def __init__(
        self, client: reverb.Client, tables: Sequence[str], closed: threading.Event, timeout_s: float, waits_for: str
    ):
        self._writer = client.trajectory_writer(num_keep_alive_refs=1, validate_items=False)
        self._tables = tables
        self._closed = closed
        self._timeout_s = timeout_s
        self._waits_for = waits_for

    def write(self, items: Sequence[list[Any]]) -> None:
        """Returns when the server has them all: they are sent together, which takes half as long as one by one."""
        _unless_closed(lambda: self._write(items), self._closed)

    def _write(self, items: Sequence[list[Any]]) -> None:
        for leaves in items:
            self._writer.append(leaves)
            history: Any = self._writer.history
            for table in self._tables:
                self._writer.create_item(table, 1.0, [column[-1:] for column in history])
        deadline = time.monotonic() + self._timeout_s
        while not self._closed.is_set():
            try:
                self._writer.flush(timeout_ms=_SLICE_MS)
                return
            except DeadlineExceededError:
                if time.monotonic() > deadline:
                    raise ServerTimeout(f'waited {self._timeout_s:g} s for {self._waits_for}') from None
        raise Closed


class ReverbTrajectoryQueue:
    """A `TrajectoryQueue` over Reverb tables. Each process may hold one; a trajectory of one environment is one item.

    Args:
      client: of the server with `tables`.
      config: the experiment; a batch has `num_fresh` trajectories of the queue, then `num_replayed` of replay.
      agent: gives the structure of what is read.
      suffix: as that of `tables`.
    """

    def __init__(self, client: reverb.Client, config: Config, agent: Agent, suffix: str = ''):
        self._client = client
        self._closed = threading.Event()
        self._timeout_s = config.timeout_s
        self._writer: _Writer | None = None
        self._replay_tables = [REPLAY + suffix, REPLAY_IN_ORDER + suffix] if config.num_replayed else []
        self._tables = [TRAJECTORIES + suffix, *self._replay_tables]
        self._structure = structure = agent.trajectory_structure()
        self._readers = [
            _Reader(client, table + suffix, num_trajectories, structure, self._closed, self._timeout_s)
            for table, num_trajectories in ((TRAJECTORIES, config.num_fresh), (REPLAY, config.num_replayed))
            if num_trajectories
        ]

    def put(self, trajectories: Trajectory) -> None:
        if self._writer is None:
            waits_for = 'the learner to take trajectories from a full queue'
            self._writer = _Writer(self._client, self._tables, self._closed, self._timeout_s, waits_for)
        self._writer.write(_items(trajectories))

    def put_replay(self, trajectories: Trajectory) -> None:
        """Fills the replay tables with trajectories [T + 1, N], the oldest first; raises as `put`."""
        writer = _Writer(self._client, self._replay_tables, self._closed, self._timeout_s, 'the replay tables')
        for start in range(0, batch_size(trajectories), _WRITTEN_TOGETHER):
            writer.write(_items(columns(trajectories, start, start + _WRITTEN_TOGETHER)))

    def take_replay(self) -> Trajectory | None:
        """Takes all that is replayed from its table, the oldest first; None if there is nothing. Works once `close`d.

        Raises:
          ServerLost, TimeoutError: the server is gone.
        """
        table = self._replay_tables[-1]
        size = self.replay_size
        if not size:
            return None
        closed = threading.Event()
        reader = _Reader(self._client, table, size, self._structure, closed, self._timeout_s)
        try:
            return reader.get()
        finally:
            closed.set()
            reader.close()

    @property
    def replay_size(self) -> int:
        """How many trajectories there are to sample from."""
        return self._client.server_info(timeout=_ANSWER_TIMEOUT_S)[self._replay_tables[0]].current_size

    def get_batch(self) -> Trajectory:
        return concatenate([reader.get() for reader in self._readers])

    def close(self) -> None:
        self._closed.set()
        for reader in self._readers:
            reader.close()


def _items(trajectories: Trajectory) -> list[list[np.ndarray]]:
    """Trajectories [T + 1, N] as a list of arrays each."""
    return [
        [np.ascontiguousarray(leaf) for leaf in jax.tree.leaves(columns(trajectories, i, i + 1))]
        for i in range(batch_size(trajectories))
    ]


class _Reader:
    """Reads a table of trajectories in a thread, so that the wait for a batch is bounded: Reverb's own is not."""

    def __init__(
        self,
        client: reverb.Client,
        table: str,
        num_trajectories: int,
        structure: PyTree,
        closed: threading.Event,
        timeout_s: float,
    ):
        self._client = client
        self._table = table
        self._structure = structure
        self._closed = closed
        self._read = LocalTrajectoryQueue(num_trajectories, num_trajectories, timeout_s)
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def get(self) -> Trajectory:
        """The next trajectories; starts the thread."""
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
        self._read.close()

    def _run(self) -> None:
        """Moves items from the server to `_read`; ends when the server or the queue does."""
        try:
            while not self._closed.is_set():
                for leaves in _samples(self._client, self._table, num_samples=1 << 30):
                    self._read.put(jax.tree.unflatten(self._structure, leaves))
        except Closed:
            return
        except Exception as error:  # Reverb's errors share no base class; `get` raises it.
            if not self._closed.wait(_STOP_NOTICE_S):
                self._error = error
                self._read.close()


class ReverbParameterStore:
    """A `ParameterStore` over a Reverb table that keeps the newest item only.

    Args:
      client: of the server with `tables`.
      structure: parameters of the experiment's shape; gives the structure of what is read.
      timeout_s: longest wait.
      table: its name.
    """

    def __init__(self, client: reverb.Client, structure: PyTree, timeout_s: float, table: str = PARAMETERS):
        self._client = client
        self._table = table
        self._treedef = jax.tree.structure(structure)
        self._timeout_s = timeout_s
        self._closed = threading.Event()
        self._writer: _Writer | None = None
        # A server that stops in the middle of a sample leaves its client waiting without end.
        self._requests: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[list[np.ndarray] | Exception | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def publish(self, version: int, params: PyTree) -> None:
        if self._writer is None:
            self._writer = _Writer(self._client, [self._table], self._closed, self._timeout_s, 'the parameter server')
        self._writer.write([[np.int64(version), *jax.tree.leaves(params)]])

    def latest(self) -> tuple[int, PyTree]:
        deadline = time.monotonic() + self._timeout_s
        while not self._closed.is_set():
            found = _unless_closed(lambda: self._sample(deadline), self._closed)
            if found is not None:
                version, *leaves = found
                return int(version), jax.tree.unflatten(self._treedef, leaves)
            if time.monotonic() > deadline:
                raise ServerTimeout(f'waited {self._timeout_s:g} s for the learner to publish its first parameters')
            self._closed.wait(_SLICE_MS / 1000)
        raise Closed

    def close(self) -> None:
        self._closed.set()
        self._requests.put(False)

    def _sample(self, deadline: float) -> list[np.ndarray] | None:
        """What the server has now; None if it has nothing yet. Waits in slices for a thread that waits without end."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name='reverb reader of parameters', daemon=True)
            self._thread.start()
        self._requests.put(True)
        while not self._closed.is_set():
            try:
                answer = self._answers.get(timeout=_SLICE_MS / 1000)
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
                # A sample from an empty table would wait without end.
                filled = self._client.server_info(timeout=10)[self._table].current_size
                self._answers.put(next(_samples(self._client, self._table, num_samples=1)) if filled else None)
            except Exception as error:  # Reverb's errors share no base class; `latest` raises it.
                self._answers.put(error)


def _samples(client: reverb.Client, table: str, num_samples: int) -> Iterator[list[np.ndarray]]:
    """The arrays of items as `_Writer` wrote them; waits for each without end."""
    sample: Any
    for sample in client.sample(table, num_samples, emit_timesteps=False):
        yield [np.asarray(column)[0] for column in sample.data]


def _unless_closed(fn: Callable[[], _T], closed: threading.Event) -> _T:
    """Calls, and takes any failure of a server that is going away for the end of the run."""
    if closed.is_set():
        raise Closed
    try:
        return fn()
    except (Closed, ServerTimeout):
        raise
    except Exception as error:
        # Reverb's errors share no base class. A server that stops may do so a moment before this node is told.
        if closed.wait(_STOP_NOTICE_S):
            raise Closed from None
        raise ServerLost(f'{type(error).__name__}: {error}') from error

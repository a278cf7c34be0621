"""The queue between actors and learner: its protocol, and the one that lives in the process."""

from __future__ import annotations

import collections
import threading
from typing import Protocol

import jax
import numpy as np

from impala_jax.types import Closed, Trajectory


class TrajectoryQueue(Protocol):
    """Bounded, first in first out; every trajectory is consumed exactly once. All methods may be called by threads."""

    def put(self, trajectories: Trajectory) -> None:
        """Appends trajectories [T + 1, N], numpy; blocks while the queue is full.

        Raises:
          Closed: the queue was closed.
          TimeoutError: it stayed full; the message says who waits for whom.
        """
        ...

    def get_batch(self) -> Trajectory:
        """Removes the oldest `batch_size` trajectories, [T + 1, batch_size]; blocks until there are as many.

        Raises:
          Closed: the queue was closed.
          TimeoutError: too few came; the message says who waits for whom.
        """
        ...

    def close(self) -> None:
        """Ends all waits, now and later, with `Closed`. May be called twice."""
        ...


class LocalTrajectoryQueue:
    """A `TrajectoryQueue` for the threads of one process.

    Args:
      batch_size: trajectories in a batch.
      capacity: trajectories that wait at most; one `put` may exceed it while there is less than a batch, so that an
        actor with more environments than there is room for is not stuck.
      timeout_s: longest wait.
    """

    def __init__(self, batch_size: int, capacity: int, timeout_s: float):
        self._batch_size = batch_size
        self._capacity = capacity
        self._timeout_s = timeout_s
        self._chunks: collections.deque[Trajectory] = collections.deque()
        self._size = 0
        self._closed = False
        self._changed = threading.Condition()

    def put(self, trajectories: Trajectory) -> None:
        num_trajectories = batch_size(trajectories)

        def has_room():
            # Without a whole batch the learner takes nothing: to wait for it would be to wait for ever.
            short = self._size < self._batch_size
            return self._closed or short or self._size + num_trajectories <= self._capacity

        with self._changed:
            if not self._changed.wait_for(has_room, self._timeout_s):
                raise TimeoutError(
                    f'an actor waited {self._timeout_s:g} s for the learner to take trajectories from a full queue '
                    f'({self._size} of {self._capacity}); is the learner stuck? raise timeout_s if it is only slow'
                )
            if self._closed:
                raise Closed
            self._chunks.append(trajectories)
            self._size += num_trajectories
            self._changed.notify_all()

    def get_batch(self) -> Trajectory:
        with self._changed:
            if not self._changed.wait_for(lambda: self._closed or self._size >= self._batch_size, self._timeout_s):
                raise TimeoutError(
                    f'the learner waited {self._timeout_s:g} s for actors to fill a batch ({self._size} of '
                    f'{self._batch_size} trajectories came); raise timeout_s if the environments are only slow'
                )
            if self._closed:
                raise Closed
            parts, missing = [], self._batch_size
            while missing:
                chunk = self._chunks.popleft()
                if batch_size(chunk) > missing:
                    self._chunks.appendleft(columns(chunk, missing, batch_size(chunk)))
                    chunk = columns(chunk, 0, missing)
                parts.append(chunk)
                missing -= batch_size(chunk)
            self._size -= self._batch_size
            self._changed.notify_all()
        return concatenate(parts)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def batch_size(trajectories: Trajectory) -> int:
    """B of trajectories [T + 1, B]."""
    return trajectories.version.shape[0]


def columns(trajectories: Trajectory, start: int, stop: int) -> Trajectory:
    """The trajectories of environments `start` to `stop - 1`, as views."""
    return _with_batch_axis(lambda axis, x: x[start:stop] if axis == 0 else x[:, start:stop], trajectories)


def concatenate(parts: list[Trajectory]) -> Trajectory:
    """Joins trajectories along their batch; a single part is not copied."""
    if len(parts) == 1:
        return parts[0]
    return _with_batch_axis(lambda axis, *xs: np.concatenate(xs, axis), *parts)


def _with_batch_axis(fn, *parts: Trajectory) -> Trajectory:
    """Maps `fn(batch_axis, *leaves)` over all leaves; the recurrent state and the version have no time axis."""
    fields = {
        name: jax.tree.map(
            lambda *xs, axis=0 if name in ('initial_state', 'version') else 1: fn(axis, *xs),
            *(getattr(part, name) for part in parts),
        )
        for name in Trajectory._fields
    }
    return Trajectory(**fields)

"""The queue between actors and learner: its protocol, an implementation within a process, and replay."""

from __future__ import annotations

import collections
import functools
import threading
from typing import Any, Protocol

import jax
import numpy as np

from impala_jax import seeds
from impala_jax.config import ConfigError
from impala_jax.types import Closed, PyTree, Trajectory, batch_axis


class TrajectoryQueue(Protocol):
    """A bounded first-in-first-out queue, safe for threads; every trajectory is consumed exactly once."""

    def put(self, trajectories: Trajectory) -> None:
        """Appends trajectories [T + 1, N], NumPy arrays; blocks while the queue is full.

        Raises:
          Closed: If the queue is closed.
          TimeoutError: If the queue stays full; the message says what was waited for.
        """
        ...

    def get_batch(self) -> Trajectory:
        """Removes and returns the oldest `batch_size` trajectories, [T + 1, batch_size]; blocks until they are there.

        Raises:
          Closed: If the queue is closed.
          TimeoutError: If too few trajectories arrive; the message says what was waited for.
        """
        ...

    def close(self) -> None:
        """Ends all waits, present and future, with `Closed`; further calls do nothing."""
        ...


class LocalTrajectoryQueue:
    """A `TrajectoryQueue` for the threads of one process.

    Args:
      batch_size: Number of trajectories per batch.
      capacity: Largest number of waiting trajectories. One `put` may exceed it while the queue holds less than a batch,
        so an actor with many environments cannot block forever.
      timeout_s: Longest wait, in seconds.
    """

    def __init__(self, batch_size: int, capacity: int, timeout_s: float):
        self._batch_size = batch_size
        self._capacity = capacity
        self._timeout_s = timeout_s
        self._chunks: collections.deque[Trajectory] = collections.deque()
        self._size = 0
        self._closed = False
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return self._size

    def put(self, trajectories: Trajectory) -> None:
        """Appends trajectories; they are not copied."""
        num_trajectories = batch_size(trajectories)

        def has_room():
            # The learner removes nothing before there is a whole batch, so waiting for it would never end.
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
        """Removes and returns a batch, splitting trajectories that were put together if necessary."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._closed or self._size >= self._batch_size, self._timeout_s):
                raise TimeoutError(too_few(self._timeout_s, self._size, self._batch_size))
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
        """Ends all waits with `Closed`."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class Replay:
    """Experience replay (Espeholt et al., 2018, section 5.2.2): uniform sampling, first-in-first-out removal.

    Samples depend only on the seed and the trajectories added.

    Args:
      capacity: Largest number of trajectories stored.
      num_samples: Number of replayed trajectories per batch; 0 disables replay.
      seed: Seed for sampling.
    """

    def __init__(self, capacity: int, num_samples: int, seed: int):
        self._items: list[Trajectory] = []  # A ring, each [T + 1, 1].
        self._capacity = capacity
        self._num_samples = num_samples
        self._seed = seed
        self._num_added = 0
        self._num_batches = 0

    def mix(self, fresh: Trajectory) -> Trajectory:
        """Adds new trajectories and appends samples to them.

        Args:
          fresh: New trajectories, [T + 1, N].

        Returns:
          The new trajectories, then the samples, [T + 1, N + num_samples].
        """
        if not self._num_samples:
            return fresh
        for item in _split(fresh):
            self._add(item)
        random = np.random.default_rng(seeds.sequence(self._seed, self._num_batches))
        self._num_batches += 1
        indices = random.integers(len(self._items), size=self._num_samples)
        return concatenate([fresh, *(self._items[i] for i in indices)])

    def __len__(self) -> int:
        return len(self._items)

    def state(self) -> dict[str, Any]:
        """Returns trajectories and counts as arrays keyed by name, for a checkpoint."""
        oldest = self._num_added % self._capacity if len(self._items) == self._capacity else 0
        items = self._items[oldest:] + self._items[:oldest]
        counts = np.array([self._num_added, self._num_batches], np.int64)
        return {'counts': counts, **to_arrays(concatenate(items) if items else None)}

    def restore(self, state: dict[str, Any], structure: PyTree) -> None:
        """Continues from a saved state; drops its oldest trajectories if they exceed the capacity.

        Args:
          state: Result of `state`, or of `to_arrays` for any trajectories.
          structure: Treedef of a Trajectory.

        Raises:
          ConfigError: As for `from_arrays`.
        """
        trajectories = from_arrays(state, structure)
        saved = [] if trajectories is None else _split(trajectories)
        num_added, self._num_batches = (int(count) for count in state.get('counts', (len(saved), 0)))
        kept = saved[-self._capacity :]
        is_full = len(kept) == self._capacity
        self._num_added = num_added if is_full else len(kept)
        # Rotates the ring so that the next trajectory replaces the oldest one.
        oldest = num_added % self._capacity if is_full else 0
        self._items = kept[len(kept) - oldest :] + kept[: len(kept) - oldest]

    def _add(self, item: Trajectory) -> None:
        if len(self._items) < self._capacity:
            self._items.append(item)
        else:
            self._items[self._num_added % self._capacity] = item
        self._num_added += 1


def too_few(waited_s: float, num_trajectories: int, batch_size: int) -> str:
    """Returns the message of a learner that waited in vain for a batch."""
    return (
        f'the learner waited {waited_s:g} s for actors to fill a batch ({num_trajectories} of {batch_size} '
        'trajectories came); raise timeout_s if the environments are only slow'
    )


def to_arrays(trajectories: Trajectory | None) -> dict[str, Any]:
    """Returns trajectories [T + 1, N], or None, as arrays keyed by name, for a checkpoint."""
    return {'leaves': {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(trajectories))}}


def from_arrays(state: dict[str, Any], structure: PyTree) -> Trajectory | None:
    """Returns the trajectories that `to_arrays` converted.

    Args:
      state: Arrays keyed by name.
      structure: Treedef of a Trajectory.

    Raises:
      ConfigError: If the state was saved by a version whose trajectories had other fields.
    """
    leaves = state.get('leaves', {})  # Checkpoints do not contain empty dicts.
    if not leaves:
        return None
    if len(leaves) != structure.num_leaves:
        raise ConfigError(
            f'the saved replay is of another version of impala_jax: its trajectories have {len(leaves)} arrays, and '
            f'{structure.num_leaves} are needed; start again with another --workdir'
        )
    return jax.tree.unflatten(structure, [np.asarray(leaves[str(i)]) for i in range(len(leaves))])


def batch_size(trajectories: Trajectory) -> int:
    """Returns B for trajectories [T + 1, B]."""
    return trajectories.version.shape[0]


def columns(trajectories: Trajectory, start: int, stop: int) -> Trajectory:
    """Returns views of the trajectories `start` to `stop - 1` of a batch."""
    return map_batch_axis(lambda axis, x: x[start:stop] if axis == 0 else x[:, start:stop], trajectories)


def _split(trajectories: Trajectory) -> list[Trajectory]:
    """Splits a batch into single trajectories, each [T + 1, 1]."""
    return [columns(trajectories, i, i + 1) for i in range(batch_size(trajectories))]


def concatenate(parts: list[Trajectory]) -> Trajectory:
    """Joins trajectories along the batch axis; a single part is not copied."""
    if len(parts) == 1:
        return parts[0]
    return map_batch_axis(lambda axis, *xs: np.concatenate(xs, axis), *parts)


def map_batch_axis(fn, *parts: Trajectory) -> Trajectory:
    """Maps `fn(batch_axis, *leaves)` over the leaves of trajectories, in NumPy or JAX."""
    fields = {
        name: jax.tree.map(
            functools.partial(fn, batch_axis(name)),
            *(getattr(part, name) for part in parts),
        )
        for name in Trajectory._fields
    }
    return Trajectory(**fields)

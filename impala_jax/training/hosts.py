"""One update by one host, or by several together.

Several hosts run the same loop, each with its own part of every batch, and meet only inside the compiled update. It
also tells each of them what is counted of the others' parts, and whether one of them has to stop: then nobody learns
from that batch, and all stop after the same update.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from impala_jax.learner import HostLost, Learner, LearnerState
from impala_jax.optimizer import Hyperparameters
from impala_jax.types import Array, Counts, Experience, PyTree, StepInfo, Trajectory


class Batch(NamedTuple):
    """A batch that is on its way into an update."""

    experience: Experience  # [T + 1, B], on the mesh
    counts: Counts  # numpy, of this host's part; with several hosts on the mesh, of all parts


class Updated(NamedTuple):
    """What an update has come to."""

    state: LearnerState
    logs: dict[str, Array]
    params: PyTree  # numpy
    counts: Counts | None  # numpy, of the whole batch; None: a host has to stop, and nothing was learned
    waited_s: float  # how long the batch was waited for, by the host that waited longest


class Hosts(Protocol):
    """Makes updates; `OneHost` and `ManyHosts`."""

    def put(self, trajectories: Trajectory) -> Batch:
        """Puts this host's trajectories [T + 1, B], numpy, on the mesh."""
        ...

    def update(
        self, state: LearnerState, batch: Batch, hyperparameters: Hyperparameters | None, waited_s: float = 0.0
    ) -> Updated:
        """Waits for the update of `state`, which is donated.

        Raises:
          HostLost: The update failed, and had to be made by several hosts.
        """
        ...

    def stop(self, state: LearnerState, hyperparameters: Hyperparameters | None) -> LearnerState:
        """Has the other hosts stop before their next update; returns the state, which is donated, as it was."""
        ...


class OneHost:
    """Counts stay in this process."""

    def __init__(self, learner: Learner):
        self._learner = learner

    def put(self, trajectories: Trajectory) -> Batch:
        return Batch(self._learner.put(trajectories.experience), trajectories.counts)

    def update(
        self, state: LearnerState, batch: Batch, hyperparameters: Hyperparameters | None, waited_s: float = 0.0
    ) -> Updated:
        state, logs = self._learner.update(state, batch.experience, hyperparameters)
        return Updated(state, logs, to_host(state.params), batch.counts, waited_s)

    def stop(self, state: LearnerState, hyperparameters: Hyperparameters | None) -> LearnerState:
        return state


class _Note(NamedTuple):
    """What a host says of itself with its part of a batch; one entry per device, [D]."""

    stop: Array  # bool [D], it has to stop
    waited_s: Array  # float32 [D], how long it waited for its part


class ManyHosts:
    """Each host's counts and notes pass through the compiled update, the only place where hosts meet.

    Args:
      learner: Over the devices of all hosts.
      num_fresh: Trajectories of the whole batch that are not replayed; each host's part has some of both.
      empty: A host's part of a batch, of any values, for an update from which nobody learns.
    """

    def __init__(self, learner: Learner, num_fresh: int, empty: Trajectory):
        self._learner = learner
        self._empty = empty
        self._num_hosts = jax.process_count()
        self._order = fresh_first(empty.version.shape[0] * self._num_hosts, num_fresh, self._num_hosts)
        self._compiled = jax.jit(self._update, donate_argnums=0, out_shardings=learner.replicated)

    def put(self, trajectories: Trajectory) -> Batch:
        return Batch(self._learner.put(trajectories.experience), self._learner.put(trajectories.counts))

    def update(
        self, state: LearnerState, batch: Batch, hyperparameters: Hyperparameters | None, waited_s: float = 0.0
    ) -> Updated:
        return self._meet(state, batch, hyperparameters, False, waited_s)

    def stop(self, state: LearnerState, hyperparameters: Hyperparameters | None) -> LearnerState:
        return self._meet(state, self.put(self._empty), hyperparameters, True, 0.0).state

    def _meet(
        self, state: LearnerState, batch: Batch, hyperparameters: Hyperparameters | None, stop: bool, waited_s: float
    ) -> Updated:
        num_devices = self._learner.num_local_devices
        note = _Note(np.full([num_devices], stop), np.full([num_devices], waited_s, np.float32))
        try:
            state, logs, counts, note = self._compiled(
                state, batch, self._learner.inputs(hyperparameters), self._learner.put_rows(note)
            )
            params, counts, note = to_host((state.params, counts, note))
        except Exception as error:  # JAX raises a ValueError for a connection that broke.
            lines = str(error).splitlines() or ['']
            raise HostLost(f'an update of {self._num_hosts} hosts failed: {lines[0]}') from error
        ordered = Counts(
            StepInfo(*(x[:, self._order] for x in counts.info)),
            counts.version[self._order],
            counts.task[self._order],
            counts.game_version[:, self._order],
        )
        return Updated(state, logs, params, None if note.stop.any() else ordered, float(note.waited_s.max()))

    def _update(
        self, state: LearnerState, batch: Batch, hyperparameters: Any, note: _Note
    ) -> tuple[LearnerState, dict[str, Array], Counts, _Note]:
        goes_on = ~jnp.any(note.stop)
        state, logs = self._learner.pure_update(state, batch.experience, hyperparameters, goes_on)
        return state, logs, batch.counts, note


def fresh_first(batch_size: int, num_fresh: int, num_hosts: int) -> np.ndarray:
    """[B], the columns of all hosts' batches with what is new before what is replayed; each host's part has both."""
    replayed = np.arange(batch_size) % (batch_size // num_hosts)
    return np.argsort(replayed >= num_fresh // num_hosts, kind='stable')


def to_host(tree: PyTree) -> PyTree:
    """Numpy copies: the device's own buffers are donated to the next update."""
    return jax.tree.map(lambda x: np.array(x, copy=True), tree)

"""Updates on one host or on several.

Several hosts run the same loop, each with its own part of every batch, and communicate only inside the compiled update.
Besides gradients, the update exchanges the counts of all parts of the batch and whether a host has to stop. If one has
to, the update leaves the state unchanged, and all hosts stop after the same update.
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
    """A batch, as input of an update."""

    experience: Experience  # [T + 1, B], on the mesh.
    counts: Counts  # On one host in NumPy; on several hosts on the mesh, for the whole batch.


class Updated(NamedTuple):
    """Result of an update."""

    state: LearnerState
    logs: dict[str, Array]
    params: PyTree  # Leaves are NumPy arrays.
    counts: Counts | None  # For the whole batch, in NumPy; None if a host has to stop and the state is unchanged.
    waited_s: float  # Longest time that a host waited for its part of the batch, in seconds.


class Hosts(Protocol):
    """Update function of a training loop; implemented by `OneHost` and `ManyHosts`."""

    def put(self, trajectories: Trajectory) -> Batch:
        """Puts this host's trajectories [T + 1, B], NumPy arrays, on the mesh."""
        ...

    def update(
        self, state: LearnerState, batch: Batch, hyperparameters: Hyperparameters | None, waited_s: float = 0.0
    ) -> Updated:
        """Makes an update and waits for its result.

        Args:
          state: State of the learner, which is donated.
          batch: Batch returned by `put`.
          hyperparameters: Values that replace the learner's own, or None.
          waited_s: Time that this host waited for the batch, in seconds.

        Raises:
          HostLost: If an update over several hosts failed.
        """
        ...

    def stop(self, state: LearnerState, hyperparameters: Hyperparameters | None) -> LearnerState:
        """Makes the other hosts stop before their next update; returns the state, which is donated, unchanged."""
        ...


class OneHost:
    """Updates of a learner on a single host, where counts are not transferred to the device."""

    def __init__(self, learner: Learner):
        self._learner = learner

    def put(self, trajectories: Trajectory) -> Batch:
        """Puts the experience on the mesh; the counts stay in NumPy."""
        return Batch(self._learner.put(trajectories.experience), trajectories.counts)

    def update(
        self, state: LearnerState, batch: Batch, hyperparameters: Hyperparameters | None, waited_s: float = 0.0
    ) -> Updated:
        """Makes an update and waits for its result."""
        state, logs = self._learner.update(state, batch.experience, hyperparameters)
        return Updated(state, logs, to_host(state.params), batch.counts, waited_s)

    def stop(self, state: LearnerState, hyperparameters: Hyperparameters | None) -> LearnerState:
        """Returns the state, because there are no other hosts."""
        return state


class _Status(NamedTuple):
    """Status of the hosts at an update; one entry per device, [D]."""

    stop: Array  # [D] bool, whether the device's host has to stop.
    waited_s: Array  # [D] float32, time that the host waited for its part of the batch.


class ManyHosts:
    """Updates of a learner over several hosts; the compiled update also exchanges counts and status.

    Args:
      learner: Learner over the devices of all hosts.
      num_fresh: Number of new trajectories in the whole batch; each host's part has new and replayed ones.
      empty: Trajectories with the shapes of a host's part of a batch, for an update that leaves the state unchanged.
    """

    def __init__(self, learner: Learner, num_fresh: int, empty: Trajectory):
        self._learner = learner
        self._empty = empty
        self._num_hosts = jax.process_count()
        self._order = fresh_first(empty.version.shape[0] * self._num_hosts, num_fresh, self._num_hosts)
        self._compiled = jax.jit(self._update, donate_argnums=0, out_shardings=learner.replicated)

    def put(self, trajectories: Trajectory) -> Batch:
        """Puts experience and counts on the mesh."""
        return Batch(self._learner.put(trajectories.experience), self._learner.put(trajectories.counts))

    def update(
        self, state: LearnerState, batch: Batch, hyperparameters: Hyperparameters | None, waited_s: float = 0.0
    ) -> Updated:
        """Makes an update together with the other hosts."""
        return self._update_together(state, batch, hyperparameters, False, waited_s)

    def stop(self, state: LearnerState, hyperparameters: Hyperparameters | None) -> LearnerState:
        """Makes an update that leaves the state unchanged, together with the other hosts, which then stop."""
        return self._update_together(state, self.put(self._empty), hyperparameters, True, 0.0).state

    def _update_together(
        self, state: LearnerState, batch: Batch, hyperparameters: Hyperparameters | None, stop: bool, waited_s: float
    ) -> Updated:
        num_devices = self._learner.num_local_devices
        status = _Status(np.full([num_devices], stop), np.full([num_devices], waited_s, np.float32))
        try:
            state, logs, counts, status = self._compiled(
                state, batch, self._learner.inputs(hyperparameters), self._learner.put_rows(status)
            )
            params, counts, status = to_host((state.params, counts, status))
        except Exception as error:  # JAX raises a ValueError for a broken connection.
            lines = str(error).splitlines() or ['']
            raise HostLost(f'an update of {self._num_hosts} hosts failed: {lines[0]}') from error
        ordered = Counts(
            StepInfo(*(x[:, self._order] for x in counts.info)),
            counts.version[self._order],
            counts.task[self._order],
            counts.game_version[:, self._order],
        )
        return Updated(state, logs, params, None if status.stop.any() else ordered, float(status.waited_s.max()))

    def _update(
        self, state: LearnerState, batch: Batch, hyperparameters: Any, status: _Status
    ) -> tuple[LearnerState, dict[str, Array], Counts, _Status]:
        enabled = ~jnp.any(status.stop)
        state, logs = self._learner.pure_update(state, batch.experience, hyperparameters, enabled)
        return state, logs, batch.counts, status


def fresh_first(batch_size: int, num_fresh: int, num_hosts: int) -> np.ndarray:
    """Order of a batch's trajectories in which all new ones precede the replayed ones.

    Args:
      batch_size: Number of trajectories in the whole batch, B.
      num_fresh: Number of new trajectories in the whole batch.
      num_hosts: Number of hosts; each host's part of the batch starts with its new trajectories.

    Returns:
      Indices into the whole batch, [B].
    """
    replayed = np.arange(batch_size) % (batch_size // num_hosts)
    return np.argsort(replayed >= num_fresh // num_hosts, kind='stable')


def to_host(tree: PyTree) -> PyTree:
    """NumPy copies of a tree, because the device's buffers are donated to the next update."""
    return jax.tree.map(lambda x: np.array(x, copy=True), tree)

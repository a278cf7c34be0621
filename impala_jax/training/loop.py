"""The training loop, which fetches batches, updates the learner, publishes parameters and calls hooks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from impala_jax.learner import HostLost, LearnerState
from impala_jax.optimizer import Hyperparameters
from impala_jax.training.hosts import Batch, Hosts, Updated, to_host
from impala_jax.training.prefetch import Prefetcher
from impala_jax.types import Array, Closed, Counts, PyTree, Trajectory


class Hook:
    """Callbacks of a training loop; subclasses override the ones that they need."""

    def begin(self, loop: TrainingLoop) -> None:
        """Called before the first update; from then on the run may write to its workdir."""

    def updated(self, loop: TrainingLoop, update: Updated) -> None:
        """Called after each update, before its parameters are published."""

    def published(self, loop: TrainingLoop) -> None:
        """Called after each update of `TrainingLoop.run`, when its parameters are published."""

    def finish(self, loop: TrainingLoop) -> None:
        """Called when training ends, for any reason."""

    def close(self) -> None:
        """Called when the loop is closed."""


class TrainingLoop:
    """Updates a learner's state with batches until the budget is spent.

    On several hosts, each host runs its own loop, and all make the same updates.

    Args:
      hosts: Update function, `OneHost` or `ManyHosts`.
      state: State of the learner, on the mesh.
      publish: Function that publishes parameters: the number of updates, and the parameters in NumPy.
      total_updates: Number of updates of the run.
      frames_per_update: Number of environment frames per update.
      hooks: Hooks, called in this order.
    """

    def __init__(
        self,
        hosts: Hosts,
        state: LearnerState,
        publish: Callable[[int, PyTree], None],
        total_updates: int,
        frames_per_update: int,
        hooks: Sequence[Hook] = (),
    ):
        self._hosts = hosts
        self._publish = publish
        self._total_updates = total_updates
        self._frames_per_update = frames_per_update
        self._hooks = list(hooks)
        self._prefetcher: Prefetcher[Batch] | None = None
        self._has_begun = False
        self.replace_state(state)
        self.num_updates = int(state.num_updates)
        self.hyperparameters: Hyperparameters | None = None
        """Values that replace the learner's own; None for no replacement."""
        self.logs: dict[str, Array] = {}
        """Scalars of the last update."""

    @property
    def state(self) -> LearnerState | None:
        """State of the learner; None after a failed update, to which it was donated."""
        return self._state

    def replace_state(self, state: LearnerState) -> None:
        """Continues from another state, on the mesh, with the same number of updates."""
        self._state: LearnerState | None = state
        self.params = to_host(state.params)

    @property
    def frames(self) -> int:
        """Number of environment frames consumed so far."""
        return self.num_updates * self._frames_per_update

    @property
    def done(self) -> bool:
        """Whether the run's budget is spent."""
        return self.num_updates >= self._total_updates

    def begin(self) -> None:
        """Calls `Hook.begin`, at the first call only."""
        if not self._has_begun:
            self._has_begun = True
            for hook in self._hooks:
                hook.begin(self)

    def publish(self) -> None:
        """Publishes the current parameters."""
        self._publish(self.num_updates, self.params)

    def put(self, trajectories: Trajectory) -> Batch:
        """Puts this host's trajectories [T + 1, B] on the mesh."""
        return self._hosts.put(trajectories)

    def step(self, batch: Batch, waited_s: float = 0.0) -> bool:
        """Makes one update, calls `Hook.updated` and publishes the parameters.

        Args:
          batch: Batch returned by `put`.
          waited_s: Time that the loop waited for the batch, in seconds.

        Returns:
          True; False if another host has to stop, in which case the state is unchanged.

        Raises:
          HostLost: If an update over several hosts failed.
          Exception: If a hook raised it.
        """
        self.begin()
        state, self._state = self._state, None  # The update donates it.
        assert state is not None
        update = self._hosts.update(state, batch, self.hyperparameters, waited_s)
        self._state = update.state
        if update.counts is None:
            return False
        self.params, self.logs = update.params, update.logs
        self.num_updates += 1
        for hook in self._hooks:
            hook.updated(self, update)
        self.publish()
        return True

    def advance(self, state: LearnerState, updates: Sequence[tuple[dict[str, Array], Counts]]) -> None:
        """Counts updates that a compiled program made together, and calls `Hook.updated` for each of them.

        Args:
          state: State after the last one. The hooks see the loop without a state, and with the parameters before the
            first one.
          updates: Scalars for the log, and counts in NumPy, of each update.

        Raises:
          Exception: If a hook raised it; the other updates are counted nevertheless.
        """
        self.begin()
        self._state = None
        total = self.num_updates + len(updates)
        try:
            for self.logs, counts in updates:
                self.num_updates += 1
                for hook in self._hooks:
                    hook.updated(self, Updated(state, self.logs, self.params, counts, 0.0))
        finally:
            self.num_updates = total
            self.replace_state(state)

    def run(self, fetch: Callable[[], Trajectory], stop: threading.Event) -> None:
        """Makes updates until the budget is spent or a host stops.

        Args:
          fetch: Function that returns this host's next trajectories [T + 1, B]; called from the prefetch thread.
          stop: Event that ends the run after the current update.
        """
        self.begin()
        self._prefetcher = prefetcher = Prefetcher(lambda: self.put(fetch()))
        try:
            self.publish()
            while not self.done:
                start = time.monotonic()
                batch = prefetcher.get(stop)
                if not self.step(batch, time.monotonic() - start):
                    return
                for hook in self._hooks:
                    hook.published(self)
        except Closed:
            # The run was stopped while the learner waited for a batch or published parameters.
            self._stop_other_hosts()
        except HostLost:
            raise
        except Exception:
            self._stop_other_hosts()
            raise

    def finish(self) -> None:
        """Calls `Hook.finish`, for the last checkpoint and the last row of metrics."""
        self.begin()
        for hook in self._hooks:
            hook.finish(self)

    def close(self) -> None:
        """Ends the prefetch thread, whose queue must be closed already, and calls `Hook.close`."""
        if self._prefetcher is not None:
            self._prefetcher.close()
        for hook in self._hooks:
            hook.close()

    def _stop_other_hosts(self) -> None:
        if not self.done and self._state is not None:
            state, self._state = self._state, None
            self._state = self._hosts.stop(state, self.hyperparameters)

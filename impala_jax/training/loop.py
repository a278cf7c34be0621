"""The training loop: fetch, update, publish, and call what is attached."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from impala_jax.learner import HostLost, LearnerState
from impala_jax.optimizer import Hyperparameters
from impala_jax.training.hosts import Batch, Hosts, Updated, to_host
from impala_jax.training.prefetch import Prefetcher
from impala_jax.types import Array, Closed, PyTree, Trajectory


class Hook:
    """What is attached to a training loop; overrides what it needs."""

    def begin(self, loop: TrainingLoop) -> None:
        """Before the first update; from here on the run may write to its workdir."""

    def updated(self, loop: TrainingLoop, update: Updated) -> None:
        """After an update, before its parameters are published."""

    def published(self, loop: TrainingLoop) -> None:
        """After an update of `TrainingLoop.run`, once its parameters are published."""

    def finish(self, loop: TrainingLoop) -> None:
        """When training ends, for whatever reason."""

    def close(self) -> None:
        """When the loop is closed."""


class TrainingLoop:
    """Updates a learner's state with the batches that it is given.

    On several hosts each drives its own, in step.

    Args:
      hosts: Makes the updates.
      state: The learner's, on the mesh.
      publish: Publishes the parameters, numpy, under the number of updates.
      total_updates: The budget.
      frames_per_update: Environment frames that an update consumes.
      hooks: Are called in this order.
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
        """In place of those that the learner was made with."""
        self.logs: dict[str, Array] = {}
        """Those of the last update, scalars."""

    @property
    def state(self) -> LearnerState | None:
        """The learner's; None after an update that failed, which took the state with it."""
        return self._state

    def replace_state(self, state: LearnerState) -> None:
        """Goes on from another state, on the mesh, of as many updates."""
        self._state: LearnerState | None = state
        self.params = to_host(state.params)

    @property
    def frames(self) -> int:
        """Environment frames consumed so far."""
        return self.num_updates * self._frames_per_update

    @property
    def done(self) -> bool:
        """Whether the run's budget is spent."""
        return self.num_updates >= self._total_updates

    def begin(self) -> None:
        """Tells the hooks that training begins; once."""
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
        """One update and what goes with it.

        Args:
          batch: That of `put`.
          waited_s: How long it was waited for.

        Returns:
          False: another host has to stop, and nothing was learned.

        Raises:
          HostLost: The update failed, and had to be made by several hosts.
          Exception: Whatever a hook raises.
        """
        self.begin()
        state, self._state = self._state, None  # It is donated.
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

    def run(self, fetch: Callable[[], Trajectory], stop: threading.Event) -> None:
        """Updates until the budget is spent or a host stops.

        Args:
          fetch: Gives this host's next trajectories [T + 1, B]; called from the prefetch thread.
          stop: Ends the run after the update in flight.
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
            # The run was stopped while the learner waited for a batch, or handed out parameters.
            self._tell_others_to_stop()
        except HostLost:
            raise
        except Exception:
            self._tell_others_to_stop()
            raise

    def finish(self) -> None:
        """Lets the hooks write what is left to write."""
        self.begin()
        for hook in self._hooks:
            hook.finish(self)

    def close(self) -> None:
        """Ends the prefetch thread, whose queue must be closed, and the hooks."""
        if self._prefetcher is not None:
            self._prefetcher.close()
        for hook in self._hooks:
            hook.close()

    def _tell_others_to_stop(self) -> None:
        if not self.done and self._state is not None:
            state, self._state = self._state, None
            self._state = self._hosts.stop(state, self.hyperparameters)

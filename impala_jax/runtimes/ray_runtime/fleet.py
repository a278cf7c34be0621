"""The learner's side of the actors and the evaluator that run in Ray."""

from __future__ import annotations

import logging
import textwrap
import threading
import time
from typing import Any

import jax
import numpy as np
import ray  # pyright: ignore[reportMissingImports]
from ray.exceptions import RayActorError, RayError  # pyright: ignore[reportMissingImports]

from impala_jax.agent import Agent
from impala_jax.evaluation.evaluator import Evaluation
from impala_jax.parameter_store import ParameterStore
from impala_jax.runtimes.host_share import HostShare
from impala_jax.runtimes.nodes import NodeFailure
from impala_jax.runtimes.ray_runtime.engine import Engine
from impala_jax.runtimes.ray_runtime.remote import Failure, RemoteActor, RemoteEvaluator, Setup
from impala_jax.trajectory_queue import LocalTrajectoryQueue, batch_size
from impala_jax.types import Closed, PyTree, Trajectory

_MAX_DEATHS = 5  # Deaths in a row, without an unroll in between, that end the run.
_POLL_S = 0.2
_CHECK_INTERVAL_S = 2.0

_logger = logging.getLogger(__name__)


class Published:
    """The newest parameters in Ray's object store, where they are put once per version, when a node needs them.

    Args:
      store: Store with the newest parameters.
    """

    def __init__(self, store: ParameterStore):
        self._store = store
        self._lock = threading.Lock()
        self._newest: tuple[int, Any] | None = None

    def latest(self) -> tuple[int, Any]:
        """Returns the newest version, and a reference to its parameters."""
        version, params = self._store.latest()
        with self._lock:
            if self._newest is None or self._newest[0] != version:
                self._newest = (version, ray.put(params))
            return self._newest


class _Member:
    """An actor of the fleet."""

    def __init__(self, actor: type[RemoteActor], setup: Setup, index: int, generation: int, num_deaths: int):
        self.index = index
        self.generation = generation
        self.num_deaths = num_deaths  # In a row, of actors with this index.
        self.handle = ray.remote(actor).options(num_cpus=1).remote(setup, index, generation)


class Fleet:
    """Actors in processes of Ray; a `TrajectoryQueue` without `put`.

    Each actor has a fixed number of unrolls under way, in acting or waiting for the learner: at least one, and no more
    than fill the queue's capacity together. An actor that dies is replaced. An actor that raises an exception ends the
    run.

    Args:
      engine: Engine that this process is connected to.
      setup: Settings of the run. If the share has no actors, there is one for each CPU of the cluster that is not
        needed for the evaluator, also when nodes join or leave the cluster.
      published: Parameters for the actors.
      actor: Class of the actors.
    """

    def __init__(self, engine: Engine, setup: Setup, published: Published, actor: type[RemoteActor] = RemoteActor):
        self._actor = actor
        self._engine = engine
        self._setup = setup
        self._published = published
        share = setup.share
        self._batches = LocalTrajectoryQueue(share.num_fresh, share.queue_capacity, share.timeout_s)
        self._num_waiting = 0  # Trajectories in `_batches`.
        self._calls: dict[Any, _Member] = {}  # Unrolls under way, the oldest first.
        self._members: dict[int, _Member] = {}  # By index.
        self._generations: dict[int, tuple[int, int]] = {}  # Next generation, and deaths in a row, by index.
        self._next_check = 0.0  # time.monotonic()
        self._closed = threading.Event()
        self._under_way = 1
        self.num_deaths = 0

    def metrics(self) -> dict[str, float]:
        """Returns the number of actors, and of those that died and were replaced."""
        deaths = {'actor_deaths': self.num_deaths} if self.num_deaths else {}
        return {'actors': len(self._members), **deaths}

    def get_batch(self) -> Trajectory:
        """See `TrajectoryQueue.get_batch`; arrays may be read-only views of Ray's object store.

        Raises:
          Closed: If the fleet is closed.
          TimeoutError: If too few trajectories arrive.
          NodeFailure: If an actor raised an exception, or died again and again, or the engine has ended.
        """
        share = self._setup.share
        deadline = time.monotonic() + share.timeout_s
        while self._num_waiting < share.num_fresh:
            if self._closed.is_set():
                raise Closed
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f'the learner waited {share.timeout_s:g} s for actors to fill a batch ({self._num_waiting} of '
                    f'{share.num_fresh} trajectories came); raise timeout_s if the environments are only slow'
                )
            self._check()
            if not self._calls:
                self._closed.wait(_POLL_S)  # No CPU of the cluster is free.
                continue
            ready, _ = ray.wait(list(self._calls), timeout=_POLL_S)
            for call in ready:
                self._receive(call)
        self._num_waiting -= share.num_fresh
        return self._batches.get_batch()

    def close(self) -> None:
        """Ends all waits with `Closed`."""
        self._closed.set()
        self._batches.close()

    def _receive(self, call: Any) -> None:
        member = self._calls.pop(call)
        try:
            result = ray.get(call, timeout=self._setup.share.timeout_s)
        except RayError as error:  # The actor has died, or an unroll was lost with its machine.
            self._lose(member, error)
            return
        if isinstance(result, Failure):
            raise NodeFailure(result.message)
        member.num_deaths = 0
        self._request(member)
        if self._setup.share.num_replayed:
            result = jax.tree.map(np.array, result)  # Replay would keep views, and fill the object store.
        self._batches.put(result)
        self._num_waiting += batch_size(result)

    def _request(self, member: _Member) -> None:
        version, params = self._published.latest()
        self._calls[member.handle.unroll.remote(version, params)] = member

    def _start(self, index: int) -> None:
        generation, num_deaths = self._generations.get(index, (0, 0))
        self._members[index] = member = _Member(self._actor, self._setup, index, generation, num_deaths)
        for _ in range(self._under_way):
            self._request(member)

    def _lose(self, member: _Member, error: Exception) -> None:
        """Drops an actor that has died."""
        if self._members.get(member.index) is not member:
            return  # Known from another of its calls.
        del self._members[member.index]
        self._calls = {call: other for call, other in self._calls.items() if other is not member}
        ray.kill(member.handle)
        self.num_deaths += 1
        deaths = member.num_deaths + 1
        self._generations[member.index] = (member.generation + 1, deaths)
        reason = _one_line(error)
        if deaths >= _MAX_DEATHS:
            raise NodeFailure(f'error: actor {member.index} died {deaths} times before its first unroll: {reason}')
        _logger.warning('actor %d died: %s', member.index, reason)

    def _check(self) -> None:
        """Checks the engine, and starts missing actors."""
        now = time.monotonic()
        if now < self._next_check:
            return
        self._next_check = now + _CHECK_INTERVAL_S
        self._engine.check()
        share = self._setup.share
        wanted = share.num_actors or max(1, int(ray.cluster_resources().get('CPU', 0)) - share.evaluates)
        self._under_way = under_way(share, wanted)
        for index in range(wanted):
            if index not in self._members:
                self._start(index)


class EvaluatorInRay:
    """The evaluator of a run, in a process of Ray, which is replaced if it dies.

    Args:
      setup: Settings of the run.
      stop: Event that ends all waits with `Closed`.
    """

    def __init__(self, setup: Setup, stop: threading.Event):
        self._setup = setup
        self._stop = stop
        self._handle: Any = None
        self._num_deaths = 0  # In a row.

    def play(self, version: int, params: PyTree) -> Evaluation:
        """See `Evaluator.play`.

        Raises:
          Closed: If `stop` is set.
          NodeFailure: If the evaluator raised an exception, or died again and again.
        """
        while True:
            if self._handle is None:
                self._handle = ray.remote(RemoteEvaluator).options(num_cpus=1).remote(self._setup)
            try:
                result = self._wait(self._handle.play.remote(version, params))
            except RayActorError as error:
                self._handle = None
                self._num_deaths += 1
                if self._num_deaths >= _MAX_DEATHS:
                    text = f'error: the evaluator died {self._num_deaths} times in a row: {_one_line(error)}'
                    raise NodeFailure(text) from error
                _logger.warning('the evaluator died and is replaced: %s', _one_line(error))
                continue
            if isinstance(result, Failure):
                raise NodeFailure(result.message)
            self._num_deaths = 0
            return result

    def close(self) -> None:
        """Ends the evaluator's process."""
        if self._handle is not None and ray.is_initialized():
            ray.kill(self._handle)

    def _wait(self, call: Any) -> Any:
        # No limit of its own: an evaluation ends, because games and waits for environments are limited.
        while not self._stop.is_set():
            if ray.wait([call], timeout=_POLL_S)[0]:
                return ray.get(call, timeout=self._setup.share.timeout_s)
        raise Closed


def under_way(share: HostShare, num_actors: int) -> int:
    """Returns the number of unrolls of each actor that are acted, or wait for the learner."""
    return max(1, share.queue_capacity // (max(1, num_actors) * share.actor.num_envs))


def store_bytes(setup: Setup, agent: Agent) -> int:
    """Returns the size of the object store that a run on one machine needs, in bytes."""
    share = setup.share
    trajectory = agent.empty_trajectory(share.unroll_length, 1)
    params = jax.eval_shape(agent.init, jax.random.PRNGKey(0))
    num_unrolls = under_way(share, share.num_actors) * share.num_actors
    of_trajectories = (num_unrolls * share.actor.num_envs + 2 * share.num_fresh) * _num_bytes(trajectory)
    return int(1.2 * (of_trajectories + (num_unrolls + 2) * _num_bytes(params)))


def _num_bytes(tree: PyTree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _one_line(error: Exception) -> str:
    """Returns what Ray knows about a death, without its identifiers."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [
        line for line in lines if '\t' not in line and not line.startswith(('class_name', 'actor_id', 'pid', 'name'))
    ]
    return textwrap.shorten(' '.join(said), 300)

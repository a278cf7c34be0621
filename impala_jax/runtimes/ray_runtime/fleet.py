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
from impala_jax.trajectory_queue import LocalTrajectoryQueue, too_few
from impala_jax.types import Closed, PyTree, Trajectory

_MAX_DEATHS = 5  # Deaths in a row, without an answer in between, that end the run.
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


class _Place:
    """A place of a node, whose process is replaced when it dies.

    Args:
      name: What the node is called in messages.
    """

    def __init__(self, name: str):
        self._name = name
        self._in_a_row = 0
        self.num_deaths = 0  # Of all processes here.
        self.works = False  # Whether the process has answered.
        self.handle: Any = None  # Of the process; None if there is none.

    def start(self, node: type, *arguments: Any) -> Any:
        """Starts a process, as soon as a CPU of the cluster is free; returns its handle."""
        self.handle = ray.remote(node).options(num_cpus=1).remote(*arguments)
        return self.handle

    def answered(self) -> None:
        """Notes that the process works."""
        self._in_a_row = 0
        self.works = True

    def died(self, error: Exception) -> None:
        """Drops the process; raises NodeFailure if too many died in a row."""
        self.close()
        self.num_deaths += 1
        self._in_a_row += 1
        reason = _one_line(error)
        if self._in_a_row >= _MAX_DEATHS:
            raise NodeFailure(f'error: {self._name} died {self._in_a_row} times in a row: {reason}') from error
        _logger.warning('%s died: %s', self._name, reason)

    def close(self) -> None:
        """Ends the process."""
        self.works = False
        handle, self.handle = self.handle, None
        if handle is not None and ray.is_initialized():
            ray.kill(handle)


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
        self._calls: dict[Any, tuple[int, Any]] = {}  # Unrolls under way, the oldest first: index and handle.
        self._places: list[_Place] = []  # By the actor's index.
        self._next_check = 0.0  # time.monotonic()
        self._closed = threading.Event()
        self._under_way = 1
        self._is_short = False  # Of CPUs.

    def metrics(self) -> dict[str, float]:
        """Returns the number of actors that act, and of those that died."""
        num_deaths = sum(place.num_deaths for place in self._places)
        deaths = {'actor_deaths': num_deaths} if num_deaths else {}
        return {'actors': sum(place.works for place in self._places), **deaths}

    def get_batch(self) -> Trajectory:
        """See `TrajectoryQueue.get_batch`; arrays may be read-only views of Ray's object store.

        Raises:
          Closed: If the fleet is closed.
          TimeoutError: If too few trajectories arrive.
          NodeFailure: If an actor raised an exception, or died again and again, or the engine has ended.
        """
        share = self._setup.share
        deadline = time.monotonic() + share.timeout_s
        while len(self._batches) < share.num_fresh:
            if self._closed.is_set():
                raise Closed
            if time.monotonic() > deadline:
                raise TimeoutError(too_few(share.timeout_s, len(self._batches), share.num_fresh))
            self._check()
            if not self._calls:
                self._closed.wait(_POLL_S)  # No CPU of the cluster is free.
                continue
            ready, _ = ray.wait(list(self._calls), timeout=_POLL_S)
            for call in ready:
                self._receive(call)
        return self._batches.get_batch()

    def close(self) -> None:
        """Ends all waits with `Closed`."""
        self._closed.set()
        self._batches.close()

    def _receive(self, call: Any) -> None:
        index, handle = self._calls.pop(call)
        place = self._places[index]
        try:
            result = ray.get(call, timeout=self._setup.share.timeout_s)
        except RayError as error:  # The actor has died, or an unroll was lost with its machine.
            if place.handle is handle:  # Else its death is known from another of its calls.
                self._calls = {call: other for call, other in self._calls.items() if other[1] is not handle}
                place.died(error)
            return
        if isinstance(result, Failure):
            raise NodeFailure(result.message)
        place.answered()
        self._request(index)
        if self._setup.share.num_replayed:
            result = jax.tree.map(np.array, result)  # Replay would keep views, and fill the object store.
        self._batches.put(result)

    def _request(self, index: int) -> None:
        version, params = self._published.latest()
        handle = self._places[index].handle
        self._calls[handle.unroll.remote(version, params)] = index, handle

    def _check(self) -> None:
        """Checks the engine, and starts missing actors."""
        now = time.monotonic()
        if now < self._next_check:
            return
        self._next_check = now + _CHECK_INTERVAL_S
        num_cpus = self._engine.check()
        share = self._setup.share
        wanted = share.num_actors or max(1, num_cpus - share.evaluates)
        self._under_way = under_way(share, wanted)
        self._places += [_Place(f'actor {index}') for index in range(len(self._places), wanted)]
        free = [index for index, place in enumerate(self._places) if place.handle is None]
        for index in free[: max(0, wanted - len(self._places) + len(free))]:
            self._places[index].start(self._actor, self._setup, index, self._places[index].num_deaths)
            for _ in range(self._under_way):
                self._request(index)
        if (short := wanted + share.evaluates > num_cpus) and not self._is_short:
            nodes = f'{wanted} actors' + (' and the evaluator' if share.evaluates else '')
            _logger.warning('the cluster has %d CPUs, and %s need one each: some wait for it', num_cpus, nodes)
        self._is_short = short


class EvaluatorInRay:
    """The evaluator of a run, in a process of Ray, which is replaced if it dies.

    Args:
      setup: Settings of the run.
      stop: Event that ends all waits with `Closed`.
    """

    def __init__(self, setup: Setup, stop: threading.Event):
        self._setup = setup
        self._stop = stop
        self._place = _Place('the evaluator')

    def play(self, version: int, params: PyTree) -> Evaluation:
        """See `Evaluator.play`.

        Raises:
          Closed: If `stop` is set.
          NodeFailure: If the evaluator raised an exception, or died again and again.
        """
        while True:
            handle = self._place.handle or self._place.start(RemoteEvaluator, self._setup)
            try:
                result = self._wait(handle.play.remote(version, params))
            except RayActorError as error:
                self._place.died(error)
                continue
            if isinstance(result, Failure):
                raise NodeFailure(result.message)
            self._place.answered()
            return result

    def close(self) -> None:
        """Ends the evaluator's process."""
        self._place.close()

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

"""Inference on the accelerator, with the requests of all actors batched dynamically into one compiled call.

It is an alternative to inference on the CPU in each actor, for networks that are too slow on the CPU (section 3 of the
paper). The batching is that of GA3C (Babaeizadeh et al., 2017) and SEED RL (Espeholt et al., 2020). As in SEED RL,
every step uses the newest parameters, so they can change within an unroll; V-trace only needs the logits per action.
"""

from __future__ import annotations

import concurrent.futures
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from impala_jax.agent import Agent, AgentStep, dummy_timestep
from impala_jax.config import ActorConfig
from impala_jax.rundir.stats import Histogram
from impala_jax.types import Array, Closed, PyTree, TimeStep


class _Request(NamedTuple):
    """Request of an actor for one step, with the future for its answer."""

    timestep: TimeStep  # [N, ...]
    state: PyTree  # [N, ...]
    answer: concurrent.futures.Future[AgentStep]
    time_s: float


class _RemotePolicy(NamedTuple):
    """A policy that the server evaluates, with the newest parameters at each step."""

    version: int
    server: InferenceServer

    def step(self, key: Array, num_steps: np.int32, timestep: TimeStep, state: PyTree) -> AgentStep:
        return self.server.step(timestep, state)  # The server samples actions with its own key.


class InferenceServer:
    """Evaluates the policy for all actors of a process, with all pending requests in one call.

    A call begins when all actors have sent a request, or `inference_wait_ms` after the first request. Its batch is
    padded to one of a few sizes, each of which is compiled once, and split over the devices.

    Args:
      agent: Agent that acts.
      num_actors: Number of actors; each has at most one request at a time.
      config: Configuration with the number of environments per actor and `inference_wait_ms`.
      devices: Devices of this host, of type `jax.Device`.
      seed: Seed for action sampling.
      timeout_s: Longest wait, in seconds.
    """

    def __init__(
        self, agent: Agent, num_actors: int, config: ActorConfig, devices: Sequence[Any], seed: int, timeout_s: float
    ):
        self._num_envs = config.num_envs
        self._num_actors = num_actors
        self._wait_s = config.inference_wait_ms / 1000
        self._timeout_s = timeout_s
        mesh = Mesh(np.array(devices), ('batch',))
        self._split = NamedSharding(mesh, PartitionSpec('batch'))
        self._replicated = NamedSharding(mesh, PartitionSpec())
        # The batch of one actor, rounded up to a multiple of the devices, then doubled until all actors fit.
        self._sizes = [-(-self._num_envs // len(devices)) * len(devices)]
        while self._sizes[-1] < num_actors * self._num_envs:
            self._sizes.append(2 * self._sizes[-1])
        self._key = np.asarray(jax.random.PRNGKey(seed))
        self._num_calls = 0
        self._timestep, self._state = dummy_timestep(agent.spec, 1), agent.initial_state(1)

        def step(params: PyTree, key: Array, num_calls: Array, timestep: TimeStep, state: PyTree) -> AgentStep:
            return agent.step(params, jax.random.fold_in(key, num_calls), timestep, state)

        self._step = jax.jit(step, out_shardings=self._split)
        self._changed = threading.Condition()
        self._pending: list[_Request] = []
        self._newest: tuple[int, PyTree] | None = None
        self._placed: tuple[int, PyTree] | None = None  # `_newest`, on the devices.
        self._closed = False
        self._num_requests: list[int] = []  # Per call since the last row of metrics.

    def publish(self, version: int, params: PyTree) -> None:
        """Replaces the parameters, NumPy arrays."""
        with self._changed:
            self._newest = (version, params)
            self._changed.notify_all()

    def policy(self) -> _RemotePolicy:
        """Returns a policy for an actor's next unroll; waits for the first parameters.

        Raises:
          Closed: If the server is closed.
          TimeoutError: If no parameters are published in time.
        """
        with self._changed:
            self._wait_for_parameters()
            assert self._newest is not None
            return _RemotePolicy(self._newest[0], self)

    def step(self, timestep: TimeStep, state: PyTree) -> AgentStep:
        """Acts at one timestep.

        Args:
          timestep: Timestep of one actor, NumPy arrays [N, ...].
          state: State of the core before the timestep, [N, ...].

        Raises:
          Closed: If the server is closed.
          TimeoutError: If there is no answer in time.
          Exception: If the call failed.
        """
        request = _Request(timestep, state, concurrent.futures.Future(), time.monotonic())
        with self._changed:
            if self._closed:
                raise Closed
            self._pending.append(request)
            self._changed.notify_all()
        try:
            return request.answer.result(self._timeout_s)
        except concurrent.futures.TimeoutError as error:
            raise TimeoutError(
                f'an actor waited {self._timeout_s:g} s for the inference of a step; raise timeout_s if it is only slow'
            ) from error

    def run(self) -> None:
        """Answers requests until the server is closed."""
        try:
            with self._changed:
                self._wait_for_parameters()
            for size in self._sizes:  # Compiles before the first request.
                self._call(*(_pad(x, [], size) for x in (self._timestep, self._state)))
            while True:
                requests = self._next_requests()
                try:
                    self._answer(requests)
                except BaseException as error:
                    for request in requests:
                        request.answer.set_exception(error)
                    raise
        except Closed:
            return
        finally:
            self.close()

    def close(self) -> None:
        """Ends all waits, present and future, with `Closed`; further calls do nothing."""
        with self._changed:
            self._closed = True
            for request in self._pending:
                request.answer.set_exception(Closed())
            self._pending = []
            self._changed.notify_all()

    def metrics(self) -> dict[str, Any]:
        """Mean and histogram of the batch sizes, in environments per call, since the last call of this method."""
        with self._changed:
            counts, self._num_requests = self._num_requests, []
        if not counts:
            return {}
        edges = (np.arange(1, self._num_actors + 2) * self._num_envs).tolist()
        histogram = np.bincount(counts, minlength=self._num_actors + 1)[1:].tolist()
        return {
            'inference_batch_size_mean': self._num_envs * float(np.mean(counts)),
            'inference_batch_size_histogram': Histogram(edges, histogram),
        }

    def _wait_for_parameters(self) -> None:
        if not self._changed.wait_for(lambda: self._closed or self._newest is not None, self._timeout_s):
            raise TimeoutError(f'waited {self._timeout_s:g} s for the learner to publish its first parameters')
        if self._closed:
            raise Closed

    def _next_requests(self) -> list[_Request]:
        """Waits for the requests of the next call, at least one."""
        with self._changed:
            # Without a timeout, because no actor acts while the queue is full; `close` ends the wait.
            while not (self._closed or self._pending):
                self._changed.wait(1.0)
            while not self._closed and len(self._pending) < self._num_actors:
                left = self._pending[0].time_s + self._wait_s - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            if self._closed:
                raise Closed
            requests, self._pending = self._pending, []
            return requests

    def _answer(self, requests: list[_Request]) -> None:
        size = next(size for size in self._sizes if size >= len(requests) * self._num_envs)
        acted = self._call(
            _pad(self._timestep, [request.timestep for request in requests], size),
            _pad(self._state, [request.state for request in requests], size),
        )
        with self._changed:
            self._num_requests.append(len(requests))
        for i, request in enumerate(requests):
            rows = slice(i * self._num_envs, (i + 1) * self._num_envs)
            request.answer.set_result(jax.tree.map(lambda x, rows=rows: x[rows], acted))

    def _call(self, timestep: TimeStep, state: PyTree) -> AgentStep:
        """Makes one compiled call, from and to NumPy arrays [B, ...]."""
        newest = self._newest
        assert newest is not None
        if self._placed is None or self._placed[0] != newest[0]:
            self._placed = (newest[0], jax.device_put(newest[1], self._replicated))
        timestep, state = jax.device_put((timestep, state), self._split)
        acted = self._step(self._placed[1], self._key, np.int32(self._num_calls), timestep, state)
        self._num_calls += 1
        return jax.tree.map(np.asarray, acted)


def _pad(structure: PyTree, parts: list[PyTree], size: int) -> PyTree:
    """Concatenates parts [N, ...] and pads them with zeros to [size, ...], with the dtypes of `structure`."""
    arrays, treedef = jax.tree.flatten(structure)
    padded = [np.zeros([size, *array.shape[1:]], array.dtype) for array in arrays]
    start = 0
    for part in parts:
        leaves = treedef.flatten_up_to(part)
        for array, leaf in zip(padded, leaves, strict=True):
            array[start : start + leaf.shape[0]] = leaf
        start += leaves[0].shape[0] if leaves else 0
    return treedef.unflatten(padded)

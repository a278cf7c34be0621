"""Runtime `threads`: the nodes are threads of one process, with the queue and the parameter store in memory."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from impala_jax.agent import Agent
from impala_jax.config import Config
from impala_jax.parameter_store import LocalParameterStore
from impala_jax.runtimes import nodes
from impala_jax.runtimes.host_share import host_share
from impala_jax.trajectory_queue import LocalTrajectoryQueue

_JOIN_TIMEOUT_S = 3.0


class NodeThreads:
    """Threads that end together: the first failure stops all threads, and `join` raises its error.

    Args:
      on_failure: Function that makes all threads end.
    """

    def __init__(self, on_failure: Callable[[], None]):
        self._on_failure = on_failure
        self._threads: list[threading.Thread] = []
        self._first_error: BaseException | None = None
        self._lock = threading.Lock()

    def start(self, name: str, target: Callable[[], None]) -> None:
        """Starts a thread that calls `target`."""

        def run():
            try:
                target()
            except BaseException as error:  # noqa: BLE001 - raised again by `join`.
                with self._lock:
                    self._first_error = self._first_error or error
                self._on_failure()

        thread = threading.Thread(target=run, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def join(self) -> None:
        """Waits a few seconds for all threads to end; raises the first failure."""
        deadline = time.monotonic() + _JOIN_TIMEOUT_S
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0.0))
        stuck = [thread.name for thread in self._threads if thread.is_alive()]
        if stuck:
            logging.getLogger(__name__).warning('did not end within %g s: %s', _JOIN_TIMEOUT_S, ', '.join(stuck))
        if self._first_error is not None:
            raise self._first_error


def run(config: Config, agent: Agent, workdir: Path, stop: threading.Event) -> int:
    """Trains until the budget is spent or `stop` is set; returns the total number of updates."""
    share = host_share(config)
    queue = LocalTrajectoryQueue(share.num_fresh, share.queue_capacity, config.timeout_s)
    store = LocalParameterStore(config.timeout_s)
    inference = nodes.make_inference(config, agent)
    training = nodes.make_training(config, agent, workdir, nodes.publisher(store, inference))
    loop = training.loop
    replay = nodes.make_replay(share)
    replay.restore(nodes.restored_replay(config, workdir, training), agent.trajectory_structure())
    loop.begin()
    if share.num_replayed:
        training.metrics.log_with(lambda: {'replay_size': len(replay)})
    node_stop = threading.Event()

    def stop_all():
        node_stop.set()
        queue.close()
        store.close()
        if inference is not None:
            inference.close()

    threads = NodeThreads(on_failure=stop_all)
    try:
        for index in range(share.num_actors):
            life = functools.partial(nodes.act, share, agent, index, queue, store, node_stop, inference)
            threads.start(f'actor {index}', life)
        if inference is not None:
            threads.start('inference', inference.run)
            training.metrics.log_with(inference.metrics)
        if share.evaluates:
            threads.start('evaluator', lambda: nodes.evaluate_periodically(config, agent, store, workdir, node_stop))
        loop.run(lambda: replay.mix(queue.get_batch()), stop)
    finally:
        stop_all()
        try:
            loop.finish()
        finally:
            loop.close()
            try:
                if share.num_replayed:
                    nodes.save_replay(config, workdir, loop.num_updates, replay.state())
            finally:
                threads.join()
    return loop.num_updates

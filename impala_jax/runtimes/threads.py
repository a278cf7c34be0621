"""Runtime `threads`: the nodes are threads of one process, with the queue and the parameter store in memory."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from impala_jax.agent import Agent
from impala_jax.build import Training
from impala_jax.config import Config
from impala_jax.parameter_store import LocalParameterStore
from impala_jax.runtimes import nodes
from impala_jax.runtimes.host_share import host_share
from impala_jax.trajectory_queue import LocalTrajectoryQueue, Replay

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


@contextlib.contextmanager
def saved_at_the_end(
    config: Config,
    workdir: Path,
    training: Training,
    replay: Replay,
    threads: NodeThreads,
    stop_all: Callable[[], None],
) -> Iterator[None]:
    """Context manager for training in this process: at its end, for any reason, all threads end and the run is saved.

    Args:
      config: Configuration of the experiment.
      workdir: Folder of the run.
      training: The training loop, which has begun.
      replay: Replay of this host.
      threads: Threads of the other nodes.
      stop_all: Function that makes all threads end.
    """
    loop = training.loop
    try:
        yield
    finally:
        stop_all()
        try:
            loop.finish()
        finally:
            loop.close()
            try:
                if config.num_replayed:
                    nodes.save_replay(config, workdir, loop.num_updates, replay.state())
            finally:
                threads.join()


def run(config: Config, agent: Agent, workdir: Path, stop: threading.Event) -> int:
    """Trains until the budget is spent or `stop` is set; returns the total number of updates."""
    share = host_share(config)
    queue = LocalTrajectoryQueue(share.num_fresh, share.queue_capacity, config.timeout_s)
    store = LocalParameterStore(config.timeout_s)
    inference = nodes.make_inference(config, agent)
    training = nodes.make_training(config, agent, workdir, nodes.publisher(store, inference))
    replay = nodes.make_restored_replay(config, agent, workdir, training)
    training.loop.begin()
    node_stop = threading.Event()

    def stop_all():
        node_stop.set()
        queue.close()
        store.close()
        if inference is not None:
            inference.close()

    threads = NodeThreads(on_failure=stop_all)
    with saved_at_the_end(config, workdir, training, replay, threads, stop_all):
        for index in range(share.num_actors):
            target = functools.partial(nodes.act, share, agent, index, queue, store, node_stop, inference)
            threads.start(f'actor {index}', target)
        if inference is not None:
            threads.start('inference', inference.run)
            training.metrics.log_with(inference.metrics)
        if share.evaluates:
            evaluator = nodes.make_evaluator(config, agent, node_stop)
            evaluate = functools.partial(
                nodes.evaluate_periodically, config, evaluator, store.latest, workdir, node_stop
            )
            threads.start('evaluator', evaluate)
        training.loop.run(lambda: replay.mix(queue.get_batch()), stop)
    return training.loop.num_updates

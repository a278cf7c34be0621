"""Runtime `ray`: actors and evaluator are processes of Ray, on this machine or a cluster; the learner is this process.

Trajectories arrive as views of Ray's shared memory, and parameters leave through it. Environments and actors do not
share the interpreter with the learner.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from pathlib import Path

from impala_jax.agent import Agent
from impala_jax.config import Config
from impala_jax.parameter_store import LocalParameterStore
from impala_jax.rundir.code_version import code_version
from impala_jax.runtimes import nodes
from impala_jax.runtimes.host_share import host_share
from impala_jax.runtimes.ray_runtime.engine import Cluster, LocalEngine
from impala_jax.runtimes.ray_runtime.fleet import EvaluatorInRay, Fleet, Published, store_bytes
from impala_jax.runtimes.ray_runtime.remote import Setup
from impala_jax.runtimes.threads import NodeThreads, saved_at_the_end


def run(config: Config, agent: Agent, workdir: Path, stop: threading.Event) -> int:
    """Trains until the budget is spent or `stop` is set; returns the total number of updates.

    Raises:
      Closed: If `stop` was set before the engine was ready.
      ConfigError: If the cluster cannot be joined.
      NodeFailure: If an actor or the evaluator raised an exception, or died again and again.
    """
    share = host_share(config)
    setup = Setup(config, share, agent.spec, code_version())
    if config.ray_address is None:
        num_nodes = share.num_actors + share.evaluates
        engine = LocalEngine(num_nodes, store_bytes(setup, agent), share.timeout_s)
    else:
        engine = Cluster(config.ray_address, setup.version, share.timeout_s)  # Refuses before anything is written.
    with contextlib.closing(engine):
        store = LocalParameterStore(config.timeout_s)
        training = nodes.make_training(config, agent, workdir, store.publish)  # While the engine starts.
        replay = nodes.make_restored_replay(config, agent, workdir, training)
        engine.connect(stop)
        published = Published(store)
        fleet = Fleet(engine, setup, published)
        training.loop.begin()
        training.metrics.log_with(fleet.metrics)
        node_stop = threading.Event()

        def stop_all():
            node_stop.set()
            fleet.close()
            store.close()

        threads = NodeThreads(on_failure=stop_all)
        with saved_at_the_end(config, workdir, training, replay, threads, stop_all):
            if share.evaluates:
                evaluator = EvaluatorInRay(setup, node_stop)
                evaluate = functools.partial(
                    nodes.evaluate_periodically, config, evaluator, published.latest, workdir, node_stop
                )
                threads.start('evaluator', evaluate)
            training.loop.run(lambda: replay.mix(fleet.get_batch()), stop)
        return training.loop.num_updates

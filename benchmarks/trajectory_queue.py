"""Cost of moving trajectories from actor to learner: the queue within one process, and Reverb.

    python benchmarks/trajectory_queue.py [--config configs/pong.py] [--num-envs 8] [--repeats 20] [--json FILE]

There is one writer and one reader. A call puts the trajectories of a batch and gets the batch. `of memcpy` is relative
to copying the same bytes once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from common import in_turn, machine, report

from impala_jax import environments
from impala_jax.agent import Agent
from impala_jax.build import make_agent
from impala_jax.cli import command_line
from impala_jax.config import ActorConfig, Config
from impala_jax.runtimes import nodes
from impala_jax.runtimes.host_share import host_share
from impala_jax.trajectory_queue import LocalTrajectoryQueue, TrajectoryQueue, columns, concatenate
from impala_jax.types import Trajectory


@contextlib.contextmanager
def reverb_queue(config: Config, agent: Agent) -> Iterator[TrajectoryQueue]:
    """Context manager for a Reverb queue with its own server."""
    import reverb

    from impala_jax.runtimes import seals
    from impala_jax.runtimes.reverb_tables import tables
    from impala_jax.runtimes.reverb_transport import ReverbTrajectoryQueue

    server = reverb.Server(tables(host_share(config)))
    queue = ReverbTrajectoryQueue(reverb.Client(f'localhost:{server.port}'), seals.new_key(), host_share(config), agent)
    try:
        yield queue
    finally:
        queue.close()
        server.stop()


def through(queue: TrajectoryQueue, batch: Trajectory) -> Callable[[], object]:
    """Returns a function that puts the trajectories of a batch and gets the batch, after checking the result once."""

    def call():
        queue.put(batch)
        return queue.get_batch()

    taken = call()
    for sent, received in zip(jax.tree.leaves(batch), jax.tree.leaves(taken), strict=True):
        np.testing.assert_array_equal(sent, received)
    return call


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--config', default='configs/pong.py', help='environment, network, batch and unroll length')
    parser.add_argument('--repeats', type=int, default=20, help='batches per queue')
    parser.add_argument('--json', type=Path, help='write the numbers to this file')
    args = parser.parse_args()
    config = command_line.load_config_file(args.config)
    learner = dataclasses.replace(config.learner, queue_capacity=2 * config.num_fresh)
    config = dataclasses.replace(config, learner=learner, actor=ActorConfig(1, config.num_fresh))
    about = machine()
    agent = make_agent(config.network, environments.spec(config.environment), config.popart.enabled)
    params = jax.tree.map(np.asarray, agent.init(jax.random.PRNGKey(0)))
    actor = nodes.make_actor(host_share(config), agent, 0)
    batch = actor.unroll(0, params)
    actor.environment.close()
    steps = config.learner.unroll_length * config.num_fresh
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(batch))

    local = LocalTrajectoryQueue(config.num_fresh, 2 * config.num_fresh, config.timeout_s)
    with reverb_queue(config, agent) as remote:
        fns = {
            'memcpy': lambda: concatenate([columns(batch, i, i + 1) for i in range(config.num_fresh)]),
            'in the process': through(local, batch),
            'Reverb': through(remote, batch),
        }
        times = in_turn(fns, args.repeats)
    rows = [
        {
            'queue': name,
            'milliseconds per batch': [1e3 * s for s in seconds],
            'steps/s': [steps / s for s in seconds],
            'MB/s': [num_bytes / s / 1e6 for s in seconds],
            'of memcpy': float(np.median(times['memcpy']) / np.median(seconds)),
        }
        for name, seconds in times.items()
    ]
    report(
        f'{config.environment.name}: batches of {config.num_fresh}, {num_bytes / steps:,.0f} bytes per step',
        rows,
        about,
        args.json,
    )


if __name__ == '__main__':
    main()

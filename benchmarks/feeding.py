"""Throughput of the learner alone, and fed by actors in Ray that send recorded unrolls again.

    python benchmarks/feeding.py [--torso shallow deep] [--actors 2] [--updates 50] [--rounds 5] [--json FILE]

Alone, the learner repeats an update of a batch that is on its device. Fed, the training loop of a run takes unrolls
from the actors, assembles and places batches, updates, and publishes parameters, which the actors receive with each
request. The actors play Pong for one unroll and then only return it, so the ratio is the cost of everything between the
actors' processes and the update. Both are measured in turn. Needs Ray.
"""

from __future__ import annotations

import argparse
import threading
import time
from pathlib import Path

import jax
import numpy as np
from common import machine, report

from impala_jax import environments
from impala_jax.build import make_agent, make_learner
from impala_jax.config import ActorConfig, Config, EnvironmentConfig, EvaluatorConfig, LearnerConfig, NetworkConfig
from impala_jax.kernels import allocator
from impala_jax.parameter_store import LocalParameterStore
from impala_jax.rundir.code_version import code_version
from impala_jax.runtimes.host_share import host_share
from impala_jax.runtimes.ray_runtime.engine import LocalEngine
from impala_jax.runtimes.ray_runtime.fleet import Fleet, Published, store_bytes
from impala_jax.runtimes.ray_runtime.remote import Failure, RemoteActor, Setup
from impala_jax.training.hosts import OneHost
from impala_jax.training.loop import TrainingLoop
from impala_jax.types import PyTree, Trajectory


class RecordedActor(RemoteActor):
    """An actor that returns its first unroll again and again."""

    _recorded: Trajectory | Failure | None = None

    def unroll(self, version: int, params: PyTree) -> Trajectory | Failure:
        """Returns the first unroll, with the version of the parameters."""
        if self._recorded is None:
            self._recorded = super().unroll(version, params)
        if isinstance(self._recorded, Failure):
            return self._recorded
        return self._recorded._replace(version=np.full_like(self._recorded.version, version))


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--torso', nargs='+', default=('shallow', 'deep'), help='networks to measure')
    parser.add_argument('--actors', type=int, default=2, help='number of actors, of 16 environments each')
    parser.add_argument('--updates', type=int, default=50, help='updates per measurement')
    parser.add_argument('--rounds', type=int, default=5, help='measurements of each')
    parser.add_argument('--json', type=Path, help='write the numbers to this file')
    args = parser.parse_args()
    allocator.configure_allocator()
    about = machine()
    rows = []
    for torso in args.torso:
        alone, fed = measure(torso, args.actors, args.updates, args.rounds)
        ratio = float(np.median(np.array(fed) / np.array(alone)))
        rows.append({'torso': torso, 'alone, steps/s': alone, 'fed, steps/s': fed, 'fed / alone': ratio})
    report('The learner alone and fed by actors in Ray', rows, about, args.json)


def measure(torso: str, num_actors: int, num_updates: int, rounds: int) -> tuple[list[float], list[float]]:
    """Measures steps per second of the learner alone and fed, in turn."""
    config = Config(
        environment=EnvironmentConfig(name='atari/pong'),
        network=NetworkConfig(torso=torso),
        learner=LearnerConfig(batch_size=32, unroll_length=20),
        actor=ActorConfig(num_actors=num_actors),
        evaluator=EvaluatorConfig(episodes=0),
    )
    share = host_share(config)
    agent = make_agent(config.network, environments.spec(config.environment))
    setup = Setup(config, share, agent.spec, code_version())
    engine = LocalEngine(num_actors, store_bytes(setup, agent), config.timeout_s)
    try:
        store = LocalParameterStore(config.timeout_s)
        learner = make_learner(config, agent)
        loop = TrainingLoop(OneHost(learner), learner.init(jax.random.PRNGKey(0)), store.publish, 10**9, 1)
        loop.publish()
        engine.connect(stop := threading.Event())
        fleet = Fleet(engine, setup, Published(store), RecordedActor)
        steps = num_updates * config.learner.batch_size * config.learner.unroll_length
        results: tuple[list[float], list[float]] = [], []
        state = loop.state
        for i in range(rounds + 1):  # The first one compiles.
            batch = learner.put(fleet.get_batch().experience)
            start = time.perf_counter()
            for _ in range(num_updates):
                state, _ = learner.update(state, batch)
            jax.block_until_ready(state)
            alone = steps / (time.perf_counter() - start)
            total = int(state.num_updates) + num_updates
            loop = TrainingLoop(OneHost(learner), state, store.publish, total, 1)
            start = time.perf_counter()
            loop.run(fleet.get_batch, stop)
            fed = steps / (time.perf_counter() - start)
            loop.close()
            state = loop.state
            if i:
                results[0].append(alone)
                results[1].append(fed)
        fleet.close()
        return results
    finally:
        engine.close()


if __name__ == '__main__':
    main()

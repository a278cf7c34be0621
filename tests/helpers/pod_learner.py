"""One of two hosts, with its half of the batches: python -m tests.helpers.pod_learner HOST COORDINATOR FILE"""

import sys

import jax
import numpy as np

from impala_jax.build import make_agent, make_learner
from impala_jax.config import OptimizerConfig
from impala_jax.runtimes import pod
from impala_jax.training.hosts import ManyHosts
from impala_jax.trajectory_queue import columns
from tests.helpers.batches import NETWORK, SPEC, B, T, make_batch, make_config

NUM_UPDATES = 20
CONFIG = make_config(total_updates=NUM_UPDATES, optimizer=OptimizerConfig(learning_rate=0.01))


def main(host: int, coordinator: str, file: str) -> None:
    pod.join(coordinator, 2, host, timeout_s=60.0)
    agent = make_agent(NETWORK, SPEC)
    learner = make_learner(CONFIG, agent)
    hosts = ManyHosts(learner, B, agent.empty_trajectory(T, B // 2))
    state = learner.init(jax.random.PRNGKey(host))  # The first host's counts.
    results = {}
    for i in range(NUM_UPDATES):
        half = columns(make_batch(i), host * B // 2, (host + 1) * B // 2)
        update = hosts.update(state, hosts.put(half), None, waited_s=host + i)
        state, counts = update.state, update.counts
        results |= {f'version/{i}': counts.version, f'return/{i}': counts.info.episode_return}
        results |= {f'waited_s/{i}': update.waited_s, f'loss/{i}': update.logs['loss']}
    results |= {f'leaf/{i}': leaf for i, leaf in enumerate(jax.tree.leaves(state))}
    results = {name: np.array(value, copy=True) for name, value in results.items()}  # The state is donated.
    # The second host has to stop, and has nothing to learn from; the first one finds out.
    if host == 0:
        update = hosts.update(state, hosts.put(half), None)
        state, results['has_learned'] = update.state, np.array(update.counts is not None)
    else:
        state, results['has_learned'] = hosts.stop(state, None), np.array(False)
    results |= {f'stopped_leaf/{i}': np.array(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
    np.savez(file, **results)
    jax.distributed.shutdown()


if __name__ == '__main__':
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])

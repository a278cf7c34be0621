"""Throughput of acting: the emulator alone, inference alone, and the actor, which alternates between both.

    python benchmarks/acting.py [--config configs/pong.py] [--num-envs 8 16 32] [--repeats 5] [--json FILE]

The figures are agent steps per second; multiply by the action repeat for frames. `of its parts` compares the actor with
the limit given by the other two: 1 / (1 / emulator + 1 / inference).
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from common import in_turn, machine, report

from impala_jax import environments
from impala_jax.agent import Agent
from impala_jax.build import make_agent
from impala_jax.cli import command_line
from impala_jax.config import ActorConfig, Config
from impala_jax.environments import VectorEnvironment
from impala_jax.kernels import allocator
from impala_jax.runtimes import nodes
from impala_jax.runtimes.host_share import host_share
from impala_jax.types import PyTree


def parts(
    config: Config, agent: Agent, params: PyTree, num_envs: int
) -> tuple[VectorEnvironment, dict[str, Callable[[], object]]]:
    """Returns environments, and functions for one unroll of `emulator`, `inference` and `actor` with them.

    Args:
      config: Environment, network and unroll length.
      agent: Agent of the configuration.
      params: Parameters of the agent, on the device.
      num_envs: Number of environments; the caller closes them.
    """
    T = config.learner.unroll_length
    actor = nodes.make_actor(host_share(dataclasses.replace(config, actor=ActorConfig(1, num_envs))), agent, 0)
    environment = actor.environment
    timestep = environment.reset()
    step, key = jax.jit(agent.step), jax.random.PRNGKey(0)
    state = agent.initial_state(num_envs)
    actions = np.random.default_rng(0).integers(0, agent.spec.num_actions, [T, num_envs])

    def emulate():
        for row in actions:
            environment.step(row)

    def infer():
        for _ in range(T):
            np.asarray(step(params, key, timestep, state).action)

    return environment, {'emulator': emulate, 'inference': infer, 'actor': lambda: actor.unroll(0, params)}


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--config', default='configs/pong.py', help='environment, network and unroll length')
    parser.add_argument('--num-envs', type=int, nargs='+', default=(8, 16, 32), help='environments per actor')
    parser.add_argument('--repeats', type=int, default=5, help='unrolls per measurement')
    parser.add_argument('--json', type=Path, help='write the numbers to this file')
    args = parser.parse_args()
    allocator.configure_allocator()
    config = command_line.load_config_file(args.config)
    about, rows = machine(), []
    agent = make_agent(config.network, environments.spec(config.environment), config.popart.enabled)
    params = agent.init(jax.random.PRNGKey(0))
    T = config.learner.unroll_length
    for num_envs in args.num_envs:
        environment, fns = parts(config, agent, params, num_envs)
        times = in_turn(fns, args.repeats)
        environment.close()
        rates = {name: [T * num_envs / s for s in seconds] for name, seconds in times.items()}
        in_sequence = [e + i for e, i in zip(times['emulator'], times['inference'], strict=True)]
        share = float(np.median(in_sequence) / np.median(times['actor']))
        rows.append({'environments': str(num_envs), **rates, 'of its parts': share})
    report(f'{config.environment.name}, steps/s, one actor', rows, about, args.json)


if __name__ == '__main__':
    main()

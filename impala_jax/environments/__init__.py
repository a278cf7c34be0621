"""Environments: everything behind one interface, `VectorEnvironment`, by name."""

from __future__ import annotations

import os

from impala_jax.config import ConfigError, EnvironmentConfig
from impala_jax.environments.base import EnvironmentFailure, VectorEnvironment
from impala_jax.environments.factories import BUILT_IN, environment_factory
from impala_jax.environments.serial import SerialVectorEnvironment
from impala_jax.types import EnvironmentSpec

__all__ = ['EnvironmentFailure', 'VectorEnvironment', 'make', 'spec']


def make(
    config: EnvironmentConfig, num_envs: int, seed: int, *, evaluation: bool = False, timeout_s: float = 300.0
) -> VectorEnvironment:
    """Builds `num_envs` environments that step together.

    Args:
      seed: Environment i gets a seed of its own, derived from this one; give every actor another.
      evaluation: Whole games on Atari, and pictures where an environment has to be built for them.
      timeout_s: No wait for a worker process lasts longer.
    Raises:
      ConfigError: the name means nothing, something is not installed, or an environment cannot be built or used.
    """
    if num_envs < 1:
        raise ConfigError(f'the number of environments must be positive, got {num_envs}')
    if config.name.startswith('atari/'):
        from impala_jax.environments.atari import AtariVectorEnvironment

        return AtariVectorEnvironment(config, num_envs, seed, evaluation=evaluation)
    factory = environment_factory(config, evaluation)
    processes = config.processes or (0 if config.name in BUILT_IN else len(os.sched_getaffinity(0)))
    if config.name.startswith('dmlab/'):
        processes = num_envs
    if not processes:
        return SerialVectorEnvironment(factory, num_envs, seed, name=config.name, max_failures=config.max_failures)
    from impala_jax.environments.processes import ProcessVectorEnvironment

    return ProcessVectorEnvironment(
        config, num_envs, seed, processes=min(processes, num_envs), evaluation=evaluation, timeout_s=timeout_s
    )


def spec(config: EnvironmentConfig) -> EnvironmentSpec:
    """What an agent for this environment must know; builds one environment to find out.

    Raises:
      ConfigError: as `make`.
    """
    if config.name.startswith(('atari/', 'dmlab/')):
        environment = make(config, 1, seed=0)
    else:
        environment = SerialVectorEnvironment(environment_factory(config), 1, seed=0, name=config.name)
    try:
        return environment.spec
    finally:
        environment.close()

"""Environments: everything behind one interface, `VectorEnvironment`, by name."""

from __future__ import annotations

import concurrent.futures
import contextlib

import numpy as np

from impala_jax.config import ConfigError, EnvironmentConfig, num_cores
from impala_jax.environments import suites
from impala_jax.environments.base import EnvironmentFailure, VectorEnvironment, derived_seed
from impala_jax.environments.factories import BUILT_IN, environment_factory
from impala_jax.environments.serial import SerialVectorEnvironment
from impala_jax.types import EnvironmentSpec

__all__ = ['EnvironmentFailure', 'VectorEnvironment', 'make', 'spec']


def make(
    config: EnvironmentConfig,
    num_envs: int,
    seed: int,
    *,
    evaluation: bool = False,
    timeout_s: float = 300.0,
    task_ids: np.ndarray | None = None,
) -> VectorEnvironment:
    """Builds `num_envs` environments that step together.

    Args:
      seed: Environment i gets a seed of its own, derived from this one; give every actor another.
      evaluation: Whole games on Atari, and pictures where an environment has to be built for them.
      timeout_s: No wait for a worker process lasts longer.
      task_ids: Of a suite, [num_envs]: the task of each environment; by default they take turns.
    Raises:
      ConfigError: the name means nothing, something is not installed, an environment cannot be built or used, or the
        tasks of a suite differ in their specs.
    """
    if num_envs < 1:
        raise ConfigError(f'the number of environments must be positive, got {num_envs}')
    if config.name in suites.SUITES:
        ids = suites.assign(config, 1, num_envs)[0] if task_ids is None else task_ids
        return _make_suite(config, ids, seed, evaluation, timeout_s)
    if config.name.startswith('atari/'):
        from impala_jax.environments.atari import AtariVectorEnvironment

        return AtariVectorEnvironment(config, num_envs, seed, evaluation=evaluation)
    factory = environment_factory(config, evaluation)
    processes = config.processes or (0 if config.name in BUILT_IN else num_cores())
    if config.name.startswith('dmlab/'):
        processes = num_envs
    if not processes:
        return SerialVectorEnvironment(factory, num_envs, seed, name=config.name, max_failures=config.max_failures)
    from impala_jax.environments.processes import ProcessVectorEnvironment

    return ProcessVectorEnvironment(
        config, num_envs, seed, processes=min(processes, num_envs), evaluation=evaluation, timeout_s=timeout_s
    )


def _make_suite(
    config: EnvironmentConfig, task_ids: np.ndarray, seed: int, evaluation: bool, timeout_s: float
) -> VectorEnvironment:
    names = suites.tasks(config)
    indices = {task: np.flatnonzero(task_ids == task) for task in np.unique(task_ids).tolist()}
    with contextlib.ExitStack() as cleanup:
        parts = {}
        for task, where in indices.items():
            part = make(
                suites.task_config(config, names[task]),
                len(where),
                derived_seed(seed, task),
                evaluation=evaluation,
                timeout_s=timeout_s,
            )
            cleanup.callback(part.close)
            parts[names[task]] = part
        common = suites.common_spec(config.name, {task: part.spec for task, part in parts.items()})
        cleanup.pop_all()
    return suites.SuiteVectorEnvironment(list(parts.values()), list(indices.values()), common._replace(tasks=names))


def spec(config: EnvironmentConfig) -> EnvironmentSpec:
    """What an agent for this environment must know; builds one environment (of each task) to find out.

    Raises:
      ConfigError: as `make`.
    """
    if config.name in suites.SUITES:
        names = suites.tasks(config)
        configs = [suites.task_config(config, task) for task in names]
        with concurrent.futures.ThreadPoolExecutor(num_cores()) as pool:
            specs = dict(zip(names, pool.map(spec, configs), strict=True))
        return suites.common_spec(config.name, specs)._replace(tasks=names)
    if config.name.startswith(('atari/', 'dmlab/')):
        environment = make(config, 1, seed=0)
    else:
        environment = SerialVectorEnvironment(environment_factory(config), 1, seed=0, name=config.name)
    try:
        return environment.spec
    finally:
        environment.close()

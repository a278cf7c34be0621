"""Environments by name, all behind one interface, `VectorEnvironment`."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
from collections.abc import Callable

import numpy as np

from impala_jax.config import ConfigError, EnvironmentConfig
from impala_jax.environments import dmlab, suites
from impala_jax.environments.base import EnvironmentFailure, VectorEnvironment
from impala_jax.environments.factories import BUILT_IN, environment_factory
from impala_jax.environments.processes import ProcessVectorEnvironment
from impala_jax.environments.serial import SerialVectorEnvironment
from impala_jax.seeds import derived_seed
from impala_jax.system.machine import num_cores
from impala_jax.types import EnvironmentSpec

__all__ = ['EnvironmentFailure', 'VectorEnvironment', 'make', 'spec']


def make(
    config: EnvironmentConfig,
    num_envs: int,
    seed: int,
    *,
    evaluation: bool = False,
    timeout_s: float = 300.0,
    max_episode_steps: int | None = None,
    task_ids: np.ndarray | None = None,
    closed: Callable[[], bool] = lambda: False,
) -> VectorEnvironment:
    """Builds `num_envs` environments that step together.

    Args:
      config: The environment's name and settings.
      num_envs: Number of environments.
      seed: Seed from which each environment's own seed is derived; different for every actor.
      evaluation: Whether to play whole games on Atari, and to enable rendering where it must be requested at
        construction.
      timeout_s: Longest wait for a worker process, in seconds.
      max_episode_steps: Number of agent steps after which an episode is truncated; None for the environment's own
        limit only.
      task_ids: Task of each environment of a suite, [num_envs]; None assigns the tasks round-robin.
      closed: Callable that returns True when the run has ended; waits for worker processes then raise `Closed`.

    Returns:
      The vector of environments.

    Raises:
      ConfigError: The name is unknown, a package is missing, an environment cannot be built or used, or the tasks of
        a suite have different specs.
    """
    if num_envs < 1:
        raise ConfigError(f'the number of environments must be positive, got {num_envs}')
    if config.name in suites.SUITES:
        ids = suites.assign(config, 1, num_envs)[0] if task_ids is None else task_ids
        return _make_suite(config, ids, seed, evaluation, timeout_s, max_episode_steps, closed)
    return _make_task(config, num_envs, seed, evaluation, timeout_s, max_episode_steps, closed)


def _make_task(
    config: EnvironmentConfig,
    num_envs: int,
    seed: int,
    evaluation: bool,
    timeout_s: float,
    max_episode_steps: int | None,
    closed: Callable[[], bool],
) -> VectorEnvironment:
    if config.name.startswith('atari/'):
        from impala_jax.environments.atari import AtariVectorEnvironment

        return AtariVectorEnvironment(
            config, num_envs, seed, evaluation=evaluation, max_episode_steps=max_episode_steps
        )
    if config.is_functional:
        from impala_jax.environments.functional import FunctionalEnvironment, task
        from impala_jax.environments.functional.vector import FunctionalVectorEnvironment

        environment = FunctionalEnvironment(task(config.name), max_episode_steps, name=config.name)
        return FunctionalVectorEnvironment(environment, num_envs, seed)
    if config.name in BUILT_IN and not config.processes:
        return SerialVectorEnvironment(
            environment_factory(config, evaluation),
            num_envs,
            seed,
            name=config.name,
            max_failures=config.max_failures,
            max_episode_steps=max_episode_steps,
        )
    processes = config.processes or (num_envs if config.name.startswith('dmlab/') else num_cores())
    return ProcessVectorEnvironment(
        config,
        num_envs,
        seed,
        processes=min(processes, num_envs),
        evaluation=evaluation,
        timeout_s=timeout_s,
        max_episode_steps=max_episode_steps,
        closed=closed,
    )


def _make_suite(
    config: EnvironmentConfig,
    task_ids: np.ndarray,
    seed: int,
    evaluation: bool,
    timeout_s: float,
    max_episode_steps: int | None,
    closed: Callable[[], bool],
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
                max_episode_steps=max_episode_steps,
                closed=closed,
            )
            cleanup.callback(part.close)
            parts[names[task]] = part
        common = suites.common_spec(config.name, {task: part.spec for task, part in parts.items()})
        cleanup.pop_all()
    return suites.SuiteVectorEnvironment(list(parts.values()), list(indices.values()), common._replace(tasks=names))


def spec(config: EnvironmentConfig, timeout_s: float = 300.0) -> EnvironmentSpec:
    """Returns the spec that an agent for this environment needs.

    One environment is built to read its spec, for a suite one per task. The specs of DeepMind Lab's levels are the
    same by construction: only the first level is built, and only the settings of the others are checked.

    Built-in environments, Atari and environments in JAX are built in this process. All others are built in a worker
    process and reset once, so an environment that exits, hangs or contradicts its own spec is refused before anything
    else starts.

    Args:
      config: The environment's name and settings.
      timeout_s: Longest wait for a worker process, in seconds.

    Returns:
      The spec of the observations and actions, and the names of the tasks.

    Raises:
      ConfigError: `make` would raise it, or the first observation does not match the spec.
    """
    if config.name in suites.SUITES:
        names = suites.tasks(config)
        configs = [suites.task_config(config, task) for task in names]
        levels = [task for task in configs if task.name.startswith('dmlab/')]
        for level in levels:
            dmlab.engine_level(level)
        built = [task for task in configs if task not in levels[1:]]
        with concurrent.futures.ThreadPoolExecutor(num_cores()) as pool:
            found = pool.map(lambda task: spec(task, timeout_s), built)
            specs = {task.name: own for task, own in zip(built, found, strict=True)}
        return suites.common_spec(config.name, specs)._replace(tasks=names)
    in_process = dataclasses.replace(config, processes=0) if config.name in BUILT_IN else config
    with contextlib.ExitStack() as cleanup:
        try:
            environment = make(in_process, 1, seed=0, timeout_s=timeout_s)
            cleanup.callback(environment.close)
            # DeepMind Lab's reset may take a minute, and its observations are known to match the spec. It is needed
            # only with hardware rendering, because a missing GPU ends the engine's process at the first reset.
            is_level = config.name.startswith('dmlab/')
            if isinstance(environment, ProcessVectorEnvironment) and (not is_level or config.renderer == 'hardware'):
                environment.reset()
            return environment.spec
        except (EnvironmentFailure, TimeoutError) as error:
            reason = str(error).splitlines()[-1]
            if config.name.startswith('dmlab/') and config.renderer == 'hardware':
                reason = f'{reason}; {dmlab.HARDWARE}'
            raise ConfigError(f'environment {config.name!r} cannot be used: {reason}') from error

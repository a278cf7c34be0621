"""Environments: everything behind one interface, `VectorEnvironment`, by name."""

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
      seed: Environment i gets a seed of its own, derived from this one; give every actor another.
      evaluation: Whole games on Atari, and pictures where an environment has to be built for them.
      timeout_s: No wait for a worker process lasts longer.
      max_episode_steps: Agent steps after which an episode is truncated; None for no limit but the environment's own.
      task_ids: Of a suite, [num_envs]: the task of each environment; by default they take turns.
      closed: Once it is true, a wait for a worker process ends with `Closed`.
    Raises:
      ConfigError: the name means nothing, something is not installed, an environment cannot be built or used, or the
        tasks of a suite differ in their specs.
    """
    if num_envs < 1:
        raise ConfigError(f'the number of environments must be positive, got {num_envs}')
    if config.name in suites.SUITES:
        ids = suites.assign(config, 1, num_envs)[0] if task_ids is None else task_ids
        return _make_suite(config, ids, seed, evaluation, timeout_s, max_episode_steps, closed)
    if config.name.startswith('atari/'):
        from impala_jax.environments.atari import AtariVectorEnvironment

        return AtariVectorEnvironment(
            config, num_envs, seed, evaluation=evaluation, max_episode_steps=max_episode_steps
        )
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
    """What an agent for this environment must know; builds one environment to find out, of a suite one of each task.

    Of DeepMind Lab's levels, whose specs are the same by construction, it builds only the first, and looks at the
    settings of the others.

    Only built-in environments and Atari are built in this process. Any other one is built in a worker process and
    reset once, so that one that exits, hangs or contradicts its own spec is refused before anything else begins.

    Args:
      timeout_s: No wait for a worker process lasts longer.
    Raises:
      ConfigError: As `make`, and a first observation that the spec does not describe.
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
            # DeepMind Lab's reset may take a minute, and its observations are ours; but it is there that the engine
            # looks for a GPU, and ends its process.
            is_level = config.name.startswith('dmlab/')
            if isinstance(environment, ProcessVectorEnvironment) and (not is_level or config.renderer == 'hardware'):
                environment.reset()
            return environment.spec
        except (EnvironmentFailure, TimeoutError) as error:
            reason = str(error).splitlines()[-1]
            if config.name.startswith('dmlab/') and config.renderer == 'hardware':
                reason = f'{reason}; {dmlab.HARDWARE}'
            raise ConfigError(f'environment {config.name!r} cannot be used: {reason}') from error

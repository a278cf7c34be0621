"""Suites of tasks for one agent with one set of parameters, and the assignment of environments to tasks.

| suite | tasks |
|---|---|
| `atari57` | the 57 games of the Arcade Learning Environment, each with all 18 actions (paper, section 5.3) |
| `dmlab30` | the 30 training levels of DMLab-30 (section 5.3) |
| `minisuite` | four small tasks of this package, see `minisuite.py` |
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from impala_jax import data
from impala_jax.config import ConfigError, EnvironmentConfig
from impala_jax.environments import base, minisuite
from impala_jax.environments.base import VectorEnvironment
from impala_jax.environments.serial import SerialVectorEnvironment
from impala_jax.rundir import plain_state
from impala_jax.types import EnvironmentSpec, StepInfo, TimeStep

_T = TypeVar('_T')


def _atari57() -> tuple[str, ...]:
    # 'UpNDown' -> 'up_n_down'
    return tuple('atari/' + re.sub('(?<!^)(?=[A-Z])', '_', row['game']).lower() for row in data.rows(_ATARI57))


def _dmlab30() -> tuple[str, ...]:
    return tuple('dmlab/' + row['level_train'] for row in data.rows(_DMLAB30))


def _minisuite() -> tuple[str, ...]:
    return tuple('minisuite/' + name for name in minisuite.TASKS)


_ATARI57, _DMLAB30 = 'atari57_scores.csv', 'dmlab30_scores.csv'
SUITES: dict[str, Callable[[], tuple[str, ...]]] = {
    'atari57': _atari57,
    'dmlab30': _dmlab30,
    'minisuite': _minisuite,
}


def tasks(config: EnvironmentConfig) -> tuple[str, ...]:
    """Returns the names of a suite's tasks; a single environment is a suite of one task.

    A task's id is its index in this tuple.
    """
    return SUITES[config.name]() if config.name in SUITES else (config.name,)


def task_config(config: EnvironmentConfig, task: str) -> EnvironmentConfig:
    """Returns the configuration of one task of a suite, with the suite's other settings."""
    full_action_space = config.full_action_space
    if config.name == 'atari57' and full_action_space is None:
        full_action_space = True
    return dataclasses.replace(config, name=task, full_action_space=full_action_space)


def assign(config: EnvironmentConfig, num_actors: int, num_envs: int) -> np.ndarray:
    """Assigns a task to every environment of all actors of a run.

    Over all actors, the numbers of environments of any two tasks differ by at most one. Within an actor the tasks
    alternate, so any subset of its trajectories covers as many tasks as possible. (In the paper each actor has one
    environment, and so one task.)

    Args:
      config: The suite.
      num_actors: Number of all actors of the run.
      num_envs: Number of environments per actor.

    Returns:
      Task ids, [num_actors, num_envs] int32.

    Raises:
      ConfigError: There are fewer environments than tasks.
    """
    num_tasks = len(tasks(config))
    if num_actors * num_envs < num_tasks:
        raise ConfigError(
            f'{config.name} has {num_tasks} tasks, but there are {num_actors * num_envs} environments '
            f'(actor.num_actors {num_actors} x actor.num_envs {num_envs}); the smallest actor.num_envs that works is '
            f'{-(-num_tasks // num_actors)}'
        )
    return take_turns(config, num_actors, num_envs)


def take_turns(config: EnvironmentConfig, num_actors: int, num_envs: int, first: int = 0) -> np.ndarray:
    """Assigns tasks round-robin from task `first` on; unlike in `assign`, some tasks may be left to other actors."""
    ids = first + np.arange(num_actors * num_envs, dtype=np.int32)
    return (ids % len(tasks(config))).reshape(num_actors, num_envs)


def common_spec(suite: str, specs: dict[str, EnvironmentSpec]) -> EnvironmentSpec:
    """Returns the spec that is common to all tasks.

    Args:
      suite: Name of the suite, for error messages.
      specs: Spec of each task, by name.

    Raises:
      ConfigError: The specs differ.
    """
    (first_task, first), *others = specs.items()
    for task, spec in others:
        if spec.num_actions != first.num_actions:
            difference = f'{first_task} has {first.num_actions} actions, {task} has {spec.num_actions}'
        elif spec.observation != first.observation:
            difference = f'the observations of {first_task} are {first.observation}, of {task} {spec.observation}'
        else:
            continue
        raise ConfigError(f'the tasks of {suite!r} cannot share a network: {difference}')
    return first


class SuiteVectorEnvironment:
    """A `VectorEnvironment` that combines one vector per task.

    Vectors that wait for something outside Python (processes, emulators in C++) step concurrently.

    Args:
      parts: One vector of environments per task; closed together with this one.
      indices: Indices of each part's environments in the whole vector, ascending.
      spec: Spec of the suite.
    """

    def __init__(self, parts: Sequence[VectorEnvironment], indices: Sequence[np.ndarray], spec: EnvironmentSpec):
        self.num_envs = sum(part.num_envs for part in parts)
        self.spec = spec
        self._parts = parts
        self._indices = indices
        waits = any(not isinstance(part, SerialVectorEnvironment) for part in parts)
        self._pool = concurrent.futures.ThreadPoolExecutor(len(parts), 'suite') if waits and len(parts) > 1 else None

    def reset(self) -> TimeStep:
        """See `VectorEnvironment.reset`."""
        return self._gather(self._call(lambda part, _: part.reset()))

    def step(self, actions: np.ndarray) -> tuple[TimeStep, StepInfo]:
        """See `VectorEnvironment.step`."""
        actions = base.check_actions(actions, self.num_envs, self.spec.num_actions)
        results = self._call(lambda part, indices: part.step(actions[indices]))
        return self._gather([timestep for timestep, _ in results]), self._gather([info for _, info in results])

    def get_state(self) -> bytes:
        """See `VectorEnvironment.get_state`."""
        return plain_state.encode(self._call(lambda part, _: part.get_state()))

    def set_state(self, state: bytes) -> None:
        """See `VectorEnvironment.set_state`."""
        states = plain_state.decode(state)
        if len(states) != len(self._parts):
            raise ConfigError(f'the state has {len(states)} tasks, but this environment has {len(self._parts)}')
        for part, part_state in zip(self._parts, states, strict=True):
            part.set_state(part_state)

    def render(self) -> np.ndarray:
        """See `VectorEnvironment.render`."""
        return next(part for part, indices in zip(self._parts, self._indices, strict=True) if indices[0] == 0).render()

    def close(self) -> None:
        """See `VectorEnvironment.close`."""
        for part in self._parts:
            part.close()
        if self._pool is not None:
            self._pool.shutdown()

    def _call(self, fn: Callable[[VectorEnvironment, np.ndarray], _T]) -> list[_T]:
        """Returns `fn(part, indices)` for each part."""
        if self._pool is None:
            return [fn(part, indices) for part, indices in zip(self._parts, self._indices, strict=True)]
        futures = [
            self._pool.submit(fn, part, indices) for part, indices in zip(self._parts, self._indices, strict=True)
        ]
        concurrent.futures.wait(futures)  # Even if one fails, so that every part finishes its step.
        return [future.result() for future in futures]

    def _gather(self, trees: list[Any]) -> Any:
        """Merges the parts' arrays in the order of the whole vector."""

        def gather(*leaves: np.ndarray) -> np.ndarray:
            whole = np.empty([self.num_envs, *leaves[0].shape[1:]], leaves[0].dtype)
            for indices, leaf in zip(self._indices, leaves, strict=True):
                whole[indices] = leaf
            return whole

        return base.map_leaves(gather, trees[0], *trees[1:])

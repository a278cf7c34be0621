"""Environments stepped one after the other in this process."""

from __future__ import annotations

import contextlib
import logging
import pickle
from collections.abc import Callable
from typing import Any

import dm_env
import numpy as np

from impala_jax.config import ConfigError
from impala_jax.environments import base
from impala_jax.types import FIRST, LAST, EnvironmentSpec, StepInfo, TimeStep

_logger = logging.getLogger(__name__)


class SerialVectorEnvironment:
    """A `VectorEnvironment` of dm_env environments, in this process.

    Args:
      factory: Builds an environment from a seed.
      first_index: Number of the first environment in the whole vector, of which this may be a part; seeds and messages
        depend on it.
      generation: Another number gives other seeds; for a part that is built anew.
    Raises:
      ConfigError: an environment cannot be built, has no discrete actions, or differs from the first one.
    """

    def __init__(
        self,
        factory: Callable[[int], dm_env.Environment],
        num_envs: int,
        seed: int,
        *,
        name: str = 'environment',
        max_failures: int = 3,
        first_index: int = 0,
        generation: int = 0,
    ):
        self.num_envs = num_envs
        self._factory = factory
        self._name = name
        self._max_failures = max_failures
        self._entropy = [(seed, first_index + i, generation) for i in range(num_envs)]
        self._environments: list[dm_env.Environment] = []
        self._over = [True] * num_envs  # The next step starts an episode.
        self._returns = [0.0] * num_envs
        self._builds = [1] * num_envs
        self._failures = [0] * num_envs  # since an episode was last finished
        self._observation: Any = None  # of environment 0, for a picture
        try:
            for i in range(num_envs):
                environment = self._build(i)
                self._environments.append(environment)
                spec = base.environment_spec(environment, name)
                if i == 0:
                    self.spec: EnvironmentSpec = spec
                base.require_same_spec(name, self.spec, first_index + i, spec)
        except ConfigError:
            self.close()
            raise
        except Exception as error:
            self.close()
            raise ConfigError(f'environment {name!r} cannot be built: {base.one_line(error)}') from error
        self._leaf_specs = list(base.leaves(self.spec.observation))

    def reset(self) -> TimeStep:
        return self.restart()[0]

    def restart(self) -> tuple[TimeStep, StepInfo]:
        """`reset`, with what is counted of it."""
        self._over = [True] * self.num_envs
        return self.step(np.zeros(self.num_envs, np.int32))

    def step(self, actions: np.ndarray) -> tuple[TimeStep, StepInfo]:
        actions = base.check_actions(actions, self.num_envs, self.spec.num_actions)
        n = self.num_envs
        arrays = [np.empty((n, *leaf.shape), leaf.dtype) for leaf in self._leaf_specs]
        step_types = np.empty(n, np.int32)
        rewards = np.zeros(n, np.float32)
        discounts = np.ones(n, np.float32)
        episode_returns = np.full(n, np.nan, np.float32)
        restarts = np.zeros(n, np.int32)
        for i, action in enumerate(actions.tolist()):
            try:
                timestep = self._environments[i].reset() if self._over[i] else self._environments[i].step(action)
                self._write_observation(i, timestep.observation, arrays)
            except Exception as error:
                timestep = self._restart(i, error, arrays)
                restarts[i] = 1
            step_type = step_types[i] = int(timestep.step_type)
            if step_type == FIRST:
                self._over[i] = False
                self._returns[i] = 0.0
                continue
            rewards[i] = timestep.reward
            discounts[i] = timestep.discount
            self._returns[i] += float(timestep.reward)
            if step_type == LAST:
                self._over[i] = True
                self._failures[i] = 0
                episode_returns[i] = self._returns[i]
        iterator = iter(arrays)
        observation = base.map_leaves(lambda _: next(iterator), self.spec.observation)
        self._observation = observation
        previous_actions = np.where(step_types == FIRST, 0, actions).astype(np.int32)
        return (
            TimeStep(step_types, rewards, discounts, observation, previous_actions),
            StepInfo(episode_returns, restarts),
        )

    def get_states(self) -> list[bytes]:
        """One state an environment."""
        try:
            return [
                pickle.dumps(parts)
                for parts in zip(
                    self._environments,
                    self._over,
                    self._returns,
                    self._builds,
                    self._failures,
                    self._entropy,
                    strict=True,
                )
            ]
        except Exception as error:
            raise NotImplementedError(
                f'environment {self._name!r} cannot be saved, so a run with it resumes with new episodes: '
                f'{base.one_line(error)}'
            ) from error

    def set_states(self, states: list[bytes]) -> None:
        """The inverse of `get_states`."""
        if len(states) != self.num_envs:
            raise ConfigError(f'the state is of {len(states)} environments, but there are {self.num_envs}')
        self._close_environments()
        for i, state in enumerate(states):
            environment, *parts = pickle.loads(state)
            self._environments.append(environment)
            self._over[i], self._returns[i], self._builds[i], self._failures[i], self._entropy[i] = parts

    def get_state(self) -> bytes:
        return pickle.dumps(self.get_states())

    def set_state(self, state: bytes) -> None:
        self.set_states(pickle.loads(state))

    def render(self) -> np.ndarray:
        render = getattr(self._environments[0], 'render', None)
        if render is not None:
            image = np.asarray(render())
            small = image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or min(image.shape[:2]) < 128
            return base.picture(image) if small else image
        if self._observation is None:
            raise NotImplementedError('there is no picture before the first reset')
        return base.picture(next(base.leaves(self._observation))[0])

    def close(self) -> None:
        self._close_environments()

    def _build(self, i: int) -> dm_env.Environment:
        return self._factory(base.derived_seed(*self._entropy[i], self._builds[i] - 1))

    def _restart(self, i: int, error: Exception, arrays: list[np.ndarray]) -> dm_env.TimeStep:
        """Builds environment i anew, as often as allowed, until one gives its first timestep."""
        index = self._entropy[i][1]
        while True:
            self._failures[i] += 1
            cause = base.one_line(error)
            if self._failures[i] >= self._max_failures:
                raise base.EnvironmentFailure(
                    f'environment {index} of {self._name!r} failed {self._failures[i]} times without finishing an '
                    f'episode in between; the last time: {cause}'
                ) from error
            _logger.warning('environment %d of %r failed and is rebuilt: %s', index, self._name, cause)
            with contextlib.suppress(Exception):
                self._environments[i].close()
            self._builds[i] += 1
            try:
                environment = self._build(i)
                base.require_same_spec(self._name, self.spec, index, base.environment_spec(environment, self._name))
                self._environments[i] = environment
                timestep = environment.reset()
                self._write_observation(i, timestep.observation, arrays)
                return timestep
            except ConfigError:
                raise
            except Exception as next_error:
                error = next_error

    def _write_observation(self, i: int, observation: Any, arrays: list[np.ndarray]) -> None:
        for leaf, spec, array in zip(base.leaves(observation), self._leaf_specs, arrays, strict=True):
            if np.shape(leaf) != spec.shape:
                raise ValueError(f'an observation has shape {np.shape(leaf)}, but its spec says {spec.shape}')
            array[i] = leaf

    def _close_environments(self) -> None:
        for environment in self._environments:
            try:
                environment.close()
            except Exception as error:
                _logger.warning('closing an environment of %r failed: %s', self._name, base.one_line(error))
        self._environments = []

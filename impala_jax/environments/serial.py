"""Environments that are stepped one after the other in this process."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import dm_env
import numpy as np

from impala_jax.config import ConfigError
from impala_jax.environments import base, observations
from impala_jax.rundir import plain_state
from impala_jax.seeds import derived_seed
from impala_jax.types import FIRST, LAST, MID, ArraySpec, EnvironmentSpec, StepInfo, TimeStep

_logger = logging.getLogger(__name__)

_LARGEST = float(np.finfo(np.float32).max)


class SerialVectorEnvironment:
    """A `VectorEnvironment` of dm_env environments, in this process.

    Everything that an environment returns is checked here. An environment fails if it raises an exception, or returns
    an observation that does not match its spec, a value that is not finite, or an unexpected step type. It is then
    rebuilt. The run ends after `max_failures` failures without a finished episode in between.

    Args:
      factory: Function that builds an environment from a seed.
      num_envs: Number of environments.
      seed: Seed from which each environment's own seed is derived.
      name: Name of the environments, for error messages.
      max_failures: Number of failures without a finished episode in between that ends the run.
      first_index: Index of the first environment in the whole vector, of which this may be a part. Seeds and error
        messages depend on it.
      generation: Number of times that this part has been rebuilt; each generation has different seeds.
      max_episode_steps: Number of steps after which an episode is truncated; None for no limit.

    Raises:
      ConfigError: An environment cannot be built, lacks discrete actions, or differs from the first one.
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
        max_episode_steps: int | None = None,
    ):
        self.num_envs = num_envs
        self._factory = factory
        self._name = name
        self._max_failures = max_failures
        self._max_episode_steps = math.inf if max_episode_steps is None else max_episode_steps
        self._entropy = [(seed, first_index + i, generation) for i in range(num_envs)]
        self._environments: list[dm_env.Environment] = []
        self._over = [True] * num_envs  # The next step starts an episode.
        self._returns = [0.0] * num_envs
        self._num_steps = [0] * num_envs  # in the current episode
        self._builds = [1] * num_envs
        self._failures = [0] * num_envs  # since an episode was last finished
        self._observation: Any = None  # the latest, [N, ...], for rendering
        self._blueprint: dict[str, str] | None = None  # of a newly built environment
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
        except base.RAISED_BY_ENVIRONMENTS as error:
            self.close()
            raise ConfigError(f'environment {name!r} cannot be built: {base.one_line(error)}') from error
        declared = base.map_leaves(lambda leaf: leaf.dtype, self._environments[0].observation_spec())
        self._leaves = observations.leaves(self.spec.observation, declared)
        self._is_array = isinstance(self.spec.observation, ArraySpec)

    def reset(self) -> TimeStep:
        """See `VectorEnvironment.reset`."""
        return self.restart()[0]

    def restart(self) -> tuple[TimeStep, StepInfo]:
        """Resets all environments, as `reset` does, and also returns the statistics of the step."""
        self._over = [True] * self.num_envs
        return self.step(np.zeros(self.num_envs, np.int32))

    def step(self, actions: np.ndarray) -> tuple[TimeStep, StepInfo]:
        """See `VectorEnvironment.step`."""
        actions = base.check_actions(actions, self.num_envs, self.spec.num_actions)
        n = self.num_envs
        arrays = [np.empty((n, *leaf.spec.shape), leaf.spec.dtype) for leaf in self._leaves]
        step_types = np.empty(n, np.int32)
        rewards = np.zeros(n, np.float32)
        discounts = np.ones(n, np.float32)
        restarts = np.zeros(n, np.int32)
        for i, action in enumerate(actions.tolist()):
            starts = self._over[i]
            try:
                if starts:
                    self._begin(i, arrays)
                    step_types[i] = FIRST
                else:
                    step_types[i], rewards[i], discounts[i] = self._advance(i, action, arrays)
            except base.RAISED_BY_ENVIRONMENTS as error:
                self._rebuild(i, error, 'in reset' if starts else f'at step {self._num_steps[i] + 1}', arrays)
                step_types[i], restarts[i] = FIRST, 1
        for i, error in observations.unreadable(self._leaves, arrays).items():
            starts = step_types[i] == FIRST
            self._rebuild(i, error, 'in reset' if starts else f'at step {self._num_steps[i]}', arrays)
            step_types[i], rewards[i], discounts[i], restarts[i] = FIRST, 0, 1, 1
        episode_ended = step_types == LAST
        episode_returns = np.zeros(n, np.float32)
        for i in np.flatnonzero(episode_ended).tolist():
            self._over[i] = True
            self._failures[i] = 0
            episode_returns[i] = self._returns[i]
        iterator = iter(arrays)
        observation = base.map_leaves(lambda _: next(iterator), self.spec.observation)
        self._observation = observation
        previous_actions = np.where(step_types == FIRST, 0, actions).astype(np.int32)
        return (
            TimeStep(step_types, rewards, discounts, observation, previous_actions),
            StepInfo(episode_returns, episode_ended, restarts),
        )

    def get_states(self) -> list[bytes]:
        """Returns one state per environment.

        Raises:
          NotImplementedError: An environment cannot be saved exactly.
        """
        try:
            if self._blueprint is None:
                built = self._build(0)
                try:
                    self._blueprint = plain_state.blueprint_of(built)
                finally:
                    self._close(built)
            environments = [plain_state.encode(environment, self._blueprint) for environment in self._environments]
        except Exception as error:
            raise NotImplementedError(
                f'environment {self._name!r} cannot be saved, so a run with it resumes with new episodes: '
                f'{base.one_line(error)}'
            ) from error
        parts = (self._over, self._returns, self._num_steps, self._builds, self._failures, self._entropy)
        return [plain_state.encode(list(state)) for state in zip(environments, *parts, strict=True)]

    def set_states(self, states: list[bytes]) -> None:
        """Restores states returned by `get_states`.

        Raises:
          ConfigError: The number of states differs from the number of environments.
          ValueError: A state is from a different version or a different environment.
        """
        if len(states) != self.num_envs:
            raise ConfigError(f'the state has {len(states)} environments, but there are {self.num_envs}')
        self._close_environments()
        for i, state in enumerate(states):
            environment, *parts = plain_state.decode(state)
            (
                self._over[i],
                self._returns[i],
                self._num_steps[i],
                self._builds[i],
                self._failures[i],
                self._entropy[i],
            ) = parts
            self._environments.append(self._build(i))
            plain_state.decode_into(self._environments[i], environment)

    def get_state(self) -> bytes:
        """See `VectorEnvironment.get_state`."""
        return plain_state.encode(self.get_states())

    def set_state(self, state: bytes) -> None:
        """See `VectorEnvironment.set_state`."""
        self.set_states(plain_state.decode(state))

    def render(self) -> np.ndarray:
        """Renders environment 0, or shows its observation if it has no `render` method.

        Raises:
          NotImplementedError: There is no image of the environment.
        """
        render = getattr(self._environments[0], 'render', None)
        if render is not None:
            image = base.rendered(render(), self._name)
            return base.picture(image) if min(image.shape[:2]) < 128 else image
        if self._observation is None:
            raise NotImplementedError('there is no image before the first reset')
        return base.picture(next(base.leaves(self._observation))[0])

    def close(self) -> None:
        """See `VectorEnvironment.close`."""
        self._close_environments()

    def _build(self, i: int) -> dm_env.Environment:
        return self._factory(derived_seed(*self._entropy[i], self._builds[i] - 1))

    def _begin(self, i: int, arrays: list[np.ndarray]) -> None:
        """Resets environment i and writes its observation."""
        timestep = self._environments[i].reset()
        if timestep.step_type != FIRST:
            raise base.Violation(f'reset() returned step type {timestep.step_type!r}; it must be FIRST')
        self._write_observation(i, timestep.observation, arrays)
        self._over[i] = False
        self._returns[i] = 0.0
        self._num_steps[i] = 0

    def _advance(self, i: int, action: int, arrays: list[np.ndarray]) -> tuple[int, float, float]:
        """Steps environment i and writes its observation; returns step type, reward and discount."""
        timestep = self._environments[i].step(action)
        step_type, reward, discount = timestep.step_type, timestep.reward, timestep.discount
        self._write_observation(i, timestep.observation, arrays)
        if step_type not in (MID, LAST):
            raise base.Violation(
                f'step() returned step type {step_type!r} within an episode; an episode ends with a LAST timestep'
            )
        if type(reward) is not float:
            reward = _number(reward, 'reward')
        if type(discount) is not float:
            discount = _number(discount, 'discount')
        episode_return = self._returns[i] + reward
        # The comparisons are false for NaN.
        if not (-_LARGEST <= reward <= _LARGEST and -_LARGEST <= episode_return <= _LARGEST):
            raise base.Violation(f'the reward is {reward}, after a return of {self._returns[i]}; both must be finite')
        if not 0 <= discount <= 1:
            raise base.Violation(f'the discount is {discount}; it must lie in [0, 1]')
        self._returns[i] = episode_return
        self._num_steps[i] += 1
        if self._num_steps[i] >= self._max_episode_steps:
            step_type = LAST  # The episode is truncated, so the discount is unchanged.
        return step_type, reward, discount

    def _rebuild(self, i: int, error: BaseException, where: str, arrays: list[np.ndarray]) -> None:
        """Rebuilds environment i until it returns its first timestep, or has failed too often."""
        index = self._entropy[i][1]
        while True:
            self._failures[i] += 1
            cause = base.one_line(error)
            if self._failures[i] >= self._max_failures:
                raise base.EnvironmentFailure(
                    f'environment {index} of {self._name!r} failed {self._failures[i]} times without finishing an '
                    f'episode in between; the last time {where}: {cause}'
                ) from error
            _logger.warning('environment %d of %r failed %s and is rebuilt: %s', index, self._name, where, cause)
            self._close(self._environments[i])
            self._builds[i] += 1
            where = 'in its first reset'
            try:
                environment = self._build(i)
                base.require_same_spec(self._name, self.spec, index, base.environment_spec(environment, self._name))
                self._environments[i] = environment
                self._begin(i, arrays)
                errors = observations.unreadable(self._leaves, [array[i : i + 1] for array in arrays])
                if not errors:
                    return
                error = errors[0]
            except ConfigError:
                raise
            except base.RAISED_BY_ENVIRONMENTS as next_error:
                error = next_error

    def _write_observation(self, i: int, observation: Any, arrays: list[np.ndarray]) -> None:
        if self._is_array:
            observations.write(self._leaves[0], observation, arrays[0], i)
            return
        values = observations.values(self.spec.observation, observation)
        for leaf, value, array in zip(self._leaves, values, arrays, strict=True):
            observations.write(leaf, value, array, i)

    def _close_environments(self) -> None:
        for environment in self._environments:
            self._close(environment)
        self._environments = []

    def _close(self, environment: dm_env.Environment) -> None:
        try:
            environment.close()
        except base.RAISED_BY_ENVIRONMENTS as error:
            _logger.warning('closing an environment of %r failed: %s', self._name, base.one_line(error))


def _number(value: Any, what: str) -> float:
    """Converts a reward or a discount, possibly an array of one element, to a float."""
    if type(value) is float:
        return value
    try:
        array = np.asarray(value)
        if array.size == 1 and array.dtype.kind in 'biuf':
            return float(array.item())
    except ValueError:  # Lists of different lengths.
        pass
    raise base.Violation(f'the {what} is {value!r}; it must be one number')

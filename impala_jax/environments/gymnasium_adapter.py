"""A gymnasium.Env as a dm_env.Environment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dm_env
import gymnasium
import numpy as np
from dm_env import specs
from gymnasium import spaces

from impala_jax.config import ConfigError
from impala_jax.environments.base import Violation
from impala_jax.environments.dmlab import INSTRUCTION_LENGTH, NUM_WORD_IDS, word_ids
from impala_jax.environments.observations import ObservationError
from impala_jax.types import INSTRUCTION

MAX_ONE_HOT = 1024
"""A Discrete observation with at most this many values is one-hot; a larger one is an index that the network embeds."""

_RESET = ('observation', 'info')
_STEP = ('observation', 'reward', 'terminated', 'truncated', 'info')


class GymnasiumAdapter(dm_env.Environment):
    """A dm_env environment that wraps a gymnasium.Env with discrete actions.

    | space | observation |
    |---|---|
    | Box | the array, unchanged |
    | Discrete | one-hot [n] float32; with more than `MAX_ONE_HOT` values a scalar int32 from 0 to n - 1 |
    | MultiBinary, MultiDiscrete | the array, unchanged |
    | Text, and other spaces of strings | {'instruction': [16] int32}, word ids as in DeepMind Lab |
    | Dict, Tuple | dicts and tuples of the above, nested in any way |

    A termination has discount 0. A truncation has discount 1 and its own last observation. See docs/environments.md.

    Args:
      environment: The environment to wrap.
      seed: Seed for the first reset; later resets continue with the environment's own random generator.
      name: Name of the environment, for error messages.
      no_pictures: Reason why the environment could not be built with rendering; empty if it could.

    Raises:
      ConfigError: The action space or an observation space is not supported.
    """

    def __init__(self, environment: gymnasium.Env, seed: int, name: str, no_pictures: str = ''):
        self._environment = environment
        self._seed: int | None = seed
        self._name = name
        self._no_pictures = no_pictures
        self._ended = True
        actions = environment.action_space
        if not isinstance(actions, spaces.Discrete):
            raise ConfigError(f'environment {name!r} has actions {actions}; only Discrete ones are supported')
        self._first_action = int(actions.start)
        self._action_spec = specs.DiscreteArray(int(actions.n), name='action')
        self._observation_spec = self._spec_of(environment.observation_space, 'observation')

    def reset(self) -> dm_env.TimeStep:
        """See `dm_env.Environment.reset`."""
        observation, _ = self._returned('reset', self._environment.reset(seed=self._seed), _RESET)
        self._seed = None
        self._ended = False
        return dm_env.restart(self._convert(observation))

    def step(self, action: int) -> dm_env.TimeStep:
        """See `dm_env.Environment.step`."""
        if self._ended:
            return self.reset()
        returned = self._environment.step(self._first_action + int(action))
        observation, reward, terminated, truncated, _ = self._returned('step', returned, _STEP)
        observation = self._convert(observation)
        self._ended = bool(terminated or truncated)
        if terminated:
            return dm_env.termination(reward, observation)
        if truncated:
            return dm_env.truncation(reward, observation)
        return dm_env.transition(reward, observation)

    def observation_spec(self) -> Any:
        """Specs of the observations, nested as the observation space."""
        return self._observation_spec

    def action_spec(self) -> specs.DiscreteArray:
        """The actions, from 0 to n - 1, wherever those of the action space start."""
        return self._action_spec

    @property
    def render_fps(self) -> Any:
        """Frame rate of the rendering as the environment's metadata states it, in images per second."""
        return self._environment.metadata.get('render_fps')

    def render(self) -> Any:
        """Returns the unchecked result of the environment's `render`.

        Raises:
          NotImplementedError: The environment cannot render images.
        """
        mode = self._environment.render_mode
        if mode != 'rgb_array':
            reason = f' ({self._no_pictures})' if self._no_pictures else ''
            raise NotImplementedError(
                f'environment {self._name!r} has render_mode {mode!r}, but rendering needs rgb_array{reason}'
            )
        try:
            return self._environment.render()
        except gymnasium.error.DependencyNotInstalled as error:
            raise NotImplementedError(f'environment {self._name!r} cannot be drawn: {error}') from error

    def close(self) -> None:
        """See `dm_env.Environment.close`."""
        self._environment.close()

    def _spec_of(self, space: spaces.Space, path: str) -> Any:
        if isinstance(space, spaces.Dict):
            return {key: self._spec_of(value, f'{path}[{key!r}]') for key, value in space.spaces.items()}
        if isinstance(space, spaces.Tuple):
            return tuple(self._spec_of(value, f'{path}[{i}]') for i, value in enumerate(space.spaces))
        if isinstance(space, spaces.Discrete):
            n = int(space.n)
            if n > np.iinfo(np.int32).max:
                raise ConfigError(
                    f'environment {self._name!r}: {path} is {space}, which has more values than int32; represent them '
                    'by a vector in the environment'
                )
            one_hot = specs.BoundedArray((n,), np.float32, 0, 1)
            return one_hot if n <= MAX_ONE_HOT else specs.DiscreteArray(n)
        if isinstance(space, spaces.Box):
            return specs.BoundedArray(space.shape, space.dtype, space.low, space.high)
        if isinstance(space, spaces.MultiBinary):
            return specs.BoundedArray(space.shape, space.dtype, 0, 1)
        if isinstance(space, spaces.MultiDiscrete):
            return specs.BoundedArray(space.shape, space.dtype, space.start, space.start + space.nvec - 1)
        if _is_text(space):
            return {INSTRUCTION: specs.BoundedArray((INSTRUCTION_LENGTH,), np.int32, 0, NUM_WORD_IDS - 1)}
        raise ConfigError(
            f'environment {self._name!r} has observations {space} ({path}), which are not supported; convert or leave '
            'them out with a gymnasium.ObservationWrapper'
        )

    def _returned(self, method: str, value: Any, names: tuple[str, ...]) -> Any:
        """Returns `value` after checking that it is a tuple with as many elements as `names`.

        Raises:
          Violation: It is not such a tuple, as in older versions of Gym.
        """
        if type(value) is not tuple or len(value) != len(names):
            has = f'a tuple of {len(value)}' if isinstance(value, tuple) else f'a {type(value).__name__}'
            raise Violation(
                f"{method}() returned {has}; Gymnasium's returns ({', '.join(names)}): an environment of the older Gym "
                "needs a wrapper, such as shimmy's"
            )
        return value

    def _convert(self, observation: Any) -> Any:
        return self._convert_leaf(self._environment.observation_space, observation, 'observation')

    def _convert_leaf(self, space: spaces.Space, value: Any, path: str) -> Any:
        if type(space) is spaces.Box:
            return value
        # Keys and lengths are checked later, together with the whole observation (`observations.py`).
        if isinstance(space, spaces.Dict) and isinstance(value, Mapping):
            return {
                key: self._convert_leaf(space.spaces[key], part, f'{path}[{key!r}]') if key in space.spaces else part
                for key, part in value.items()
            }
        if isinstance(space, spaces.Tuple) and isinstance(value, (tuple, list)):
            parts = enumerate(zip(space.spaces, value, strict=False))
            converted = tuple(self._convert_leaf(part, leaf, f'{path}[{i}]') for i, (part, leaf) in parts)
            return (*converted, *value[len(converted) :])
        if isinstance(space, spaces.Discrete):
            index = self._whole(space, value, path, (), space.start, space.start + space.n - 1) - space.start
            if space.n > MAX_ONE_HOT:
                return np.int32(index)
            one_hot = np.zeros(int(space.n), np.float32)
            one_hot[index] = 1
            return one_hot
        if isinstance(space, spaces.MultiBinary):
            return self._whole(space, value, path, space.shape, 0, 1)
        if isinstance(space, spaces.MultiDiscrete):
            return self._whole(space, value, path, space.shape, space.start, space.start + space.nvec - 1)
        if _is_text(space):
            if not isinstance(value, str):
                raise self._unlike_space(path, f'a {type(value).__name__}', 'a string')
            return {INSTRUCTION: word_ids(value)}
        return value

    def _whole(self, space: spaces.Space, value: Any, path: str, shape: tuple[int, ...], low: Any, high: Any) -> Any:
        """Converts `value` to integers of the space's dtype.

        Raises:
          ObservationError: The shape is wrong, or a value is fractional or outside [low, high].
        """
        array = np.asarray(value)
        if array.shape != shape or array.dtype.kind not in 'biuf':
            raise self._unlike_space(path, f'shape {array.shape} and dtype {array.dtype}', space)
        outside = ~((array >= low) & (array <= high) & (array == np.floor(array)))
        if outside.any():
            raise self._unlike_space(path, array[outside][0].item(), space)
        return array.astype(space.dtype)

    def _unlike_space(self, path: str, value: Any, space: Any) -> ObservationError:
        return ObservationError(f'{path} has {value}, and its space is {space}')


def _is_text(space: spaces.Space) -> bool:
    return space.dtype is not None and np.dtype(space.dtype).kind == 'U'

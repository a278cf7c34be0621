"""A gymnasium.Env as a dm_env.Environment."""

from __future__ import annotations

from typing import Any

import dm_env
import gymnasium
import numpy as np
from dm_env import specs
from gymnasium import spaces

from impala_jax.config import ConfigError


class GymnasiumAdapter(dm_env.Environment):
    """Discrete actions; Box, Discrete (one-hot), MultiBinary, MultiDiscrete, Dict and Tuple observations.

    A termination has discount 0, a truncation discount 1 and its own last observation.

    Args:
      seed: For the first reset; later ones go on with the environment's own generator.
    Raises:
      ConfigError: a space that no agent here can deal with.
    """

    def __init__(self, environment: gymnasium.Env, seed: int, name: str):
        self._environment = environment
        self._seed: int | None = seed
        self._name = name
        self._ended = True
        actions = environment.action_space
        if not isinstance(actions, spaces.Discrete):
            raise ConfigError(f'environment {name!r} has actions {actions}; only Discrete ones are supported')
        self._first_action = int(actions.start)
        self._action_spec = specs.DiscreteArray(int(actions.n), name='action')
        self._observation_spec = self._spec_of(environment.observation_space)

    def reset(self) -> dm_env.TimeStep:
        observation, _ = self._environment.reset(seed=self._seed)
        self._seed = None
        self._ended = False
        return dm_env.restart(_convert(self._environment.observation_space, observation))

    def step(self, action: int) -> dm_env.TimeStep:
        if self._ended:
            return self.reset()
        observation, reward, terminated, truncated, _ = self._environment.step(self._first_action + int(action))
        observation = _convert(self._environment.observation_space, observation)
        self._ended = bool(terminated or truncated)
        if terminated:
            return dm_env.termination(float(reward), observation)
        if truncated:
            return dm_env.truncation(float(reward), observation)
        return dm_env.transition(float(reward), observation)

    def observation_spec(self) -> Any:
        return self._observation_spec

    def action_spec(self) -> specs.DiscreteArray:
        return self._action_spec

    def render(self) -> np.ndarray:
        try:
            picture: Any = self._environment.render() if self._environment.render_mode == 'rgb_array' else None
        except gymnasium.error.DependencyNotInstalled as error:
            raise NotImplementedError(f'environment {self._name!r} cannot be drawn: {error}') from error
        if picture is None:
            raise NotImplementedError(f'environment {self._name!r} was not made with render_mode rgb_array')
        return np.asarray(picture)

    def close(self) -> None:
        self._environment.close()

    def __getstate__(self) -> dict[str, Any]:
        # An EzPickle is pickled as its constructor's arguments: it would come back as a new environment.
        environment: Any = self._environment
        while environment is not None:
            if isinstance(environment, gymnasium.utils.EzPickle):
                raise TypeError(f'{type(environment).__name__} pickles its arguments and not its state')
            environment = getattr(environment, 'env', None)
        return self.__dict__.copy()

    def _spec_of(self, space: spaces.Space) -> Any:
        if isinstance(space, spaces.Dict):
            return {key: self._spec_of(value) for key, value in space.spaces.items()}
        if isinstance(space, spaces.Tuple):
            return tuple(self._spec_of(value) for value in space.spaces)
        if isinstance(space, spaces.Discrete):
            return specs.Array((int(space.n),), np.float32)
        if isinstance(space, (spaces.Box, spaces.MultiBinary, spaces.MultiDiscrete)):
            return specs.Array(space.shape, space.dtype)
        raise ConfigError(f'environment {self._name!r} has observations {space}, which are not supported')


def _convert(space: spaces.Space, observation: Any) -> Any:
    if isinstance(space, spaces.Dict):
        # Keys are compared with the spec where the observation is checked.
        return {
            key: _convert(space.spaces[key], value) if key in space.spaces else value
            for key, value in observation.items()
        }
    if isinstance(space, spaces.Tuple):
        return tuple(_convert(value, part) for value, part in zip(space.spaces, observation, strict=True))
    if isinstance(space, spaces.Discrete):
        return np.eye(int(space.n), dtype=np.float32)[int(observation) - int(space.start)]
    return observation

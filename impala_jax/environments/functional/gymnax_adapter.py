"""Environments of gymnax as tasks in JAX.

gymnax (Lange, 2022) is an optional package, which is imported when an environment of it is built. It must be version
1.0 or later: earlier ones do not tell a time limit from a termination.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from impala_jax.config import ConfigError, closest
from impala_jax.environments.functional.base import Arrival
from impala_jax.types import Array, ArraySpec, EnvironmentSpec, PyTree

_INSTALL = "pip install gymnasium seaborn six && pip install --no-deps 'gymnax>=1.0.1'"


class GymnaxTask:
    """A task made of an environment of gymnax.

    Episodes end as in gymnax: a state that is terminal terminates them, and `max_steps_in_episode` truncates them.
    Actions are those of a `Discrete` space. Observations are converted to the dtypes that the network reads: integers
    other than uint8 to int32, floats and bools to float32, and the integer of a `Discrete` space to a one-hot vector.

    Args:
      environment: Environment of gymnax.
      params: Its parameters; None for the default ones.
      name: Name for error messages.

    Raises:
      ConfigError: The actions are not discrete, the observation is not an array or a PyTree of arrays, or gymnax is
        too old.
    """

    def __init__(self, environment: Any, params: Any = None, *, name: str = 'gymnax'):
        if not hasattr(environment, 'is_truncated'):
            raise ConfigError(f'environment {name!r}: this gymnax is older than 1.0; {_INSTALL}')
        self._environment = environment
        self._params = environment.default_params if params is None else params
        actions = environment.action_space(self._params)
        if not _is_discrete(actions):
            raise ConfigError(
                f'environment {name!r} has the actions {actions}, and only discrete ones are supported; use another '
                'environment, such as gymnax/CartPole-v1'
            )
        observation, _ = jax.eval_shape(self._environment.reset_env, jax.random.PRNGKey(0), self._params)
        space = environment.observation_space(self._params)
        self._num_values = int(space.n) if _is_discrete(space) else None
        self.spec = EnvironmentSpec(jax.tree.map(_spec, jax.eval_shape(self._converted, observation)), int(actions.n))

    def reset(self, key: Array) -> tuple[PyTree, PyTree]:
        """See `Task.reset`."""
        observation, state = self._environment.reset_env(key, self._params)
        return jax.tree.map(_strong, state), self._converted(observation)

    def step(self, state: PyTree, action: Array, key: Array) -> tuple[PyTree, Arrival]:
        """See `Task.step`."""
        observation, new, reward, terminated, _ = self._environment.step_env(key, state, action, self._params)
        truncated = self._environment.is_truncated(new, self._params)
        arrival = Arrival(
            self._converted(observation), jnp.float32(reward), jnp.bool_(terminated), jnp.bool_(truncated)
        )
        return jax.tree.map(_strong, new), arrival

    def _converted(self, observation: PyTree) -> PyTree:
        if self._num_values is not None:
            return jax.nn.one_hot(observation, self._num_values)
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, _dtype(leaf)), observation)


def make(name: str) -> GymnaxTask:
    """Builds the task of an environment by its name in gymnax, such as `Breakout-MinAtar`.

    Raises:
      ConfigError: gymnax is not installed or too old, the name is unknown, or the environment cannot be built or used.
    """
    full_name = f'gymnax/{name}'
    try:
        import gymnax  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(f'environment {full_name!r} needs gymnax: {_INSTALL} ({error})') from error
    known = list(gymnax.registered_envs)
    if name not in known:
        raise ConfigError(f'unknown environment.name {full_name!r}; {closest(name, known, "gymnax/")}')
    try:
        environment, params = gymnax.make(name)
    except Exception as error:  # For example, the data of MNIST cannot be downloaded.
        reason = ' '.join(str(error).split())
        raise ConfigError(f'gymnax cannot build environment {full_name!r}: {type(error).__name__}: {reason}') from error
    return GymnaxTask(environment, params, name=full_name)


def _is_discrete(space: Any) -> bool:
    return type(space).__name__ == 'Discrete'


def _strong(leaf: Any) -> Array:
    """Gives a leaf of a state, which may be a Python number, the same type in every step."""
    return jnp.asarray(leaf, jnp.result_type(leaf))


def _dtype(leaf: Any) -> Any:
    dtype = jnp.result_type(leaf)
    if dtype == np.uint8:
        return dtype
    return np.int32 if dtype.kind in 'iu' else np.float32


def _spec(leaf: Any) -> ArraySpec:
    return ArraySpec(tuple(leaf.shape), np.dtype(leaf.dtype))

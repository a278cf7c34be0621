"""Twins: environments in JAX that agree with others in every number."""

from __future__ import annotations

import dataclasses

from impala_jax.config import ConfigError, EnvironmentConfig
from impala_jax.environments.functional import PREFIX, TASKS

_NAMES = {'gymnasium/CartPole-v1': 'cartpole'}  # Other twins have the name of the environment.


def twin(config: EnvironmentConfig) -> EnvironmentConfig:
    """Returns the settings of the same task as an environment in JAX.

    Raises:
      ConfigError: There is no twin.
    """
    if config.is_functional:
        return config
    name = _NAMES.get(config.name, config.name)
    if name not in TASKS:
        raise ConfigError(
            f"environment.name {config.name!r}: the runtime 'device' compiles environments in JAX, whose names begin "
            f"with '{PREFIX}' or 'gymnax/', and this one has no twin in JAX (docs/environments.md); use another runtime"
        )
    return dataclasses.replace(config, name=f'{PREFIX}{name}', processes=0)

"""Fields of a configuration by their names on the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from impala_jax.config.checks import ConfigError, closest
from impala_jax.config.experiment import Config
from impala_jax.config.serialization import to_flat_dict

# Fields whose name on the command line is a keyword in Python.
_PYTHON_NAMES = {'lambda': 'lambda_'}


def get(config: Config, name: str) -> Any:
    """The value of a field by its name on the command line, as in `vtrace.lambda`.

    Raises:
      ConfigError: there is no such field; the closest one is named.
    """
    known = {field.replace('lambda_', 'lambda') for field in to_flat_dict(config)}
    if name not in known:
        raise ConfigError(f'unknown configuration field {name!r}; {closest(name, known)}')
    value = config
    for part in name.split('.'):
        value = getattr(value, _PYTHON_NAMES.get(part, part))
    return value


def replace(config: Config, values: Mapping[str, Any]) -> Config:
    """`config` with fields set by their names on the command line, as in `{'vtrace.rho_bar': 2.0, 'seed': 1}`.

    All are set at once, so that only the result must be valid.

    Raises:
      ConfigError: a field that does not exist, named with the closest one that does, or a value that cannot work.
    """
    nested: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        get(config, name)
        owner, _, field = name.rpartition('.')
        nested.setdefault(owner, {})[_PYTHON_NAMES.get(field, field)] = value
    plain = nested.pop('', {})
    owners = {owner: dataclasses.replace(getattr(config, owner), **fields) for owner, fields in nested.items()}
    return dataclasses.replace(config, **plain, **owners)

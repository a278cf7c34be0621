"""Access to the fields of a configuration by their names on the command line."""

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
    """Returns the value of a field, named as on the command line, as in `vtrace.lambda`.

    Raises:
      ConfigError: If there is no such field; the message suggests the closest one.
    """
    known = {field.replace('lambda_', 'lambda') for field in to_flat_dict(config)}
    if name not in known:
        raise ConfigError(f'unknown configuration field {name!r}; {closest(name, known)}')
    value = config
    for part in name.split('.'):
        value = getattr(value, _PYTHON_NAMES.get(part, part))
    return value


def replace(config: Config, values: Mapping[str, Any]) -> Config:
    """Returns `config` with fields replaced, named as on the command line, as in `{'vtrace.rho_bar': 2.0, 'seed': 1}`.

    All fields are replaced together, so only the result has to be valid.

    Raises:
      ConfigError: If a field does not exist, with a suggestion of the closest one, or a value is invalid.
    """
    nested: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        get(config, name)
        owner, _, field = name.rpartition('.')
        nested.setdefault(owner, {})[_PYTHON_NAMES.get(field, field)] = value
    plain = nested.pop('', {})
    owners = {owner: dataclasses.replace(getattr(config, owner), **fields) for owner, fields in nested.items()}
    return dataclasses.replace(config, **plain, **owners)

"""Conversion of configurations to and from JSON values, upgrades of old ones, and changes that a resume allows."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, get_type_hints

from impala_jax.config.checks import ConfigError, closest
from impala_jax.config.experiment import Config

# Fields that may differ between a checkpoint and the configuration that resumes it: those of the execution, not those
# that change the result of training.
_RESUMABLE = (
    'actor',
    'checkpoint',
    'environment.level_cache',
    'environment.max_failures',
    'environment.processes',
    'environment.renderer',
    'evaluator',
    'launch_type',
    'learner.max_nonfinite_updates',
    'learner.num_devices',
    'learner.queue_capacity',
    'logging',
    'optimizer.schedule_frames',
    'serve_actors',
    'timeout_s',
    'total_frames',
    'vtrace.implementation',
    'vtrace.outside_theory',
)


def to_dict(config: Any) -> dict[str, Any]:
    """Returns a nested dict of JSON values; infinities become the strings 'inf' and '-inf', because JSON lacks them."""
    return {
        field.name: to_dict(value) if dataclasses.is_dataclass(value) else _to_json(value)
        for field in dataclasses.fields(config)
        for value in [getattr(config, field.name)]
    }


def to_flat_dict(config: Config) -> dict[str, Any]:
    """Returns the values of `to_dict`, keyed by the full names of the fields, as in `learner.batch_size`."""
    return _flatten(to_dict(config))


def from_dict(values: dict[str, Any], cls: type = Config, owner: str = '') -> Any:
    """Returns the configuration that `to_dict` converted; absent fields have their defaults.

    Args:
      values: Nested dict of JSON values.
      cls: Class of the configuration.
      owner: Prefix of field names in messages.

    Raises:
      ConfigError: If a field does not exist; the message suggests the closest one.
    """
    hints = get_type_hints(cls)
    unknown = set(values) - set(hints)
    for name in sorted(unknown):
        raise ConfigError(f'unknown configuration field {owner}{name!r}; {closest(name, hints)}')
    kwargs = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            value = from_dict(value, hints[name], f'{owner}{name}.')  # pyright: ignore[reportArgumentType]
        elif isinstance(value, list):
            value = tuple(value)
        elif value in ('inf', '-inf'):
            value = float(value)
        kwargs[name] = value
    return cls(**kwargs)


def upgraded(values: dict[str, Any], resumed_by: Config | None = None) -> dict[str, Any]:
    """Converts values written by an older version to their meaning in this version.

    Args:
      values: Nested dict of JSON values, as returned by `to_dict`.
      resumed_by: Configuration whose values are preferred if both result in the same network for images, or None.
    """
    network = values.get('network', {})
    if 'torso' not in network or 'uint8_scale' in network:
        return values
    torso = (
        'auto' if network['torso'] == 'shallow' else network['torso']
    )  # Formerly `shallow` had an MLP for non-images.
    scale = 255.0
    if resumed_by is not None:
        torso = 'shallow' if (torso, resumed_by.network.torso) == ('auto', 'shallow') else torso
        scale = None if resumed_by.network.uint8_scale is None else scale
    return values | {'network': network | {'torso': torso, 'uint8_scale': scale}}


def differences(old: Config, new: Config, where: str = 'in the checkpoint') -> list[str]:
    """Lists the differences because of which `new` cannot resume a run of `old`.

    Args:
      old: Configuration of the run.
      new: Configuration that resumes it.
      where: Phrase for the place of `old`, for the messages.

    Returns:
      One line per field.
    """
    old_flat, new_flat = to_flat_dict(old), to_flat_dict(new)
    return [
        f'{name}: {old_flat.get(name)!r} {where}, {new_flat.get(name)!r} now'
        for name in sorted(set(old_flat) | set(new_flat))
        if old_flat.get(name) != new_flat.get(name)
        and not any(name == free or name.startswith(free + '.') for free in _RESUMABLE)
    ]


def _flatten(tree: dict[str, Any], prefix: str = '') -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f'{prefix}{name}.'))
        else:
            flat[prefix + name] = value
    return flat


def _to_json(value: Any) -> Any:
    if isinstance(value, float) and math.isinf(value):
        return 'inf' if value > 0 else '-inf'
    return list(value) if isinstance(value, tuple) else value

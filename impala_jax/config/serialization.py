"""A configuration as JSON values: writing, reading, older versions, and what a resumed run may change."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, get_type_hints

from impala_jax.config.checks import ConfigError, closest
from impala_jax.config.experiment import Config

# What may differ between a checkpoint and the configuration that resumes it: how and where the run is executed, but
# nothing that changes what is learned.
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
    """A nested dict of JSON values; infinities are the strings 'inf' and '-inf', which JSON lacks."""
    return {
        field.name: to_dict(value) if dataclasses.is_dataclass(value) else _to_json(value)
        for field in dataclasses.fields(config)
        for value in [getattr(config, field.name)]
    }


def to_flat_dict(config: Config) -> dict[str, Any]:
    """The values of `to_dict` by the fields' names, as in `learner.batch_size`."""
    return _flatten(to_dict(config))


def from_dict(values: dict[str, Any], cls: type = Config, owner: str = '') -> Any:
    """The inverse of `to_dict`; fields that are absent take their defaults.

    Raises:
      ConfigError: a field that does not exist, named with the closest one that does.
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
    """A `to_dict` that an older version may have written, as this version means it.

    Args:
      values: as `to_dict` gives them.
      resumed_by: Where both make the same network of images, the values of this configuration are preferred.
    """
    network = values.get('network', {})
    if 'torso' not in network or 'uint8_scale' in network:
        return values
    torso = 'auto' if network['torso'] == 'shallow' else network['torso']  # Once all but images passed an MLP.
    scale = 255.0
    if resumed_by is not None:
        torso = 'shallow' if (torso, resumed_by.network.torso) == ('auto', 'shallow') else torso
        scale = None if resumed_by.network.uint8_scale is None else scale
    return values | {'network': network | {'torso': torso, 'uint8_scale': scale}}


def differences(old: Config, new: Config, where: str = 'in the checkpoint') -> list[str]:
    """The fields, one line each, by which `new` cannot resume a run of `old`, which stands `where`."""
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

"""How the network reads each leaf of an observation, decided once from the leaf's `ArraySpec`.

docs/environments.md lists the rules.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from impala_jax.config import ConfigError, NetworkConfig
from impala_jax.types import INSTRUCTION, ArraySpec, PyTree, image_axes

MAX_CATEGORIES = 2**20
"""Largest number of categories or word ids; each adds a row to an embedding and to the optimiser's state."""

# Smallest image side for each torso, in pixels.
_IMAGE_TORSOS = {'minatar': 3, 'shallow': 20, 'shallow_atari': 36, 'deep': 8}


class Reading(NamedTuple):
    """How the network reads one leaf of an observation."""

    name: str  # Path of the leaf, such as `observation['rgb']`.
    torso: str  # 'words', 'category', 'mlp', an image torso, or 'module:Class'.
    axes: tuple[int, ...] = ()  # Axes of height, width and channels of an image; several channel axes are merged.
    scale: float = 1.0  # Divisor of uint8 values.
    is_default_scale: bool = True  # Whether `NetworkConfig.uint8_scale` is not set.
    num_values: int = 0  # Number of categories or word ids.

    def check(self, leaf: np.ndarray) -> None:
        """Raises ConfigError if a category or word, [N, ...] integers, has no row in the embedding."""
        if not self.num_values or not leaf.size:
            return
        low, high = int(leaf.min()), int(leaf.max())
        if low < 0 or high >= self.num_values:
            raise ConfigError(_outside(self, low if low < 0 else high))


def read(config: NetworkConfig, observation: PyTree) -> tuple[Reading, ...]:
    """Decides how the network reads each leaf of an observation.

    Args:
      config: Configuration of the network.
      observation: PyTree of ArraySpecs.

    Returns:
      One Reading per leaf, in the order of `jax.tree.leaves`.

    Raises:
      ConfigError: If the torso does not support a leaf, or word ids or categories exceed the embedding.
    """
    leaves = jax.tree_util.tree_leaves_with_path(observation, is_leaf=lambda x: isinstance(x, ArraySpec))
    readings = tuple(
        _read_leaf(config, path, leaf)._replace(is_default_scale=config.uint8_scale is None) for path, leaf in leaves
    )
    if not config.instructions and all(reading.torso == 'words' for reading in readings):
        raise ConfigError(
            '--network.no-instructions: the observation consists of instructions only; leave the option out'
        )
    if config.torso in _IMAGE_TORSOS and not any(reading.axes for reading in readings):
        shapes = ', '.join(f'{reading.name} {leaf.shape}' for reading, (_, leaf) in zip(readings, leaves, strict=True))
        raise ConfigError(
            f'network.torso {config.torso!r} takes images, and the environment has none ({shapes}); '
            'try --network.torso auto, or mlp'
        )
    return readings


def describe(readings: tuple[Reading, ...], observation: PyTree) -> str:
    """Describes in one line how each leaf of an observation, a PyTree of ArraySpecs, is read."""
    leaves = jax.tree.leaves(observation, is_leaf=lambda x: isinstance(x, ArraySpec))
    return '; '.join(_describe_leaf(*pair) for pair in zip(readings, leaves, strict=True))


def _read_leaf(config: NetworkConfig, path: tuple[Any, ...], leaf: ArraySpec) -> Reading:
    name = 'observation' + jax.tree_util.keystr(path)
    key = getattr(path[-1], 'key', None) if path else None
    if key == INSTRUCTION and len(leaf.shape) == 1 and leaf.dtype == np.int32:
        reading = Reading(name, 'words', num_values=config.num_word_ids if config.instructions else 0)
        for value in leaf.bounds or ():
            reading.check(np.array([value]))
        return reading
    if leaf.num_values is not None:
        if leaf.num_values > MAX_CATEGORIES:
            raise ConfigError(
                f'{name} has {leaf.num_values:,} categories, and at most {MAX_CATEGORIES:,} can be embedded; '
                'describe them by a vector in the environment'
            )
        return Reading(name, 'category', num_values=leaf.num_values)
    scale = _scale(config, name, leaf)
    if config.torso not in (*_IMAGE_TORSOS, 'auto'):
        return Reading(name, config.torso, scale=scale)
    axes = image_axes(leaf.shape)
    torso = 'shallow' if config.torso == 'auto' else config.torso
    if axes is not None and min(leaf.shape[axis] for axis in axes[:2]) >= _IMAGE_TORSOS[torso]:
        return Reading(name, torso, axes, scale)
    if config.torso != 'auto' and len(leaf.shape) >= 3:
        raise ConfigError(
            f'network.torso {torso!r} needs images of at least {_IMAGE_TORSOS[torso]} pixels per side, and {name} has '
            f'shape {leaf.shape}; give [height, width, channels], or try --network.torso mlp'
        )
    return Reading(name, 'mlp', scale=scale)


def _scale(config: NetworkConfig, name: str, leaf: ArraySpec) -> float:
    """Divisor of a leaf's values; only uint8 values are scaled."""
    if leaf.dtype != np.uint8:
        return 1.0
    if config.uint8_scale is not None:
        return config.uint8_scale
    return float(max(1, leaf.bounds[1])) if leaf.bounds else 255.0


def _describe_leaf(reading: Reading, leaf: ArraySpec) -> str:
    what = f'{reading.name} {list(leaf.shape)} {leaf.dtype}'
    if reading.torso == 'words':
        return f'{what}: ' + (f'word ids below {reading.num_values}' if reading.num_values else 'left out')
    if reading.torso == 'category':
        return f'{what}: one of {reading.num_values} values, embedded'
    scaled = f', divided by {reading.scale:g}' if reading.scale != 1 else ''
    if not reading.axes:
        return f'{what}: {"an " if reading.torso == "mlp" else ""}{reading.torso}{scaled}'
    height, width, *others = (leaf.shape[axis] for axis in reading.axes)
    channels = int(np.prod(others))
    plural = '' if channels == 1 else 's'
    return f'{what}: image of {height} x {width}, {channels} channel{plural}, {reading.torso}{scaled}'


def _outside(reading: Reading, value: int) -> str:
    if reading.torso == 'words' and 0 <= value < MAX_CATEGORIES:
        return (
            f'{reading.name} has word id {value}, and network.num_word_ids is {reading.num_values}; '
            f'set --network.num-word-ids {value + 1}, or --network.no-instructions'
        )
    kind = 'word id' if reading.torso == 'words' else 'category'
    return f'{reading.name} has {kind} {value}, outside 0 to {reading.num_values - 1}; fix the environment'

"""The interface of a vector of environments, and helpers for its implementations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import dm_env
import numpy as np
from dm_env import specs

from impala_jax.config import ConfigError
from impala_jax.types import ArraySpec, EnvironmentSpec, PyTree, StepInfo, TimeStep, image_axes


class EnvironmentFailure(RuntimeError):
    """An environment failed `max_failures` times without finishing an episode in between."""


class Violation(ValueError):
    """An environment returned an invalid value; the message is complete without a traceback."""


_LONGEST_LINE = 1000
RAISED_BY_ENVIRONMENTS = (Exception, SystemExit)
"""Exceptions that count as a failure of the environment; `sys.exit` in an environment must not end the program."""


class VectorEnvironment(Protocol):
    """N environments that step together.

    Each environment follows dm_env: after a LAST timestep the next action is ignored and a FIRST timestep follows. An
    environment that fails is rebuilt with a different seed; the failing step then returns a FIRST timestep and counts
    in `restarts`. Returned arrays are never overwritten, so callers may hold on to them.
    """

    num_envs: int
    spec: EnvironmentSpec

    def reset(self) -> TimeStep:
        """Starts a new episode in every environment; returns FIRST timesteps, [N, ...]."""
        ...

    def step(self, actions: np.ndarray) -> tuple[TimeStep, StepInfo]:
        """Takes one step in every environment.

        Args:
          actions: Actions, [N] int32.

        Returns:
          The timesteps after the actions and the episode statistics, both [N, ...].

        Raises:
          EnvironmentFailure: An environment failed too often.
          ValueError: An action is out of range.
        """
        ...

    def get_state(self) -> bytes:
        """Returns the complete state, without the last timestep, which the caller saves.

        Raises:
          NotImplementedError: The environments cannot be saved exactly; the message says why.
        """
        ...

    def set_state(self, state: bytes) -> None:
        """Restores a state returned by `get_state`, so that the episodes continue exactly.

        Raises:
          ValueError: The state is from a different version or a different environment.
        """
        ...

    def render(self) -> np.ndarray:
        """Returns an image of environment 0, [H, W, 3] uint8.

        Raises:
          NotImplementedError: The environment cannot be rendered.
        """
        ...

    def close(self) -> None:
        """Releases all resources and ends all worker processes; may be called more than once."""
        ...


def environment_spec(environment: dm_env.Environment, name: str) -> EnvironmentSpec:
    """Returns the spec of a dm_env environment.

    Args:
      environment: The environment.
      name: Name of the environment, for error messages.

    Raises:
      ConfigError: The actions are not 0 to n - 1, or the observations are not numeric arrays.
    """
    actions: Any = environment.action_spec()
    discrete = isinstance(actions, specs.BoundedArray) and actions.shape == () and actions.dtype.kind in 'iu'
    if not discrete or actions.minimum != 0:
        raise ConfigError(f'environment {name!r} has no plain discrete actions (0 to n - 1) but {actions}')
    declared = environment.observation_spec()
    _check_observation_spec(declared, name)
    observation = map_leaves(leaf_spec, declared)
    fps: Any = getattr(environment, 'render_fps', None)
    stated = isinstance(fps, (int, float, np.number)) and 0 < fps < float('inf')
    return EnvironmentSpec(observation, int(actions.maximum) + 1, render_fps=float(fps) if stated else None)


def leaf_spec(leaf: specs.Array) -> ArraySpec:
    """Returns the spec of one leaf of an observation."""
    spec = ArraySpec(tuple(leaf.shape), canonical_dtype(leaf.dtype))
    if isinstance(leaf, specs.DiscreteArray):
        return spec._replace(num_values=int(leaf.num_values))
    if not isinstance(leaf, specs.BoundedArray) or np.dtype(leaf.dtype).kind not in 'iu' or not leaf.minimum.size:
        return spec
    bounds = int(leaf.minimum.min()), int(leaf.maximum.max())
    widest = np.iinfo(leaf.dtype)
    return spec if bounds == (widest.min, widest.max) else spec._replace(bounds=bounds)


def _check_observation_spec(spec: Any, name: str, path: str = 'observation') -> None:
    """Raises ConfigError for a spec that networks cannot read."""
    what = f'environment {name!r}: the spec of {path}'
    if isinstance(spec, Mapping):
        parts = list(spec.items())
        if len({type(key) for key in spec}) > 1:
            raise ConfigError(f'{what} has keys of several types, {list(spec)}; use strings only')
    elif isinstance(spec, (tuple, list)):
        parts = list(enumerate(spec))
    else:
        if not isinstance(spec, specs.Array):
            raise ConfigError(f'{what} is {spec!r}; use dm_env.specs.Array, or dicts and tuples of them')
        if np.dtype(spec.dtype).kind not in 'biuf':
            raise ConfigError(f'{what} has dtype {spec.dtype}; observations must be numbers')
        if 0 in spec.shape:
            raise ConfigError(f'{what} has shape {tuple(spec.shape)}, which holds no numbers; leave it out')
        return
    if not parts:
        raise ConfigError(f'{what} is empty; an observation needs at least one array')
    for key, part in parts:
        _check_observation_spec(part, name, f'{path}[{key!r}]')


def canonical_dtype(dtype: Any) -> np.dtype:
    """Returns the agent's dtype for an array: uint8 for uint8, int32 for other integers, float32 for the rest."""
    dtype = np.dtype(dtype)
    if dtype == np.uint8:
        return dtype
    return np.dtype(np.int32 if dtype.kind in 'iu' else np.float32)


def require_same_spec(name: str, first: EnvironmentSpec, index: int, other: EnvironmentSpec) -> None:
    """Raises ConfigError unless environment `index` has the same spec as environment 0."""
    if first != other:
        raise ConfigError(f'the environments of {name!r} differ: number 0 has {first}, number {index} has {other}')


def check_actions(actions: np.ndarray, num_envs: int, num_actions: int) -> np.ndarray:
    """Returns `actions` as int32, [num_envs].

    Raises:
      ValueError: The shape is wrong, or an action is out of range.
    """
    actions = np.asarray(actions, np.int32)
    if actions.shape != (num_envs,):
        raise ValueError(f'expected {num_envs} actions, got an array of shape {actions.shape}')
    if actions.min() < 0 or actions.max() >= num_actions:
        raise ValueError(f'actions must lie in [0, {num_actions}), got {actions.min()} to {actions.max()}')
    return actions


def one_line(error: BaseException) -> str:
    """Formats an error as one line, truncated if it is long."""
    try:
        text = str(error)
    except Exception as second:  # `__str__` of an environment's own exception may raise anything.
        text = f'its message is unavailable ({type(second).__name__})'
    line = ' '.join((text if isinstance(error, Violation) else f'{type(error).__name__}: {text}').split())
    line = line.removesuffix(':')
    return line if len(line) <= _LONGEST_LINE else f'{line[:_LONGEST_LINE]} ...'


# Instead of `jax.tree`: worker processes should start without importing JAX.


def map_leaves(fn: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """Applies `fn` to the leaves of dicts, tuples and lists, as `jax.tree.map` does; an ArraySpec is a leaf."""
    if isinstance(tree, Mapping):
        return {key: map_leaves(fn, value, *(other[key] for other in rest)) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)) and not isinstance(tree, ArraySpec):
        values = [map_leaves(fn, *values) for values in zip(tree, *rest, strict=True)]
        return type(tree)(*values) if hasattr(tree, '_fields') else type(tree)(values)  # pyright: ignore
    return fn(tree, *rest)


def leaves(tree: PyTree) -> Iterator[Any]:
    """Yields the leaves of dicts, tuples and lists; an ArraySpec is a leaf."""
    if isinstance(tree, Mapping):
        for value in tree.values():
            yield from leaves(value)
    elif isinstance(tree, (tuple, list)) and not isinstance(tree, ArraySpec):
        for value in tree:
            yield from leaves(value)
    else:
        yield tree


def concatenate(trees: list[Any]) -> Any:
    """Concatenates TimeSteps or StepInfos along the environment axis."""
    return map_leaves(lambda *parts: np.concatenate(parts), trees[0], *trees[1:])


def rendered(value: Any, name: str) -> np.ndarray:
    """Converts the result of an environment's `render()` to [H, W, 3] uint8.

    Greyscale and RGBA images, booleans, integers from 0 to 255 and floats from 0 to 1 are accepted.

    Args:
      value: The result of `render()`.
      name: Name of the environment, for error messages.

    Raises:
      NotImplementedError: The value is not an image; the message describes it.
    """

    def wrong(what: str) -> NotImplementedError:
        return NotImplementedError(
            f'render() of environment {name!r} returned {what} instead of an image [height, width, 3] uint8'
        )

    if not isinstance(value, np.ndarray):
        raise wrong('None' if value is None else f'a {type(value).__name__}')
    image = value[..., 0] if value.ndim == 3 and value.shape[-1] == 1 else value
    image = np.repeat(image[..., None], 3, axis=-1) if image.ndim == 2 else image
    if image.ndim != 3 or image.shape[-1] not in (3, 4) or not image.size or image.dtype.kind not in 'biuf':
        raise wrong(f'an array of shape {value.shape} and dtype {value.dtype}')
    image = image[..., :3]
    if image.dtype == np.uint8:
        return image
    low, high, greatest = image.min(), image.max(), 255 if image.dtype.kind in 'iu' else 1
    if not (low >= 0 and high <= greatest):
        raise wrong(f'{value.dtype} values from {low} to {high}')
    return (image * (255 // greatest)).astype(np.uint8)


def picture(observation: np.ndarray, height: int = 320, width: int | None = None) -> np.ndarray:
    """Converts an image observation to [height, width, 3] uint8.

    Args:
      observation: An image as described in `image_axes`, or [H, W] of any size. Of stacked frames the last, which is
        the newest, is shown.
      height: Height of the result, in pixels.
      width: Width of the result, in pixels; None preserves the aspect ratio up to rounding to a multiple of 16, which
        video codecs require.

    Raises:
      NotImplementedError: The observation is not an image.
    """
    image = np.asarray(observation)
    axes = image_axes(image.shape)
    if axes is not None:
        image = image.transpose(axes)
        coloured = image.ndim > 2 and image.shape[-1] == 3
        image = image.reshape(*image.shape[:2], -1)[..., -3 if coloured else -1 :]
        image = image if coloured else image[..., 0]
    if image.ndim not in (2, 3) or min(image.shape[:2]) < 2:
        raise NotImplementedError(f'an observation of shape {np.shape(observation)} is not an image')
    if image.dtype != np.uint8:
        low, high = float(image.min()), float(image.max())
        image = ((image - low) * (255 / ((high - low) or 1))).astype(np.uint8)
    width = width or max(16, round(height * image.shape[1] / image.shape[0] / 16) * 16)
    rows = np.arange(height) * image.shape[0] // height
    columns = np.arange(width) * image.shape[1] // width
    image = image[rows][:, columns]
    return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=-1)

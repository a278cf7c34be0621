"""Conversion of an environment's observations to the agent's dtypes.

Observations are matched with the spec by key. If an array has the dtype that its spec declares, and the agent uses that
dtype, only the shape is checked, so images cost nothing. All other arrays are converted, and a conversion that changes
a value is an error: integers must convert exactly, real numbers to the nearest float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from impala_jax.environments.base import Violation
from impala_jax.types import ArraySpec, PyTree

_EXACT_INTEGERS = 2**24  # float32 holds every integer up to here.


class ObservationError(Violation):
    """An observation does not match its spec; the message names the leaf, the value and the remedy."""


class Leaf(NamedTuple):
    """One array of an observation."""

    path: str  # such as `observation['camera'][0]`
    spec: ArraySpec
    declared: np.dtype  # in the environment's own spec
    as_declared: bool  # whether the agent uses the declared dtype
    bounds: tuple[int, int] | None  # if the network would misread values outside


def leaves(spec: PyTree, declared: PyTree) -> list[Leaf]:
    """Returns the leaves of an observation, in the order of its spec.

    Args:
      spec: Nested ArraySpecs.
      declared: Dtypes of the environment's own spec, with the same nesting.
    """
    return [
        Leaf(path, leaf, np.dtype(dtype), np.dtype(dtype) == leaf.dtype, _bounds(leaf))
        for (path, leaf), dtype in zip(_paths(spec), values(spec, declared), strict=True)
    ]


def values(spec: PyTree, observation: Any, path: str = 'observation') -> list[Any]:
    """Returns the values of an observation in the order of its spec, matched by key.

    Args:
      spec: Nested ArraySpecs.
      observation: Nested values.
      path: Name of the observation, for error messages.

    Raises:
      ObservationError: A key is missing or unknown, or a tuple has the wrong length.
    """
    if isinstance(spec, ArraySpec):
        return [observation]
    found: list[Any] = []
    if isinstance(spec, dict):
        if not isinstance(observation, Mapping):
            raise ObservationError(f'{path} is a {type(observation).__name__}, but its spec is a dict of {list(spec)}')
        if observation.keys() != spec.keys():
            missing = [key for key in spec if key not in observation]
            unknown = [key for key in observation if key not in spec]
            texts = [f'lacks {missing}'] * bool(missing) + [f'has unknown keys {unknown}'] * bool(unknown)
            raise ObservationError(f'{path} {" and ".join(texts)}; its spec has the keys {list(spec)}')
        for key, part in spec.items():
            found += values(part, observation[key], f'{path}[{key!r}]')
        return found
    if not isinstance(observation, (tuple, list)) or len(observation) != len(spec):
        size = f' of {len(observation)}' if isinstance(observation, (tuple, list)) else ''
        raise ObservationError(
            f'{path} is a {type(observation).__name__}{size}, but its spec is a {type(spec).__name__} of {len(spec)}'
        )
    for i, (part, value) in enumerate(zip(spec, observation, strict=True)):
        found += values(part, value, f'{path}[{i}]')
    return found


def write(leaf: Leaf, value: Any, out: np.ndarray, i: int) -> None:
    """Writes a leaf's value to `out[i]`; whether floats of the declared dtype are finite is not checked here.

    Raises:
      ObservationError: The shape differs from the spec, or a value would change.
    """
    if leaf.as_declared and type(value) is np.ndarray and value.dtype == leaf.declared and value.shape == out.shape[1:]:
        out[i] = value
    else:
        out[i] = _converted(leaf, value)


def unreadable(leaves: list[Leaf], arrays: list[np.ndarray]) -> dict[int, ObservationError]:
    """Finds values that are not finite or exceed bounds that the network relies on.

    Args:
      leaves: The leaves of the observation.
      arrays: Values of each leaf, [N, ...].

    Returns:
      An error for each invalid environment, by its index.
    """
    errors: dict[int, ObservationError] = {}
    for leaf, array in zip(leaves, arrays, strict=True):
        if leaf.bounds is not None:
            low, high = leaf.bounds
            if array.min() < low or array.max() > high:
                outside = (array < low) | (array > high)
                for i in np.flatnonzero(outside.reshape(len(array), -1).any(axis=1)).tolist():
                    value = array[i][outside[i]][0]
                    errors.setdefault(
                        i, ObservationError(f'{leaf.path} has the value {value}, but its spec says {low} to {high}')
                    )
        if array.dtype.kind != 'f' or math.isfinite(np.vdot(array, array)):  # On overflow, each value is checked.
            continue
        for i in np.flatnonzero(~np.isfinite(array).reshape(len(array), -1).all(axis=1)).tolist():
            errors.setdefault(i, _not_finite(leaf, array[i]))
    return errors


def _bounds(spec: ArraySpec) -> tuple[int, int] | None:
    """Bounds of categories, which index an embedding, and of bytes, which are divided by the upper bound."""
    if spec.num_values is not None:
        return 0, spec.num_values - 1
    return spec.bounds if spec.dtype == np.uint8 else None


def _paths(spec: PyTree, path: str = 'observation') -> Iterator[tuple[str, ArraySpec]]:
    if isinstance(spec, ArraySpec):
        yield path, spec
    else:
        for key, part in spec.items() if isinstance(spec, dict) else enumerate(spec):
            yield from _paths(part, f'{path}[{key!r}]')


def _converted(leaf: Leaf, value: Any) -> np.ndarray:
    """Converts the value to the agent's dtype."""
    try:
        array = np.asarray(value)
    except ValueError as error:  # Lists of different lengths.
        raise ObservationError(f'{leaf.path} is not an array: {error}') from error
    if array.shape != leaf.spec.shape:
        raise ObservationError(f'{leaf.path} has shape {array.shape}, but its spec says {leaf.spec.shape}')
    if array.dtype.kind not in 'biuf':
        raise ObservationError(f'{leaf.path} is {array.dtype}, but its spec says {leaf.declared}; return numbers')
    with np.errstate(invalid='ignore', over='ignore'):
        converted = array.astype(leaf.spec.dtype)
        if leaf.spec.dtype.kind != 'f':
            same = converted == array
        elif array.dtype.kind == 'f':
            same = np.isfinite(converted)
        else:
            same = _exact_as_float32(array)
    if np.all(same):
        return converted
    if array.dtype.kind == 'f' and not np.isfinite(array).all():
        raise _not_finite(leaf, array)
    changed = array[~np.asarray(same)].ravel()[0]
    kind, used = array.dtype, leaf.spec.dtype
    if kind.kind == used.kind == 'f':
        remedy = 'scale the values'
    elif kind != leaf.declared:
        remedy = f'let the spec declare {kind}, or return {leaf.declared}'
    else:
        remedy = 'let the environment declare and return float32, or scale the values'
    raise ObservationError(
        f'{leaf.path} is {kind}, its spec declares {leaf.declared}, and the value {changed!s} does not survive as the '
        f"agent's {used}; {remedy}"
    )


def _exact_as_float32(integers: np.ndarray) -> np.ndarray:
    """Returns a mask of the integers that float32 represents exactly."""
    if integers.dtype == bool or -_EXACT_INTEGERS <= integers.min() and integers.max() <= _EXACT_INTEGERS:
        return np.ones(integers.shape, bool)
    exact = [int(np.float32(value)) == value for value in integers.ravel().tolist()]
    return np.array(exact).reshape(integers.shape)


def _not_finite(leaf: Leaf, value: np.ndarray) -> ObservationError:
    where = tuple(np.argwhere(~np.isfinite(value))[0].tolist())
    place = f' at index {where}' if where else ''
    return ObservationError(f'{leaf.path} is {value[where]!s}{place}; observations must be finite')

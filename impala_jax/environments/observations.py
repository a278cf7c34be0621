"""Observations as they come from an environment: matched with its spec by key, and refused where a value would change.

Where an array has the dtype that its spec declares, and the agent uses that dtype, only the shape is compared, so that
pictures cost nothing. Everything else is converted, and every value must survive: integers exactly, real numbers to the
nearest float32.
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
    """An observation that its spec does not describe. The message names the leaf, the value and the remedy."""


class Leaf(NamedTuple):
    """One array of an observation."""

    path: str  # such as `observation['camera'][0]`
    spec: ArraySpec
    declared: np.dtype  # in the environment's own spec
    as_declared: bool  # whether the agent uses the declared dtype
    bounds: tuple[int, int] | None  # where a value beyond them would be read wrongly


def leaves(spec: PyTree, declared: PyTree) -> list[Leaf]:
    """The leaves of an observation, in the order of its spec.

    Args:
      spec: Nested ArraySpecs.
      declared: The dtypes of the environment's own spec, nested alike.
    """
    return [
        Leaf(path, leaf, np.dtype(dtype), np.dtype(dtype) == leaf.dtype, _bounds(leaf))
        for (path, leaf), dtype in zip(_paths(spec), values(spec, declared), strict=True)
    ]


def values(spec: PyTree, observation: Any, path: str = 'observation') -> list[Any]:
    """The leaves of an observation in the order of its spec, matched by key and not by order.

    Raises:
      ObservationError: A key is missing or unknown, or a tuple has another length.
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
    """Writes a leaf's value to `out[i]`. Real numbers of the declared dtype are not checked to be finite.

    Raises:
      ObservationError: The shape differs from the spec, or a value would change.
    """
    if leaf.as_declared and type(value) is np.ndarray and value.dtype == leaf.declared and value.shape == out.shape[1:]:
        out[i] = value
    else:
        out[i] = _converted(leaf, value)


def unreadable(leaves: list[Leaf], arrays: list[np.ndarray]) -> dict[int, ObservationError]:
    """Errors by the index of the environment, for numbers in `arrays`, each [N, ...], that no network can read.

    They are not finite, or beyond bounds that the network relies on.
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
        if array.dtype.kind != 'f' or math.isfinite(np.vdot(array, array)):  # Also without an overflow in the product.
            continue
        for i in np.flatnonzero(~np.isfinite(array).reshape(len(array), -1).all(axis=1)).tolist():
            errors.setdefault(i, _not_finite(leaf, array[i]))
    return errors


def _bounds(spec: ArraySpec) -> tuple[int, int] | None:
    """Those of a category, whose values have a row each, and of bytes, which are divided by the greatest."""
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
    """The value in the agent's dtype."""
    try:
        array = np.asarray(value)
    except ValueError as error:  # Lists of different lengths.
        raise ObservationError(f'{leaf.path} is no array: {error}') from error
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
    """Which integers float32 holds exactly."""
    if integers.dtype == bool or -_EXACT_INTEGERS <= integers.min() and integers.max() <= _EXACT_INTEGERS:
        return np.ones(integers.shape, bool)
    exact = [int(np.float32(value)) == value for value in integers.ravel().tolist()]
    return np.array(exact).reshape(integers.shape)


def _not_finite(leaf: Leaf, value: np.ndarray) -> ObservationError:
    where = tuple(np.argwhere(~np.isfinite(value))[0].tolist())
    place = f' at index {where}' if where else ''
    return ObservationError(f'{leaf.path} is {value[where]!s}{place}; observations must be finite')

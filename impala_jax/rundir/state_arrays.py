"""Conversion between a state, which is a pytree, and a dict of arrays keyed by path."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from impala_jax.types import PyTree

_RUNTIME = 'runtime'  # Key of the leaves whose shapes may change between save and restore.


def flatten(state: PyTree) -> dict[str, np.ndarray]:
    """The state's leaves, keyed by path.

    Raises:
      TypeError: If a leaf is not numeric.
      ValueError: If two leaves have the same path.
    """
    arrays = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        name, array = _name(path), np.asarray(leaf)
        if array.dtype.kind in 'OUSMm':
            raise TypeError(f'{name} is {_describe(array)}; a checkpoint holds numbers only')
        if name in arrays:
            raise ValueError(f'two leaves of the state have the path {name}')
        arrays[name] = array
    return arrays


def fit(template: PyTree, arrays: dict[str, np.ndarray], strict: bool) -> tuple[PyTree, list[str]]:
    """Arranges arrays in the structure of a template.

    Args:
      template: PyTree as in `checkpoint.Checkpointer.restore_latest`.
      arrays: Arrays keyed by path, as returned by `flatten`.
      strict: Whether an array that the template lacks is a problem.

    Returns:
      The arrays in the template's structure, and a phrase for each array that does not fit.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(template, is_leaf=lambda leaf: leaf is None)
    values, used, problems = [], set(), []
    for path, leaf in leaves:
        name = _name(path)
        if leaf is None:
            below = [other for other in arrays if other == name or other.startswith(f'{name}/')]
            used.update(below)
            values.append(_nest({other[len(name) + 1 :]: arrays[other] for other in below}))
            continue
        array = arrays.get(name)
        values.append(array)
        used.add(name)
        if array is None:
            problems.append(f'{name} is missing')
        elif not _is_runtime(name):
            expected = leaf if hasattr(leaf, 'dtype') else np.asarray(leaf)
            if array.shape != tuple(expected.shape) or array.dtype != expected.dtype:
                problems.append(f'{name} is {_describe(array)} there, {_describe(expected)} now')
    if strict:
        problems += [f'{name} is not expected' for name in arrays if name not in used and not _is_runtime(name)]
    return jax.tree_util.tree_unflatten(treedef, values), problems


def _nest(arrays: dict[str, np.ndarray]) -> Any:
    """Nested dicts from paths; the array itself if the path is empty; None if there are no arrays."""
    if not arrays or '' in arrays:
        return arrays.get('')
    nested: dict[str, Any] = {}
    for name, array in arrays.items():
        *parents, last = name.split('/')
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = array
    return nested


def _name(path: tuple[Any, ...]) -> str:
    def part(key: Any) -> str:
        return str(next(getattr(key, field) for field in ('name', 'key', 'idx') if hasattr(key, field)))

    return '/'.join(map(part, path)) or 'value'


def _is_runtime(name: str) -> bool:
    return name.split('/')[0] == _RUNTIME


def _describe(array: Any) -> str:
    return f'{np.dtype(array.dtype).name}{list(array.shape)}'

"""Serialisation of states without pickle, as JSON for the structure and raw bytes for arrays. Reading runs no code.

Plain values are None, booleans, numbers, strings, bytes, lists, tuples, dicts, sets and deques of plain values, NumPy
arrays and scalars, and the random generators of NumPy and Python. An object, such as an environment, is written as its
attributes and read into an object that was built in the same way, so reading never constructs an object.
"""

from __future__ import annotations

import collections
import copyreg
import json
import random
import types
from collections.abc import Callable
from typing import Any

import dm_env
import dm_env.specs
import numpy as np

_MAGIC = b'impala_jax state 1\n'
_LENGTH_BYTES = 8
_BIT_GENERATORS = ('MT19937', 'PCG64', 'PCG64DXSM', 'Philox', 'SFC64')
# Constructors of containers from a list, keyed by tag.
_SEQUENCES: dict[str, Callable[[list[Any]], Any]] = {
    'list': list,
    'tuple': tuple,
    'set': set,
    'frozenset': frozenset,
    'timestep': lambda items: dm_env.TimeStep(*items),
}
_TAGS = {list: 'list', tuple: 'tuple', set: 'set', frozenset: 'frozenset', dm_env.TimeStep: 'timestep'}
# Types of values that are not written, because an object that was built in the same way has them too.
_CONSTANTS = (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType, np.ufunc, dm_env.specs.Array)


def encode(value: Any, blueprint: dict[str, str] | None = None) -> bytes:
    """Serialises a plain value or an object.

    Args:
      value: Value to write.
      blueprint: Result of `blueprint_of` for an object like the one that `decode_into` will receive; None if `value` is
        plain.

    Raises:
      TypeError: If `value` contains an object whose state is not in Python attributes, or that the blueprint lacks; the
        message names it.
    """
    writer = _Writer(blueprint or {})
    structure = writer.node(value, '')
    tables = [[array.dtype.str, list(array.shape)] for array in writer.arrays]
    header = json.dumps([structure, tables]).encode()
    return b''.join([_MAGIC, len(header).to_bytes(_LENGTH_BYTES, 'little'), header, *map(_bytes_of, writer.arrays)])


def decode(state: bytes) -> Any:
    """Returns the plain value that `encode` wrote.

    Raises:
      ValueError: If the bytes are something else, such as a pickle of an earlier version.
    """
    return decode_into(None, state)


def decode_into(built: Any, state: bytes) -> Any:
    """Restores the written attributes of an object and of the objects that it contains; returns the object.

    Args:
      built: Object that was built like the written one, and that has no other user yet.
      state: Bytes from `encode`.

    Raises:
      ValueError: If the bytes are not from `encode`, or do not fit the object.
    """
    if not state.startswith(_MAGIC):
        raise ValueError('it was not written by this version')
    try:
        start = len(_MAGIC) + _LENGTH_BYTES
        end = start + int.from_bytes(state[len(_MAGIC) : start], 'little')
        structure, tables = json.loads(state[start:end])
        arrays = []
        for dtype, shape in tables:
            size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
            arrays.append(np.frombuffer(state[end : end + size], np.dtype(dtype)).reshape(shape).copy())
            end += size
        return _Reader(arrays).value(structure, built)
    except (AttributeError, IndexError, KeyError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f'it cannot be read ({type(error).__name__}: {error})') from error


def blueprint_of(built: Any) -> dict[str, str]:
    """The types of the objects inside an object, keyed by their paths; see `encode`."""
    writer = _Writer(None)
    writer.node(built, '')
    return writer.objects


def _bytes_of(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def _name_of(cls: type) -> str:
    return f'{cls.__module__}.{cls.__qualname__}'


class _Writer:
    def __init__(self, blueprint: dict[str, str] | None):
        self.arrays: list[np.ndarray] = []
        self.objects: dict[str, str] = {}
        self._blueprint = blueprint
        self._seen: dict[int, int] = {}
        self._kept: list[Any] = []  # References that prevent the reuse of an id.

    def node(self, value: Any, path: str) -> Any:
        kind = type(value)
        if value is None or kind in (bool, int, float, str):
            return value
        if kind is bytes:
            return ['bytes', self._array(np.frombuffer(value, np.uint8))]
        if isinstance(value, np.generic):
            return ['scalar', self._array(np.asarray(value))]
        if isinstance(value, np.dtype):
            return ['dtype', value.str]
        if isinstance(value, dm_env.StepType):
            return ['step_type', int(value)]
        if isinstance(value, types.MethodType):
            return ['method', self.node(value.__self__, f'{path}.__self__'), value.__name__]
        if isinstance(value, _CONSTANTS):
            if getattr(value, '__closure__', None):
                raise TypeError(f'cannot save the closure {_constant_name(value)!r} at {path or "the top level"}')
            self._check_blueprint(_constant_name(value), path)
            return ['constant', _constant_name(value)]
        # A mutable value that is referenced twice is restored as one value.
        if id(value) in self._seen:
            return ['same', self._seen[id(value)]]
        self._seen[id(value)] = len(self._seen)
        self._kept.append(value)
        if kind in _TAGS:
            return [_TAGS[kind], [self.node(item, f'{path}[{i}]') for i, item in enumerate(value)]]
        if kind in (dict, collections.OrderedDict):
            items = [
                [self.node(key, f'{path}.keys'), self.node(item, f'{path}[{key!r}]')] for key, item in value.items()
            ]
            return ['dict' if kind is dict else 'ordered', items]
        if kind is collections.deque:
            return ['deque', [self.node(item, f'{path}[{i}]') for i, item in enumerate(value)], value.maxlen]
        if kind is np.ndarray:
            return ['array', self._array(value)]
        if kind is np.random.RandomState:
            return ['numpy_random', self.node(value.get_state(legacy=False), path)]
        if kind is np.random.Generator:
            return ['numpy_generator', self.node(value.bit_generator.state, path)]
        if kind is random.Random:
            return ['python_random', self.node(value.getstate(), path)]
        return self._object(value, path)

    def _array(self, array: np.ndarray) -> int:
        if array.dtype.hasobject or array.dtype.names:
            raise TypeError(f'cannot save an array of dtype {array.dtype}')
        self.arrays.append(array)
        return len(self.arrays) - 1

    def _object(self, value: Any, path: str) -> Any:
        name = _name_of(type(value))
        where = path or 'the top level'
        if isinstance(value, tuple) and hasattr(value, '_fields'):
            self._check_blueprint(name, path)
            return ['named', name, [self.node(item, f'{path}[{i}]') for i, item in enumerate(value)]]
        # As in pickle; raises TypeError for an object whose state is not in Python attributes.
        reduced = value.__reduce_ex__(2)
        own = getattr(type(value), '__getstate__', None) is not getattr(object, '__getstate__', None)
        plain = reduced[0] is copyreg.__newobj__ and reduced[1] == (type(value),) and not any(reduced[3:])  # pyright: ignore
        if own or not plain or not hasattr(value, '__dict__') or copyreg._slotnames(type(value)):  # pyright: ignore
            raise TypeError(f'cannot save {name} at {where}, whose state is not in Python attributes')
        self._check_blueprint(name, path)
        return ['object', name, [[key, self.node(item, f'{path}.{key}')] for key, item in vars(value).items()]]

    def _check_blueprint(self, name: str, path: str) -> None:
        if self._blueprint is not None and self._blueprint.get(path) != name:
            raise TypeError(
                f'cannot save {name} at {path or "the top level"}, which was made after its environment was built'
            )
        self.objects[path] = name


class _Reader:
    def __init__(self, arrays: list[np.ndarray]):
        self._arrays = arrays
        self._seen: list[Any] = []

    def value(self, node: Any, built: Any) -> Any:
        """Decodes `node`; `built` is the value at its path in the object that is being restored."""
        if not isinstance(node, list):
            return node
        tag, *rest = node
        if tag == 'bytes':
            return self._arrays[rest[0]].tobytes()
        if tag == 'scalar':
            return self._arrays[rest[0]][()]
        if tag == 'dtype':
            return np.dtype(rest[0])
        if tag == 'step_type':
            return dm_env.StepType(rest[0])
        if tag == 'method':
            return getattr(self.value(rest[0], getattr(built, '__self__', None)), rest[1])
        if tag == 'constant':
            if not isinstance(built, _CONSTANTS) or _constant_name(built) != rest[0]:
                raise ValueError(f'{rest[0]} is not at the path where it was saved')
            return built
        if tag == 'same':
            return self._seen[rest[0]]
        index = len(self._seen)
        self._seen.append(None)
        self._seen[index] = made = self._made(tag, rest, built, index)
        return made

    def _made(self, tag: str, rest: list[Any], built: Any, index: int) -> Any:
        if tag in _SEQUENCES or tag == 'deque':
            olds = list(built) if isinstance(built, (list, tuple, collections.deque)) else []
            olds += [None] * (len(rest[0]) - len(olds))
            if tag == 'list':  # It may hold itself.
                self._seen[index] = made = []
                made.extend(self.value(item, old) for item, old in zip(rest[0], olds, strict=False))
                return made
            items = [self.value(item, old) for item, old in zip(rest[0], olds, strict=False)]
            return collections.deque(items, rest[1]) if tag == 'deque' else _SEQUENCES[tag](items)
        if tag in ('dict', 'ordered'):
            self._seen[index] = made = {} if tag == 'dict' else collections.OrderedDict()
            for key, item in rest[0]:
                key = self.value(key, None)
                made[key] = self.value(item, built.get(key) if isinstance(built, dict) else None)
            return made
        if tag == 'array':
            return self._arrays[rest[0]]
        if tag == 'numpy_random':
            made = np.random.RandomState()
            made.set_state(self.value(rest[0], None))
            return made
        if tag == 'numpy_generator':
            state = self.value(rest[0], None)
            if state['bit_generator'] not in _BIT_GENERATORS:
                raise ValueError(f'there is no bit generator {state["bit_generator"]!r}')
            made = np.random.Generator(getattr(np.random, state['bit_generator'])())
            made.bit_generator.state = state
            return made
        if tag == 'python_random':
            made = random.Random()
            made.setstate(self.value(rest[0], None))
            return made
        if tag in ('object', 'named'):
            name, attributes = rest
            if _name_of(type(built)) != name:
                raise ValueError(f'{_name_of(type(built))} is where {name} was')
            if tag == 'named':
                return type(built)(*(self.value(item, old) for item, old in zip(attributes, built, strict=True)))
            self._seen[index] = built
            old = dict(vars(built))
            new = {key: self.value(item, old.get(key)) for key, item in attributes}
            vars(built).clear()
            vars(built).update(new)
            return built
        raise ValueError(f'{tag!r} is unknown')


def _constant_name(value: Any) -> str:
    if isinstance(value, dm_env.specs.Array):
        return repr(value)
    return f'{getattr(value, "__module__", None)}.{getattr(value, "__qualname__", value.__name__)}'

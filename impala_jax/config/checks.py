"""Checks of configuration values."""

from __future__ import annotations

import difflib
import importlib
import itertools
from collections.abc import Callable, Iterable
from typing import Any


class ConfigError(Exception):
    """An invalid value; the message names the field, the value and the remedy, in one line."""


def closest(name: str, known: Iterable[str], prefix: str = '', usable: Callable[[str], bool] = lambda _: True) -> str:
    """Returns 'did you mean ...?' with at most three similar names, or '' if there are none.

    Args:
      name: Name to compare.
      known: Names to choose from.
      prefix: Prefix of each suggested name in the message.
      usable: Function that decides whether a name may be suggested; called for the ten most similar names only.
    """
    known = list(known)
    for cutoff in (0.4, 0.0):
        near = filter(usable, difflib.get_close_matches(name, known, n=10, cutoff=cutoff))
        close = [repr(prefix + other) for other in itertools.islice(near, 3)]
        if close:
            return f'did you mean {" or ".join(close)}?'
    return ''


def split_name(field: str, path: str, form: str) -> tuple[str, str]:
    """Splits the path of user code into its module and the name within the module.

    Args:
      field: Name of the configuration field, for the message.
      path: Value of that field.
      form: Expected form of the value, for the message.

    Raises:
      ConfigError: If one of the two is missing, or the module is relative.
    """
    module, _, name = path.partition(':')
    if not module or module.startswith('.') or not name:
        raise ConfigError(f'{field} {path!r} is not {form}; give both names, with an absolute module')
    return module, name


def import_object(field: str, path: str, form: str = 'module:name') -> Any:
    """Imports the function or class `path`, module:name.

    Args:
      field: Name of the configuration field, for the message.
      path: Value of that field; the name may have parts, as in module:Class.method.
      form: Expected form of the value, for the message.

    Raises:
      ConfigError: If `path` has another form, the module cannot be imported, or it has no such function or class.
    """
    module_name, name = split_name(field, path, form)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f'{field} {path!r}: cannot import {module_name!r} ({error}); is its folder on PYTHONPATH?'
        ) from error
    found: Any = module
    for part in name.split('.'):
        found = getattr(found, part, None)
    if not callable(found):
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith('_')]
        raise ConfigError(
            f'{field} {path!r}: module {module_name!r} has no function or class {name!r}; {closest(name, public)}'
        )
    return found


def require(condition: bool, message: str) -> None:
    """Raises ConfigError with `message` unless `condition` is true."""
    if not condition:
        raise ConfigError(message)


def require_positive(owner: str, **values: float) -> None:
    """Raises ConfigError unless all fields of `owner` in `values` are positive."""
    for name, value in values.items():
        require(value > 0, f'{owner}.{name} must be positive, got {value}')

"""Refusals of values that cannot work."""

from __future__ import annotations

import difflib
import importlib
import itertools
from collections.abc import Callable, Iterable
from typing import Any


class ConfigError(Exception):
    """A value that cannot work: the message names the field, the value and the remedy, in one line."""


def closest(name: str, known: Iterable[str], prefix: str = '', usable: Callable[[str], bool] = lambda _: True) -> str:
    """'did you mean ...?' with the names in `known` nearest to `name`, at most three; '' where there are none.

    Args:
      prefix: What stands before a name in the message.
      usable: Whether a name is worth suggesting; asked of the nearest ten only.
    """
    known = list(known)
    for cutoff in (0.4, 0.0):
        near = filter(usable, difflib.get_close_matches(name, known, n=10, cutoff=cutoff))
        close = [repr(prefix + other) for other in itertools.islice(near, 3)]
        if close:
            return f'did you mean {" or ".join(close)}?'
    return ''


def split_name(field: str, path: str, form: str) -> tuple[str, str]:
    """The module and the name within it of the user's own code.

    Args:
      field: The field of a configuration that names it.
      path: The value of that field.
      form: What it should look like, for the message.

    Raises:
      ConfigError: one of the two is missing, or the module is relative.
    """
    module, _, name = path.partition(':')
    if not module or module.startswith('.') or not name:
        raise ConfigError(f'{field} {path!r} is not {form}; give both names, the module absolute')
    return module, name


def import_object(field: str, path: str) -> Any:
    """What `path`, module:name, stands for in the field of a configuration.

    Raises:
      ConfigError: it is not such a name, or cannot be imported.
    """
    module, name = split_name(field, path, 'module:name')
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f'{field} {path!r} cannot be imported: {error}') from error


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def require_positive(owner: str, **values: float) -> None:
    for name, value in values.items():
        require(value > 0, f'{owner}.{name} must be positive, got {value}')

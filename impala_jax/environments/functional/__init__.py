"""Environments of pure JAX functions, by name. They run inside a compiled program, or as a vector on the CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable

from impala_jax.config import ConfigError, closest
from impala_jax.config.checks import import_object
from impala_jax.environments.functional import gymnax_adapter, minatar, minisuite
from impala_jax.environments.functional.base import Arrival, FunctionalEnvironment, Task
from impala_jax.environments.functional.cartpole import CartPole
from impala_jax.environments.functional.catch import Catch
from impala_jax.environments.functional.delayed_bandit import DelayedBandit
from impala_jax.environments.functional.gymnax_adapter import GymnaxTask

__all__ = ['PREFIX', 'TASKS', 'Arrival', 'FunctionalEnvironment', 'GymnaxTask', 'Task', 'task']

PREFIX = 'jax/'
"""What the names of these environments begin with, except for those of gymnax."""
_GYMNAX = 'gymnax/'
TASKS: dict[str, Callable[[], Task]] = {
    'cartpole': CartPole,
    'catch': Catch,
    'catch_memory': functools.partial(Catch, memory=True),
    'delayed_bandit': DelayedBandit,
    **{f'minatar/{name}': functools.partial(minatar.MinAtar, game()) for name, game in minatar.GAMES.items()},
    **{f'minisuite/{name}': make for name, make in minisuite.TASKS.items()},
}
"""Functions that build a task, by the name after `PREFIX`."""


def task(name: str) -> Task:
    """Builds the task of an environment.

    Args:
      name: `jax/` and a key of `TASKS`; `jax/` and `module:function`, a function without arguments that returns a
        `Task`; or `gymnax/` and a name that gymnax knows.

    Raises:
      ConfigError: The name is unknown, the function does not return a task, or gymnax is missing or cannot build the
        environment.
    """
    if name.startswith(_GYMNAX):
        return gymnax_adapter.make(name.removeprefix(_GYMNAX))
    own = name.removeprefix(PREFIX)
    if own in TASKS:
        return TASKS[own]()
    if ':' not in own:
        names = [f'{PREFIX}{known}' for known in TASKS]
        raise ConfigError(
            f'unknown environment.name {name!r}; {closest(name, names)} (or a function of your own, '
            f'{PREFIX}module:function)'
        )
    made = import_object('environment.name', own, 'module:function')()
    missing = [part for part in ('spec', 'reset', 'step') if not hasattr(made, part)]
    if missing:
        raise ConfigError(
            f'environment {name!r} is a {type(made).__name__} without {" and ".join(missing)}; return a task of pure '
            'functions (docs/environments.md)'
        )
    return made

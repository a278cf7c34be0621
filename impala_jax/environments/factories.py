"""From a name in the configuration to a function that builds a dm_env environment from a seed."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import dm_env

from impala_jax.config import ConfigError, EnvironmentConfig, closest
from impala_jax.environments import minisuite, suites
from impala_jax.environments.catch import Catch
from impala_jax.environments.delayed_bandit import DelayedBandit

Factory = Callable[[int], dm_env.Environment]

BUILT_IN: dict[str, Callable[..., dm_env.Environment]] = {
    'catch': Catch,
    'catch_memory': functools.partial(Catch, memory=True),
    'delayed_bandit': DelayedBandit,
    **{f'minisuite/{name}': builder for name, builder in minisuite.TASKS.items()},
}


def environment_factory(config: EnvironmentConfig, evaluation: bool = False) -> Factory:
    """The factory that `config.name` means; not for Atari, which comes as a vector.

    Raises:
      ConfigError: it means nothing, or something is not installed.
    """
    name = config.name
    if name in BUILT_IN:
        builder = BUILT_IN[name]
        return lambda seed: builder(seed=seed)
    if name.startswith('dmlab/'):
        from impala_jax.environments import dmlab

        return dmlab.factory(config, evaluation)
    if name.startswith('bsuite/'):
        return _bsuite(name.removeprefix('bsuite/'))
    if name.startswith('gymnasium/'):
        return _gymnasium(name.removeprefix('gymnasium/'), evaluation)
    if ':' in name:
        return _from_module(name)
    raise ConfigError(
        f'unknown environment.name {name!r}; {closest(name, _names())} '
        '(or dmlab/<level>, bsuite/<id>, gymnasium/<id>, or a factory module:function)'
    )


def _names() -> list[str]:
    names = [*BUILT_IN, *suites.SUITES]
    if importlib.util.find_spec('ale_py') and importlib.util.find_spec('gymnasium'):
        from impala_jax.environments.atari import games

        names += [f'atari/{game}' for game in games()]
    return names


def _from_module(name: str) -> Factory:
    module_name, _, function_name = name.partition(':')
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f'environment.name {name!r}: cannot import {module_name!r} ({error}); is its folder on PYTHONPATH?'
        ) from error
    function: Any = module
    for part in function_name.split('.'):
        function = getattr(function, part, None)
    if not callable(function):
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith('_')]
        raise ConfigError(
            f'environment.name {name!r}: module {module_name!r} has no function {function_name!r}; '
            f'{closest(function_name, public)}'
        )

    def build(seed: int) -> dm_env.Environment:
        return as_dm_env(function(seed=seed), seed, name)

    return build


def as_dm_env(environment: Any, seed: int, name: str) -> dm_env.Environment:
    """`environment` itself, or a gymnasium.Env adapted.

    Raises:
      ConfigError: it is neither.
    """
    if isinstance(environment, dm_env.Environment):
        return environment
    if importlib.util.find_spec('gymnasium'):
        import gymnasium

        from impala_jax.environments.gymnasium_adapter import GymnasiumAdapter

        if isinstance(environment, gymnasium.Env):
            return GymnasiumAdapter(environment, seed, name)
    raise ConfigError(
        f'environment {name!r} is a {type(environment).__name__}, neither a dm_env.Environment nor a gymnasium.Env'
    )


def _gymnasium(gymnasium_id: str, evaluation: bool) -> Factory:
    try:
        import gymnasium
    except ImportError as error:
        raise ConfigError(f'gymnasium/{gymnasium_id} needs gymnasium: pip install gymnasium ({error})') from error
    try:
        gymnasium.spec(gymnasium_id)
    except gymnasium.error.Error as error:
        raise ConfigError(
            f'unknown gymnasium environment {gymnasium_id!r}; {closest(gymnasium_id, gymnasium.registry)}'
        ) from error

    def build(seed: int) -> dm_env.Environment:
        environment = None
        if evaluation:  # Only videos need pictures, and an environment may pay for them at every step.
            try:
                environment = gymnasium.make(gymnasium_id, render_mode='rgb_array')
            except Exception:
                environment = None  # It has no pictures; whether it works at all shows in the next line.
        if environment is None:
            environment = gymnasium.make(gymnasium_id)
        return as_dm_env(environment, seed, f'gymnasium/{gymnasium_id}')

    return build


def _bsuite(bsuite_id: str) -> Factory:
    try:
        from bsuite import bsuite, sweep  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(f'bsuite/{bsuite_id} needs bsuite: pip install bsuite ({error})') from error
    if bsuite_id not in sweep.SWEEP:
        raise ConfigError(f'unknown bsuite id {bsuite_id!r}; {closest(bsuite_id, sweep.SWEEP)}')
    load = bsuite.EXPERIMENT_NAME_TO_ENVIRONMENT[bsuite.unpack_bsuite_id(bsuite_id)[0]]
    settings = dict(sweep.SETTINGS[bsuite_id])
    # The id fixes the task (`mapping_seed`), but environments of one task must not all draw the same numbers.
    seeded = 'seed' in inspect.signature(load).parameters
    return lambda seed: load(**{**settings, 'seed': seed}) if seeded else load(**settings)

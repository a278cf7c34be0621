"""Environment factories: functions from a seed to a dm_env environment, by the name in the configuration."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import dm_env

from impala_jax.config import ConfigError, EnvironmentConfig, closest
from impala_jax.config.checks import import_object
from impala_jax.environments import base, minisuite, suites
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
    """Returns the factory that `config.name` refers to; not for Atari, which is built as a vector.

    Args:
      config: The environment's name and settings.
      evaluation: Whether the environment is for evaluation, where test levels and rendering are available.

    Raises:
      ConfigError: The name is unknown, or a package is missing.
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
        f'unknown environment.name {name!r}; {closest(name, _names(), usable=_is_usable)} '
        '(or dmlab/<level>, bsuite/<id>, gymnasium/<id>, jax/<task>, gymnax/<id>, or a factory module:function)'
    )


def _names() -> list[str]:
    names = [*BUILT_IN, *suites.SUITES]
    if importlib.util.find_spec('gymnasium'):
        names += _gymnasium_names()
        if importlib.util.find_spec('ale_py'):
            from impala_jax.environments.atari import games

            names += [f'atari/{game}' for game in games()]
    return names


def _gymnasium_names() -> list[str]:
    """Lists registered environments, each with the package that a new process must import first."""
    import gymnasium

    names = []
    for gymnasium_id, spec in gymnasium.registry.items():
        entry = spec.entry_point if isinstance(spec.entry_point, str) else getattr(spec.entry_point, '__module__', '')
        package = entry.partition(':')[0].partition('.')[0]
        names.append(f'gymnasium/{gymnasium_id}' if package == 'gymnasium' else f'gymnasium/{package}:{gymnasium_id}')
    return names


def _is_usable(name: str) -> bool:
    """Whether the environment of a name from `_names` can be built on this machine."""
    if not name.startswith('gymnasium/'):
        return True
    import gymnasium

    from impala_jax.environments.gymnasium_adapter import GymnasiumAdapter

    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            GymnasiumAdapter(gymnasium.make(name.removeprefix('gymnasium/')), 0, name).close()
        except Exception:  # An environment that cannot be built, for any reason, is not suggested.
            return False
    return True


def _from_module(name: str) -> Factory:
    function = import_object('environment.name', name, 'module:function')

    def build(seed: int) -> dm_env.Environment:
        return as_dm_env(function(seed=seed), seed, name)

    return build


def as_dm_env(environment: Any, seed: int, name: str, no_pictures: str = '') -> dm_env.Environment:
    """Returns a dm_env environment unchanged, and wraps a gymnasium.Env in a `GymnasiumAdapter`.

    Args:
      environment: A dm_env.Environment or a gymnasium.Env.
      seed: Seed for the first reset of a gymnasium.Env.
      name: Name of the environment, for error messages.
      no_pictures: Reason why the environment could not be built with rendering.

    Raises:
      ConfigError: The environment has another type.
    """
    if isinstance(environment, dm_env.Environment):
        return environment
    if importlib.util.find_spec('gymnasium'):
        import gymnasium

        from impala_jax.environments.gymnasium_adapter import GymnasiumAdapter

        if isinstance(environment, gymnasium.Env):
            return GymnasiumAdapter(environment, seed, name, no_pictures)
    raise ConfigError(
        f'environment {name!r} is a {type(environment).__name__}, neither a dm_env.Environment nor a gymnasium.Env'
    )


def _gymnasium(gymnasium_id: str, evaluation: bool) -> Factory:
    name = f'gymnasium/{gymnasium_id}'
    try:
        import gymnasium
    except ImportError as error:
        raise ConfigError(f'{name} needs gymnasium: pip install gymnasium ({error})') from error
    module, _, short = gymnasium_id.rpartition(':')
    if module:
        try:
            importlib.import_module(module)
        except Exception as error:  # Third-party code can raise anything.
            raise ConfigError(
                f'environment.name {name!r}: cannot import {module!r} ({base.one_line(error)}); install its package, '
                'or add its folder to PYTHONPATH'
            ) from error
    if not _is_registered(short):
        suggestion = closest(name, _gymnasium_names(), usable=_is_usable)
        hint = '' if module else '(an id that another package registers is gymnasium/<module>:<id>)'
        reason = f'unknown gymnasium environment {name!r}'
        raise ConfigError(' '.join(filter(None, [f'{reason};' if suggestion else reason, suggestion, hint])))

    def build(seed: int) -> dm_env.Environment:
        no_pictures = ''
        if evaluation:  # Only videos need rendering, and it may slow down every step.
            try:
                return as_dm_env(gymnasium.make(gymnasium_id, render_mode='rgb_array'), seed, name)
            except Exception as error:  # It cannot render; the next line finds out whether it works at all.
                no_pictures = base.one_line(error)
        return as_dm_env(gymnasium.make(gymnasium_id), seed, name, no_pictures)

    return build


def _is_registered(gymnasium_id: str) -> bool:
    """Whether `gymnasium.make` accepts an id; without a version it means the latest one."""
    import gymnasium
    from gymnasium.envs.registration import find_highest_version, parse_env_id

    if gymnasium_id in gymnasium.registry:
        return True
    try:
        namespace, name, version = parse_env_id(gymnasium_id)
    except gymnasium.error.Error:
        return False
    return version is None and find_highest_version(namespace, name) is not None


def _bsuite(bsuite_id: str) -> Factory:
    try:
        from bsuite import bsuite, sweep  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(f'bsuite/{bsuite_id} needs bsuite: pip install bsuite ({error})') from error
    if bsuite_id not in sweep.SWEEP:
        raise ConfigError(f'unknown bsuite id {bsuite_id!r}; {closest(bsuite_id, sweep.SWEEP, "bsuite/")}')
    load = bsuite.EXPERIMENT_NAME_TO_ENVIRONMENT[bsuite.unpack_bsuite_id(bsuite_id)[0]]
    settings = dict(sweep.SETTINGS[bsuite_id])
    # The id fixes the task (`mapping_seed`), but environments of one task must not all use the same random numbers.
    seeded = 'seed' in inspect.signature(load).parameters
    return lambda seed: load(**{**settings, 'seed': seed}) if seeded else load(**settings)

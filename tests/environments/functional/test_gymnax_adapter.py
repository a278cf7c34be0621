"""Environments of gymnax are what gymnax makes them, and every runtime can step them."""

import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from impala_jax import environments
from impala_jax.config import ActorConfig, ConfigError, EnvironmentConfig
from impala_jax.environments import functional
from impala_jax.environments.functional import FunctionalEnvironment, GymnaxTask
from impala_jax.runtimes.run import run
from impala_jax.types import FIRST, LAST, MID
from tests.helpers.configs import small

with_gymnax = pytest.mark.gymnax


@with_gymnax
@pytest.mark.parametrize(
    'name',
    ['Breakout-MinAtar', 'CartPole-v1', 'Acrobot-v1', 'UmbrellaChain-bsuite', 'FourRooms-misc', 'FrozenLake-misc'],
)
def test_a_task_takes_the_steps_of_gymnax(name):
    """Whose own `step` is given the same keys; it starts episodes itself, and keeps their last observation."""
    import gymnax

    environment, params = gymnax.make(name)
    task = functional.task(f'gymnax/{name}')
    num_values = getattr(environment.observation_space(params), 'n', None)
    shown = lambda x: x if num_values is None else jax.nn.one_hot(x, num_values)  # noqa: E731

    def step(other, rows):
        action, key = rows
        step_key, _ = jax.random.split(key)
        own = task.step(other, action, step_key)
        _, other, reward, terminated, truncated, info = environment.step(key, other, action, params)
        return other, (own, (other, (shown(info['final_observation']), reward, terminated, truncated)))

    first, state = environment.reset_env(jax.random.PRNGKey(0), params)
    own_state, own_first = task.reset(jax.random.PRNGKey(0))
    jax.tree.map(np.testing.assert_array_equal, (own_state, own_first), (state, shown(first)))
    actions = np.random.RandomState(0).randint(0, task.spec.num_actions, 1_000)
    keys = jax.random.split(jax.random.PRNGKey(1), 1_000)
    _, ((own_states, own), (states, theirs)) = jax.lax.scan(step, own_state, (jnp.int32(actions), keys))
    for own_value, value in zip(own, theirs, strict=True):
        np.testing.assert_allclose(own_value, value, rtol=1e-5, atol=1e-6)
    continues = ~(own.terminated | own.truncated)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x[continues], y[continues], rtol=1e-5, atol=1e-6), own_states, states
    )
    assert not continues.all() and own.observation.dtype == task.spec.observation.dtype


@with_gymnax
def test_a_time_limit_truncates():
    vector = environments.make(EnvironmentConfig('gymnax/MountainCar-v0'), 2, seed=0)
    assert vector.reset().step_type.tolist() == [FIRST] * 2
    for t in range(1, 202):
        timestep, info = vector.step(np.ones(2, np.int32))
        assert timestep.step_type.tolist() == [{200: LAST, 201: FIRST}.get(t, MID)] * 2
        assert timestep.discount.tolist() == [1.0] * 2
        assert info.episode_return.tolist() == [-200.0 if t == 200 else 0.0] * 2


@with_gymnax
def test_each_environment_can_be_used_or_is_refused():
    import gymnax

    used, refused = [], []
    for name in gymnax.registered_envs:
        if name == 'MNISTBandit-bsuite':  # Downloads its data.
            continue
        try:
            FunctionalEnvironment(functional.task(f'gymnax/{name}'))
            used.append(name)
        except ConfigError as error:
            assert 'only discrete ones are supported' in str(error) and '\n' not in str(error)
            refused.append(name)
    assert len(used) > 15 and {'Pendulum-v1', 'Reacher-misc'} <= set(refused)


@with_gymnax
@pytest.mark.parametrize('runtime', ['lockstep', 'threads', 'device'])
def test_a_run(tmp_path, runtime):
    settings = small(environment=EnvironmentConfig('gymnax/Catch-bsuite'), actor=ActorConfig(num_actors=1, num_envs=4))
    assert run(settings, tmp_path, runtime).frames == 400


@with_gymnax
def test_an_unknown_name_is_refused():
    with pytest.raises(ConfigError, match=r"unknown .* 'gymnax/Breakout'; did you mean 'gymnax/Breakout-MinAtar'"):
        environments.spec(EnvironmentConfig('gymnax/Breakout'))


@with_gymnax
def test_the_package_is_imported_when_it_is_needed():
    program = 'import sys, impala_jax.environments.functional; sys.exit("gymnax" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', program], timeout=120).returncode == 0


def refusal(monkeypatch, package):
    monkeypatch.setitem(sys.modules, 'gymnax', package)
    with pytest.raises(ConfigError) as error:
        environments.spec(EnvironmentConfig('gymnax/Breakout-MinAtar'))
    assert '\n' not in str(error.value)
    return str(error.value)


def test_a_missing_package_is_named_with_its_installation(monkeypatch):
    message = refusal(monkeypatch, None)
    assert (
        "'gymnax/Breakout-MinAtar' needs gymnax: pip install gymnasium seaborn six && pip install --no-deps" in message
    )


def test_an_environment_that_cannot_be_built_is_refused(monkeypatch):
    def make(_):
        raise OSError('the data\ncannot be downloaded')

    package = types.SimpleNamespace(registered_envs=['Breakout-MinAtar'], make=make)
    assert 'OSError: the data cannot be downloaded' in refusal(monkeypatch, package)


def test_an_old_version_is_refused():
    """One whose environments tell only that an episode is over."""
    with pytest.raises(ConfigError, match="'gymnax': this gymnax is older than 1.0; pip install"):
        GymnaxTask(types.SimpleNamespace(step_env=None, reset_env=None, default_params=None))

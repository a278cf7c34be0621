"""Environments in JAX: they are those in NumPy, number by number, and every runtime can step them."""

import dataclasses
from typing import NamedTuple

import dm_env
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from impala_jax import environments
from impala_jax.config import ActorConfig, ConfigError, EnvironmentConfig, OptimizerConfig
from impala_jax.environments import EnvironmentFailure, functional
from impala_jax.environments.factories import BUILT_IN
from impala_jax.environments.functional import Arrival, FunctionalEnvironment
from impala_jax.runtimes.run import run
from impala_jax.types import FIRST, LAST, ArraySpec, EnvironmentSpec
from tests.helpers.configs import small
from tests.helpers.runs import assert_same, learned


class Drawn:
    """Random numbers of an environment in NumPy, as the one in JAX has drawn them."""

    sign = 1.0

    def choice(self, _):
        return self.sign

    def randint(self, _):
        return 0


def begin(twin, state):
    """Starts an episode of the environment in NumPy where the one in JAX is; returns its observation."""
    own = getattr(twin, '_environment', twin)  # Tasks of the minisuite wrap one.
    own._rng = Drawn()
    own.reset()
    values = [np.asarray(x).tolist() for x in state]
    names = {
        'CatchState': ['_ball_row', '_ball_column', '_paddle'],
        'BanditState': ['_context', None, '_time'],
        'CorridorState': ['_agent', '_objects', '_wanted', '_time'],
    }[type(state).__name__]
    for name, value in zip(names, values, strict=True):
        if name is not None:
            setattr(own, name, tuple(value) if isinstance(value, list) else value)
    observation = own._observation()
    return observation if own is twin else twin._convert(dm_env.restart(observation)).observation


@pytest.mark.parametrize('name', [name for name in functional.TASKS if name in BUILT_IN])
def test_twins_agree_in_every_number(name):
    """With the same actions from the same start, over some dozens of episodes."""
    assert environments.spec(EnvironmentConfig(f'jax/{name}')) == environments.spec(EnvironmentConfig(name))
    twin = BUILT_IN[name](seed=0)
    environment = FunctionalEnvironment(functional.task(f'jax/{name}'))
    state, step = environment.init(jax.random.PRNGKey(1)), jax.jit(environment.step)
    actions = np.random.RandomState(0).randint(0, environment.spec.num_actions, 600)
    episode_return, episodes, starts = 0.0, 0, set()
    for action in actions.tolist():
        was_over = bool(state.over)
        state, timestep, info = jax.device_get(step(state, action))
        if was_over:
            observation = begin(twin, state.task)
            expected = (FIRST, 0.0, 1.0, observation, 0)
            episode_return = 0.0
            starts.add(str(jax.tree.map(np.ndarray.tolist, timestep.observation)))
        else:
            Drawn.sign = float(np.sign(timestep.reward)) or 1.0
            other = twin.step(action)
            expected = (int(other.step_type), other.reward, other.discount, other.observation, action)
            episode_return += other.reward
        for own_value, value in zip(timestep, expected, strict=True):
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), own_value, value)
        ended = timestep.step_type == LAST
        episodes += ended
        assert info.episode_ended == ended
        np.testing.assert_allclose(info.episode_return, episode_return if ended else 0.0, rtol=1e-5)
    assert episodes > 20 and len(starts) > 1


def test_a_vector_is_its_environments(tmp_path):
    """Each has its own episodes, which depend on the seed only."""
    make = lambda seed: environments.make(EnvironmentConfig('jax/catch'), 3, seed, max_episode_steps=4)  # noqa: E731
    vector, same, other = make(0), make(0), make(1)
    first, other_first = vector.reset(), other.reset()
    same.reset()
    assert first.step_type.tolist() == [FIRST] * 3 and first.reward.dtype == np.float32
    rng = np.random.RandomState(0)
    balls = [first.observation[:, 0].argmax(1).tolist(), other_first.observation[:, 0].argmax(1).tolist()]
    for i in range(1, 40):
        actions = rng.randint(0, 3, 3).astype(np.int32)
        timestep, info = vector.step(actions)
        jax.tree.map(np.testing.assert_array_equal, (timestep, info), same.step(actions))
        assert timestep.step_type.tolist() == [{0: FIRST, 4: LAST}.get(i % 5, 1)] * 3  # Truncated after four steps.
        assert timestep.discount.tolist() == [1.0] * 3
        if i % 5 == 0:
            balls.append(timestep.observation[:, 0].argmax(1).tolist())
    assert len({tuple(columns) for columns in balls}) > 4
    with pytest.raises(ValueError, match=r'actions must lie in \[0, 3\)'):
        vector.step(np.array([0, 0, 3], np.int32))
    with pytest.raises(ValueError, match='another version'):
        vector.set_state(environments.make(EnvironmentConfig('jax/catch'), 2, 0).get_state())


def test_a_run_resumes_bit_for_bit_in_lockstep_and_goes_on_in_threads(tmp_path):
    settings = small(
        environment=EnvironmentConfig('jax/catch'),
        actor=ActorConfig(num_actors=2, num_envs=2),
        optimizer=OptimizerConfig(schedule='constant'),
    )
    run(settings, tmp_path / 'whole', 'lockstep')
    for frames in (200, 400):
        run(dataclasses.replace(settings, total_frames=frames), tmp_path / 'parts', 'lockstep')
    assert_same(learned(tmp_path / 'whole'), learned(tmp_path / 'parts'))
    assert run(dataclasses.replace(settings, total_frames=800), tmp_path / 'parts', 'threads').frames == 800


class Mine(NamedTuple):
    """A task of a user, with one thing that may be wrong."""

    reward: object = 0.0
    observation: object = 0.0
    state: object = 0

    @property
    def spec(self):
        return EnvironmentSpec(ArraySpec((), np.dtype(np.float32)), 2)

    def reset(self, key):
        return jnp.int32(0), jnp.float32(0)

    def step(self, state, action, key):
        return jnp.asarray(self.state, jnp.int32), Arrival(
            jnp.asarray(self.observation, jnp.float32), jnp.asarray(self.reward), jnp.bool_(False)
        )


def nan():
    return Mine(reward=jnp.float32(jnp.nan))


@pytest.mark.parametrize(
    ('task', 'message'),
    [
        (Mine(observation=np.zeros(2)), r'step returns the observation float32 \[2\], and its spec is float32 \[\]'),
        (Mine(reward=np.int32(1)), r'step returns reward, terminated, truncated as int32 \[\], bool \[\], bool \[\]'),
        (Mine(state=np.zeros(3)), r'step returns the state int32 \[3\] for the state int32 \[\]'),
    ],
)
def test_a_task_that_breaks_its_contract_is_refused(task, message):
    with pytest.raises(ConfigError, match=f"environment 'mine': {message}") as error:
        FunctionalEnvironment(task, name='mine')
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('jax/cach', "unknown environment.name 'jax/cach'; did you mean 'jax/catch'"),
        ('jax/tests.helpers.factories:flaky', 'must be|flaky'),
        ('jax/builtins:list', 'is a list without spec and reset and step'),
    ],
)
def test_names_that_cannot_be_are_refused(name, message):
    with pytest.raises((ConfigError, TypeError), match=message):
        environments.spec(EnvironmentConfig(name))


def test_a_value_that_is_not_finite_ends_the_run():
    vector = environments.make(EnvironmentConfig(f'jax/{__name__}:nan'), 2, 0)
    vector.reset()
    with pytest.raises(
        EnvironmentFailure, match='environment 0 of .* a value of the reward that is not finite, at step 1'
    ):
        vector.step(np.zeros(2, np.int32))

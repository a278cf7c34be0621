"""What every vector of environments keeps to."""

import importlib.util
import pickle

import jax
import numpy as np
import pytest

from impala_jax import environments
from impala_jax.config import ConfigError, EnvironmentConfig
from impala_jax.environments.factories import environment_factory
from impala_jax.environments.serial import SerialVectorEnvironment
from impala_jax.types import FIRST, LAST, MID, ArraySpec
from tests.helpers import factories

N = 3
CATCH = EnvironmentConfig('catch')
atari = pytest.mark.atari
IMPLEMENTATIONS = {
    'serial': (CATCH, {}),
    'processes': (EnvironmentConfig('catch', processes=2), {}),
    'memory': (EnvironmentConfig('catch_memory'), {}),
    'suite': (EnvironmentConfig('minisuite'), {'task_ids': np.array([1, 3, 1])}),
    'gymnasium': (EnvironmentConfig('gymnasium/CartPole-v1'), {}),
    'game': (EnvironmentConfig('atari/breakout'), {'evaluation': True}),
    'machado': (EnvironmentConfig('atari/breakout', preset='machado'), {}),
}
STEPS = {'game': 250, 'machado': 400}


@pytest.fixture(params=[pytest.param(k, marks=atari if k in STEPS else ()) for k in IMPLEMENTATIONS])
def implementation(request):
    return request.param


@pytest.fixture
def make():
    made = []

    def make(implementation, seed=3, num_envs=N):
        config, kwargs = IMPLEMENTATIONS[implementation]
        if implementation == 'gymnasium':  # would start processes, which another one tests
            made.append(SerialVectorEnvironment(environment_factory(config), num_envs, seed, name=config.name))
        else:
            made.append(environments.make(config, num_envs, seed, **kwargs))
        return made[-1]

    yield make
    for environment in made:
        environment.close()


def random_actions(implementation, num_actions):
    return np.random.RandomState(0).randint(num_actions, size=(STEPS.get(implementation, 60), N)).astype(np.int32)


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def different(one, other):
    return not all(jax.tree.leaves(jax.tree.map(np.array_equal, one, other)))


def assert_spec(environment, timestep):
    def check(spec, value):
        assert isinstance(value, np.ndarray)
        assert value.shape == (N, *spec.shape)
        assert value.dtype == spec.dtype

    jax.tree.map(
        check, environment.spec.observation, timestep.observation, is_leaf=lambda leaf: isinstance(leaf, ArraySpec)
    )
    for value, dtype in zip(
        (timestep.step_type, timestep.reward, timestep.discount, timestep.previous_action),
        (np.int32, np.float32, np.float32, np.int32),
        strict=True,
    ):
        assert value.shape == (N,)
        assert value.dtype == dtype


def test_every_implementation_keeps_the_contract(make, implementation):
    environment = make(implementation)
    assert environment.num_envs == N
    assert environments.spec(IMPLEMENTATIONS[implementation][0]) == environment.spec
    timestep = environment.reset()
    assert_spec(environment, timestep)
    assert (timestep.step_type == FIRST).all()
    assert (timestep.previous_action == 0).all()
    assert (timestep.reward == 0).all()
    assert (timestep.discount == 1).all()
    returns, episodes = np.zeros(N), 0
    for actions in random_actions(implementation, environment.spec.num_actions):
        before, kept = timestep, jax.tree.map(np.copy, timestep)
        timestep, info = environment.step(actions)
        assert_equal(before, kept)  # Nothing returned is written to later.
        assert_spec(environment, timestep)
        first, last = timestep.step_type == FIRST, timestep.step_type == LAST
        assert (first == (before.step_type == LAST)).all()
        assert np.isin(timestep.step_type, [FIRST, MID, LAST]).all()
        np.testing.assert_array_equal(timestep.previous_action, np.where(first, 0, actions))
        assert (timestep.reward[first] == 0).all()
        assert (timestep.discount[~last] == 1).all()
        assert np.isin(timestep.discount[last], [0, 1]).all()
        returns = np.where(first, 0, returns) + timestep.reward
        assert info.episode_return.dtype == np.float32
        np.testing.assert_array_equal(info.episode_return, np.where(last, returns, 0).astype(np.float32))
        assert info.episode_ended.dtype == bool
        np.testing.assert_array_equal(info.episode_ended, last)
        assert info.restarts.dtype == np.int32
        assert info.restarts.sum() == 0
        episodes += last.sum()
    assert episodes


def test_the_same_seed_gives_the_same_run_whatever_the_action_after_last(make, implementation):
    one, other, another = make(implementation), make(implementation), make(implementation, seed=4)
    timestep = one.reset()
    assert_equal(timestep, other.reset())
    differs = different(another.reset().observation, timestep.observation)
    ignored = 0
    for actions in random_actions(implementation, one.spec.num_actions):
        last = timestep.step_type == LAST
        ignored += last.sum()
        timestep, info = one.step(actions)
        assert_equal((timestep, info), other.step(np.where(last, (actions + 1) % one.spec.num_actions, actions)))
        differs |= different(another.step(actions)[0].observation, timestep.observation)
    assert ignored
    assert differs


def test_environments_of_a_vector_differ(make, implementation):
    environment = make(implementation)
    environment.reset()
    differ = False
    for actions in random_actions(implementation, environment.spec.num_actions):
        observation = environment.step(np.full(N, actions[0]))[0].observation
        differ |= different(*(jax.tree.map(lambda x, i=i: x[i], observation) for i in (0, 1)))
    assert differ


def test_reset_begins_anew_everywhere(make, implementation):
    environment = make(implementation)
    environment.reset()
    for actions in random_actions(implementation, environment.spec.num_actions)[:5]:
        environment.step(actions)
    timestep = environment.reset()
    assert (timestep.step_type == FIRST).all()
    timestep, _ = environment.step(np.zeros(N, np.int32))
    assert (timestep.step_type == MID).all()


def test_wrong_actions_are_an_error(make, implementation):
    environment = make(implementation)
    environment.reset()
    for actions in [0, 0, 99], [0, -1, 0], [0, 0]:
        with pytest.raises(ValueError, match='action'):
            environment.step(np.array(actions, np.int32))


@pytest.mark.parametrize('steps', [0, 9, 14])  # Catch's episodes last nine steps; 9 is before an auto-reset.
@pytest.mark.parametrize('saved', ['serial', 'processes', 'gymnasium', 'suite'])
def test_a_restored_state_goes_on_bit_identically(make, saved, steps):
    environment = make(saved)
    actions = random_actions(saved, environment.spec.num_actions)
    environment.reset()
    for action in actions[:steps]:
        environment.step(action)
    state = environment.get_state()
    after = [environment.step(action) for action in actions[steps:]]

    # However many processes they are spread over.
    for restored in [saved] if saved in ('gymnasium', 'suite') else ['serial', 'processes']:
        other = make(restored, seed=99)
        other.reset()
        other.step(actions[0])
        other.set_state(state)
        assert_equal(after, [other.step(action) for action in actions[steps:]])
    environment.set_state(state)
    assert_equal(after, [environment.step(action) for action in actions[steps:]])


def test_a_restored_state_remembers_that_an_episode_is_over():
    environment = SerialVectorEnvironment(factories.scripted, N, 0)
    environment.reset()
    environment.step([factories.GO_ON, factories.TERMINATE, factories.GO_ON])
    other = SerialVectorEnvironment(factories.scripted, N, 1)
    other.reset()
    other.set_state(environment.get_state())
    timestep, info = other.step([factories.TERMINATE] * N)
    np.testing.assert_array_equal(timestep.step_type, [LAST, FIRST, LAST])
    np.testing.assert_array_equal(info.episode_return, [1 + 2, 0, 1 + 2])


def test_a_state_of_another_number_of_environments_is_an_error(make):
    for implementation in ('serial', 'processes'):
        state = make(implementation, num_envs=2).get_state()
        with pytest.raises(ConfigError, match='has 2 environments, but there are 3'):
            make(implementation).set_state(state)


@pytest.mark.parametrize('processes', [0, 2])
def test_what_cannot_be_saved_says_so(processes):
    environment = make_scripted('tests.helpers.factories:unpicklable', processes or 1)
    try:
        environment.reset()
        with pytest.raises(NotImplementedError, match="'tests.helpers.factories:unpicklable' cannot be saved"):
            environment.get_state()
        timestep, _ = environment.step(np.zeros(N, np.int32))  # and harms nothing
        assert (timestep.observation['count'] == 1).all()
    finally:
        environment.close()


def make_scripted(name='tests.helpers.factories:scripted', processes=2, **kwargs):
    return environments.make(EnvironmentConfig(name, processes=processes), N, seed=0, **kwargs)


def test_nested_observations_and_both_kinds_of_end():
    environment = make_scripted()
    try:
        spec = environment.spec.observation
        assert spec['count'] == ArraySpec((), np.dtype(np.int32))
        assert spec['pair'] == (ArraySpec((2,), np.dtype(np.float32)), ArraySpec((2,), np.dtype(np.float32)))
        assert spec['picture'] == ArraySpec((4, 6, 3), np.dtype(np.uint8))
        assert_spec(environment, environment.reset())
        go_on = np.full(N, factories.GO_ON)
        environment.step(go_on)
        timestep, info = environment.step([factories.GO_ON, factories.TERMINATE, factories.TRUNCATE])
        assert_spec(environment, timestep)
        np.testing.assert_array_equal(timestep.step_type, [MID, LAST, LAST])
        np.testing.assert_array_equal(timestep.discount, [1, 0, 1])
        np.testing.assert_array_equal(timestep.observation['count'], [2, 2, 2])
        np.testing.assert_array_equal(info.episode_return, [0, 1 + 2, 1 + 2])
        np.testing.assert_array_equal(info.episode_ended, [False, True, True])
        timestep, info = environment.step(go_on)
        np.testing.assert_array_equal(timestep.step_type, [MID, FIRST, FIRST])
        np.testing.assert_array_equal(timestep.observation['count'], [3, 0, 0])
        assert not info.episode_ended.any()
    finally:
        environment.close()


def test_every_implementation_draws_a_picture(make, implementation):
    environment = make(implementation)
    environment.reset()
    environment.step(np.zeros(N, np.int32))
    if implementation == 'gymnasium':
        with pytest.raises(NotImplementedError, match='rgb_array'):
            environment.render()
        return
    image = environment.render()
    assert image.dtype == np.uint8
    assert image.ndim == 3
    assert image.shape[-1] == 3
    assert image.min() < image.max()
    assert pickle.dumps(image)


def test_gymnasium_has_pictures_in_an_evaluation():
    environment = environments.make(EnvironmentConfig('gymnasium/CartPole-v1', processes=1), 1, 0, evaluation=True)
    try:
        environment.reset()
        if importlib.util.find_spec('pygame'):
            assert environment.render().shape == (400, 600, 3)
        else:
            with pytest.raises(NotImplementedError, match='cannot be drawn: pygame is not installed'):
                environment.render()
    finally:
        environment.close()


@pytest.mark.parametrize(
    'name, message',
    [
        ('cach', "did you mean 'catch'"),
        ('tests.helpers.factories:scriptd', "has no function or class 'scriptd'; did you mean 'scripted'"),
        ('no_such_module:make', "cannot import 'no_such_module'"),
        (':make', 'is not module:function'),
        ('.relative:make', 'is not module:function'),
        ('tests.helpers.factories:', 'is not module:function'),
        ('gymnasium/CartPol-v1', "did you mean 'gymnasium/CartPole-v1'"),
        ('gymnasium/Pendulum-v1', 'only Discrete ones are supported'),
        ('tests.helpers.factories:raises_when_built', 'cannot be built: OSError: no such level'),
        ('tests.helpers.factories:continuous', 'no plain discrete actions'),
        ('tests.helpers.factories:not_an_environment', 'is a int, neither a dm_env.Environment nor a gymnasium.Env'),
        (
            'tests.helpers.factories:different',
            "'tests.helpers.factories:different' differ: number 0 has .* number . has",
        ),
        pytest.param('atari/pongg', "did you mean 'atari/pong'", marks=atari),
        pytest.param('atari/Breakot', "did you mean 'atari/breakout'", marks=atari),
        pytest.param('atari/maze_craze', "unknown Atari game 'maze_craze'", marks=atari),
        pytest.param('breakout', "did you mean 'atari/breakout'", marks=atari),
    ],
)
def test_what_cannot_work_is_one_line(name, message):
    with pytest.raises(ConfigError, match=message) as error:
        environments.make(EnvironmentConfig(name, processes=2 if name.startswith('factories') else 0), N, 0).close()
    assert '\n' not in str(error.value)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'ale_py', None)
    with pytest.raises(ConfigError, match=r"pip install 'impala_jax\[atari\]'"):
        environments.make(EnvironmentConfig('atari/pong'), 1, 0)
    monkeypatch.setitem(__import__('sys').modules, 'bsuite', None)
    with pytest.raises(ConfigError, match='pip install bsuite'):
        environments.make(EnvironmentConfig('bsuite/catch/0'), 1, 0)

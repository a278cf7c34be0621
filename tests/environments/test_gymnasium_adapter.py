"""gymnasium.Env as dm_env.Environment."""

import dm_env
import numpy as np
import pytest

gymnasium = pytest.importorskip('gymnasium')
spaces = gymnasium.spaces

from impala_jax.build import make_agent  # noqa: E402
from impala_jax.config import ConfigError, NetworkConfig  # noqa: E402
from impala_jax.environments.base import environment_spec  # noqa: E402
from impala_jax.environments.dmlab import word_ids  # noqa: E402
from impala_jax.environments.factories import as_dm_env  # noqa: E402
from impala_jax.environments.gymnasium_adapter import GymnasiumAdapter  # noqa: E402
from impala_jax.rundir import plain_state  # noqa: E402
from impala_jax.types import ArraySpec  # noqa: E402


class Rooms(gymnasium.Env):
    """Actions 5 and 6: the episode is terminated or truncated; anything else goes on."""

    action_space = spaces.Discrete(3, start=4)
    observation_space = spaces.Dict(
        {
            'room': spaces.Discrete(4, start=1),
            'rest': spaces.Tuple([spaces.Box(0, 255, (2, 2), np.uint8), spaces.MultiBinary(3)]),
        }
    )

    def __init__(self):
        self.seeds = []

    def observe(self):
        return {'room': 3, 'rest': (np.full((2, 2), 7, np.uint8), np.array([1, 0, 1], np.int8))}

    def reset(self, *, seed=None, options=None):
        self.seeds.append(seed)
        return self.observe(), {}

    def step(self, action):
        assert action in self.action_space
        return self.observe(), np.float64(action), action == 5, action >= 5, {}


def test_steps_terminate_or_are_truncated():
    environment = as_dm_env(Rooms(), 11, 'rooms')
    assert environment.action_spec().num_values == 3
    assert environment.step(0).first()
    timestep = environment.step(0)
    assert timestep.mid()
    assert (timestep.reward, timestep.discount) == (4, 1)
    timestep = environment.step(1)  # both terminated and truncated: terminated
    assert timestep.last()
    assert (timestep.reward, timestep.discount) == (5, 0)
    timestep = environment.step(1)
    assert timestep.first()
    timestep = environment.step(2)
    assert timestep.last()
    assert (timestep.reward, timestep.discount) == (6, 1)
    assert environment.step(2).first()


def test_only_the_first_reset_is_seeded():
    rooms = Rooms()
    environment = GymnasiumAdapter(rooms, 11, 'rooms')
    for _ in range(3):
        environment.reset()
    assert rooms.seeds == [11, None, None]


def test_spaces_become_specs():
    environment = GymnasiumAdapter(Rooms(), 0, 'rooms')
    observation, spec = environment.reset().observation, environment.observation_spec()
    np.testing.assert_array_equal(observation['room'], [0, 0, 1, 0])
    assert spec['room'].shape == (4,)
    assert spec['rest'][0].dtype == np.uint8
    assert spec['rest'][1].shape == (3,)
    for part, part_spec in zip(observation['rest'], spec['rest'], strict=True):
        part_spec.validate(part)


def adapted(space, observation):
    """An environment that always shows `observation`."""
    environment = Rooms()
    environment.observation_space = space
    environment.observe = lambda: observation
    return GymnasiumAdapter(environment, 0, 'rooms')


@pytest.mark.parametrize(
    'space', [spaces.Sequence(spaces.Discrete(2)), spaces.Dict({'a': spaces.Sequence(spaces.Discrete(2))})]
)
def test_unsupported_observations_are_refused(space):
    with pytest.raises(ConfigError, match="'rooms' has observations Sequence.*ObservationWrapper"):
        adapted(space, ())


def test_a_discrete_observation_of_many_values_is_a_number():
    environment = adapted(spaces.Discrete(100_000, start=-7), 99_992)
    observation = environment.reset().observation
    assert observation == 99_999 and observation.nbytes == 4
    assert environment_spec(environment, 'rooms').observation == ArraySpec((), np.dtype(np.int32), num_values=100_000)
    for n, shape in ((1024, (1024,)), (1025, ())):
        assert environment_spec(adapted(spaces.Discrete(n), 0), 'rooms').observation.shape == shape
    with pytest.raises(ConfigError, match=r'observation is Discrete\(3000000000\), which has more values than int32'):
        adapted(spaces.Discrete(3_000_000_000), 0)


@pytest.mark.parametrize('value', [3, np.int64(3), np.array(3, np.uint8), 3.0])
def test_whole_values_of_a_discrete_space_are_taken(value):
    np.testing.assert_array_equal(adapted(spaces.Discrete(4, start=1), value).reset().observation, [0, 0, 1, 0])


@pytest.mark.parametrize(
    'space, value, message',
    [
        (spaces.Discrete(4, start=1), 2.7, 'has 2.7'),
        (spaces.Discrete(4, start=1), float('nan'), 'has nan'),
        (spaces.Discrete(4, start=1), 0, 'has 0'),
        (spaces.Discrete(4, start=1), 5, 'has 5'),
        (spaces.Discrete(4, start=1), np.array([3]), r'has shape \(1,\)'),
        (spaces.Discrete(4, start=1), '3', 'has shape .* dtype <U1'),
        (spaces.Discrete(5000), 5000, 'has 5000'),
        (spaces.MultiBinary(2), [0, 2], 'has 2'),
        (spaces.MultiDiscrete([3, 2]), [0.5, 1], 'has 0.5'),
        (spaces.MultiDiscrete([3, 2]), [2, 2], 'has 2'),
        (spaces.MultiDiscrete([3, 2]), [2], r'has shape \(1,\)'),
        (spaces.Text(9), 3, 'has a int, and its space is a string'),
    ],
)
def test_values_outside_their_space_are_errors(space, value, message):
    environment = adapted(spaces.Dict({'leaf': space}), {'leaf': value})
    with pytest.raises(ValueError, match=rf"observation\['leaf'\] {message}") as error:
        environment.reset()
    assert '\n' not in str(error.value)


def test_text_is_an_instruction():
    environment = adapted(spaces.Dict({'mission': spaces.Text(30)}), {'mission': 'go to the red ball'})
    observation = environment.reset().observation
    np.testing.assert_array_equal(observation['mission']['instruction'], word_ids('go to the red ball'))
    agent = make_agent(NetworkConfig(), environment_spec(environment, 'rooms'))
    assert agent.reads == "observation['mission']['instruction'] [16] int32: word ids below 1001"


def test_bounds_of_integers_are_known():
    space = spaces.Dict(
        {
            'board': spaces.Box(0, 10, (7, 7), np.uint8),
            'picture': spaces.Box(0, 255, (7, 7), np.uint8),
            'words': spaces.Box(np.array([0, -1]), np.array([3, 9]), dtype=np.int64),
            'vector': spaces.Box(-1, 1, (2,), np.float32),
        }
    )
    spec = environment_spec(adapted(space, None), 'rooms').observation
    assert {name: leaf.bounds for name, leaf in spec.items()} == {
        'board': (0, 10),
        'picture': None,
        'words': (-1, 9),
        'vector': None,
    }


def test_a_list_is_an_array():
    environment = adapted(spaces.Box(-1, 1, (3,), np.float32), [0.5, 0.25, 1])
    np.testing.assert_array_equal(environment.reset().observation, [0.5, 0.25, 1])


def test_an_ezpickle_is_not_saved_as_what_it_is_not():
    class Easy(Rooms, gymnasium.utils.EzPickle):
        def __init__(self):
            Rooms.__init__(self)
            gymnasium.utils.EzPickle.__init__(self)

    environment = GymnasiumAdapter(gymnasium.wrappers.TimeLimit(Easy(), 5), 0, 'easy')
    with pytest.raises(TypeError, match='cannot save .*Easy at ._environment.env, whose state is not'):
        plain_state.blueprint_of(environment)


def test_a_time_limit_is_a_truncation():
    environment: dm_env.Environment = GymnasiumAdapter(gymnasium.make('CartPole-v1', max_episode_steps=2), 0, 'cart')
    environment.reset()
    environment.step(0)
    timestep = environment.step(0)
    assert timestep.last()
    assert timestep.discount == 1

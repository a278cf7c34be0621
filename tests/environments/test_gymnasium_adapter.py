"""gymnasium.Env as dm_env.Environment."""

import pickle

import dm_env
import numpy as np
import pytest

gymnasium = pytest.importorskip('gymnasium')
spaces = gymnasium.spaces

from impala_jax.config import ConfigError  # noqa: E402
from impala_jax.environments.factories import as_dm_env  # noqa: E402
from impala_jax.environments.gymnasium_adapter import GymnasiumAdapter  # noqa: E402


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


def test_time():
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


def test_spaces():
    environment = GymnasiumAdapter(Rooms(), 0, 'rooms')
    observation, spec = environment.reset().observation, environment.observation_spec()
    np.testing.assert_array_equal(observation['room'], [0, 0, 1, 0])
    assert spec['room'].shape == (4,)
    assert spec['rest'][0].dtype == np.uint8
    assert spec['rest'][1].shape == (3,)
    for part, part_spec in zip(observation['rest'], spec['rest'], strict=True):
        part_spec.validate(part)


def test_unsupported_observations():
    environment = Rooms()
    environment.observation_space = spaces.Text(5)
    with pytest.raises(ConfigError, match="'rooms' has observations Text"):
        GymnasiumAdapter(environment, 0, 'rooms')


def test_an_ezpickle_is_not_saved_as_what_it_is_not():
    class Easy(Rooms, gymnasium.utils.EzPickle):
        def __init__(self):
            Rooms.__init__(self)
            gymnasium.utils.EzPickle.__init__(self)

    environment = GymnasiumAdapter(gymnasium.wrappers.TimeLimit(Easy(), 5), 0, 'easy')
    with pytest.raises(TypeError, match='its arguments and not its state'):
        pickle.dumps(environment)


def test_a_time_limit_is_a_truncation():
    environment: dm_env.Environment = GymnasiumAdapter(gymnasium.make('CartPole-v1', max_episode_steps=2), 0, 'cart')
    environment.reset()
    environment.step(0)
    timestep = environment.step(0)
    assert timestep.last()
    assert timestep.discount == 1

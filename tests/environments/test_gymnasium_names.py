"""Names of Gymnasium's environments: what `gymnasium.make` takes is taken, and what is suggested works."""

import importlib
import re
import sys

import numpy as np
import pytest

gymnasium = pytest.importorskip('gymnasium')

from impala_jax import environments  # noqa: E402
from impala_jax.config import ConfigError, EnvironmentConfig  # noqa: E402
from impala_jax.environments.factories import environment_factory  # noqa: E402

pytestmark = pytest.mark.filterwarnings('ignore:.*WARN: ')  # Gymnasium's own advice on ids and environments

PACKAGE = """
import gymnasium
from gymnasium import spaces

for id, entry_point in {
    'Other/Rooms-v0': 'other_package.rooms:Rooms',
    'Other/Rooms-v1': 'other_package.rooms:Rooms',
    'Other/Room-v1': 'other_package.nowhere:Rooms',
    'Other/Roam-v1': 'other_package.rooms:Continuous',
}.items():
    gymnasium.register(id, entry_point)
"""
ROOMS = """
import gymnasium
from gymnasium import spaces

class Rooms(gymnasium.Env):
    observation_space, action_space = spaces.Discrete(4), spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        return 3, {}

    def step(self, action):
        return 3, 1.0, False, False, {}

class Continuous(Rooms):
    action_space = spaces.Box(0, 1)
"""


@pytest.fixture(autouse=True)
def other_package(tmp_path, monkeypatch):
    """A package that registers its environments when it is imported; two of them cannot be used."""
    folder = tmp_path / 'other_package'
    folder.mkdir()
    (folder / '__init__.py').write_text(PACKAGE)
    (folder / 'rooms.py').write_text(ROOMS)
    (tmp_path / 'broken_package.py').write_text('import no_such_dependency')
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    before = dict(gymnasium.registry)
    yield
    gymnasium.registry.clear()
    gymnasium.registry.update(before)
    for name in [name for name in sys.modules if name.partition('.')[0] == 'other_package']:
        del sys.modules[name]


def build(name):
    return environment_factory(EnvironmentConfig(name))(0)


@pytest.mark.parametrize('name', ['other_package:Other/Rooms-v0', 'other_package:Other/Rooms', 'CartPole-v1'])
def test_what_make_takes_is_taken(name):
    environment = build(f'gymnasium/{name}')
    assert environment.reset().first() and environment.step(1).reward == 1
    environment.close()


def test_an_environment_of_another_package_steps_in_worker_processes():
    config = EnvironmentConfig('gymnasium/other_package:Other/Rooms-v0', processes=1)
    vector = environments.make(config, 2, seed=0)
    try:
        np.testing.assert_array_equal(vector.reset().observation, [[0, 0, 0, 1]] * 2)
        np.testing.assert_array_equal(vector.step(np.zeros(2, np.int32))[0].reward, 1)
    finally:
        vector.close()


@pytest.mark.parametrize(
    'name, suggested',
    [
        ('gymnasium/CartPol-v1', 'gymnasium/CartPole-v1'),
        ('gymnasium/CartPole-v7', 'gymnasium/CartPole-v1'),
        ('CartPole-v1', 'gymnasium/CartPole-v1'),
        ('gymnasium/other_package:Other/Roms-v1', 'gymnasium/other_package:Other/Rooms-v1'),
        ('gymnasium/other_package:Other/Roam-v9', 'gymnasium/other_package:Other/Rooms-v0'),
        ('gymnasium/xyzzy', None),
        ('gymnasium/not an id', None),
        ('xyzzy', None),
    ],
)
def test_suggestions_work_and_are_at_most_three(name, suggested):
    """Neither an environment whose module is missing nor one with continuous actions is suggested."""
    with pytest.raises(ConfigError) as error:
        build(name)
    text = str(error.value)
    assert '\n' not in text
    suggestions = re.findall("'([^']+)'", text.partition('did you mean')[2])
    assert len(suggestions) <= 3 and (suggested is None or suggested in suggestions)
    for other in suggestions:
        environments.spec(EnvironmentConfig(other))


@pytest.mark.parametrize(
    'name, message',
    [
        ('gymnasium/no_such_package:Rooms-v0', r"cannot import 'no_such_package' \(ModuleNotFoundError.*PYTHONPATH"),
        ('gymnasium/broken_package:Rooms-v0', r"cannot import 'broken_package' \(.*no_such_dependency"),
        ('gymnasium/Elsewhere/Rooms-v0', r'registers is gymnasium/<module>:<id>\)'),
    ],
)
def test_a_package_that_is_not_there_is_one_line(name, message):
    with pytest.raises(ConfigError, match=message) as error:
        build(name)
    assert repr(name) in str(error.value) and '\n' not in str(error.value)

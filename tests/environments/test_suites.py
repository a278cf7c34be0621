"""Suites: their tasks, how they are spread, and that each environment of the whole vector is its own task."""

import numpy as np
import pytest

from impala_jax import environments
from impala_jax.config import ConfigError, EnvironmentConfig
from impala_jax.environments import suites
from impala_jax.seeds import derived_seed
from impala_jax.types import ArraySpec, EnvironmentSpec

MINISUITE = EnvironmentConfig('minisuite')
TASKS = ('minisuite/catch', 'minisuite/catch_memory', 'minisuite/delayed_bandit', 'minisuite/go_to_colour')


def test_a_suite_lists_its_tasks():
    assert suites.tasks(MINISUITE) == TASKS
    assert suites.tasks(EnvironmentConfig('catch')) == ('catch',)
    atari, dmlab = (suites.tasks(EnvironmentConfig(name)) for name in ('atari57', 'dmlab30'))
    assert len(set(atari)) == 57 and {'atari/up_n_down', 'atari/ms_pacman', 'atari/pong'} <= set(atari)
    assert len(set(dmlab)) == 30 and dmlab[0] == 'dmlab/rooms_collect_good_objects_train'
    assert not any(task.endswith('_test') for task in dmlab)


@pytest.mark.atari
def test_every_game_of_the_suite_is_there():
    from impala_jax.environments.atari import game_name

    games = [task.removeprefix('atari/') for task in suites.tasks(EnvironmentConfig('atari57'))]
    assert [game_name(game) for game in games] == games


def test_a_tasks_configuration_keeps_the_suites_settings():
    config = EnvironmentConfig('minisuite', action_repeat=2, max_failures=7)
    assert suites.task_config(config, TASKS[1]) == EnvironmentConfig(TASKS[1], action_repeat=2, max_failures=7)
    assert suites.task_config(EnvironmentConfig('catch'), 'catch') == EnvironmentConfig('catch')
    assert suites.task_config(EnvironmentConfig('atari57'), 'atari/pong').full_action_space
    assert EnvironmentConfig('atari57').frames_per_step == EnvironmentConfig('dmlab30').frames_per_step == 4


@pytest.mark.parametrize('num_actors, num_envs', [(1, 4), (2, 2), (3, 5), (2, 16), (7, 3)])
def test_tasks_are_spread_evenly(num_actors, num_envs):
    ids = suites.assign(MINISUITE, num_actors, num_envs)
    assert ids.shape == (num_actors, num_envs) and ids.dtype == np.int32
    counts = np.bincount(ids.ravel(), minlength=4)
    assert counts.min() >= 1 and counts.max() - counts.min() <= 1
    for actor in ids:  # In turns: whatever part of an actor's trajectories makes a batch is mixed.
        assert len(set(actor[:4])) == min(num_envs, 4)
    assert not suites.assign(EnvironmentConfig('catch'), num_actors, num_envs).any()


def test_a_task_without_an_environment_is_refused_with_the_least_that_works():
    with pytest.raises(ConfigError) as error:
        suites.assign(EnvironmentConfig('atari57'), 4, 8)
    assert str(error.value) == (
        'atari57 has 57 tasks, but there are 32 environments (actor.num_actors 4 x actor.num_envs 8); the smallest '
        'actor.num_envs that works is 15'
    )
    assert (np.bincount(suites.assign(EnvironmentConfig('atari57'), 4, 15).ravel()) >= 1).all()


def run(environment, actions):
    """What each step yields, after a reset."""
    steps = [(environment.reset(), None)] + [environment.step(row) for row in actions]
    return [
        (timestep.step_type, timestep.reward, timestep.discount, *timestep.observation.values())
        + (() if info is None else tuple(info))
        for timestep, info in steps
    ]


@pytest.mark.parametrize('processes', [0, 1])
def test_each_environment_is_its_own_task(processes):
    """In the vector's order, with the seeds of its task; in worker processes too."""
    ids = np.array([2, 0, 3, 2, 0], np.int32)
    config = EnvironmentConfig('minisuite', processes=processes)
    whole = environments.make(config, 5, seed=4, task_ids=ids)
    actions = np.random.RandomState(0).randint(3, size=(60, 5)).astype(np.int32)
    try:
        assert whole.spec.tasks == TASKS
        seen = run(whole, actions)
    finally:
        whole.close()
    for task in set(ids.tolist()):
        where = np.flatnonzero(ids == task)
        part = environments.make(EnvironmentConfig(TASKS[task]), len(where), derived_seed(4, task))
        for whole_step, part_step in zip(seen, run(part, actions[:, where]), strict=True):
            for a, b in zip(whole_step, part_step, strict=True):
                np.testing.assert_array_equal(a[where], b)


def test_by_default_tasks_take_turns():
    environment = environments.make(MINISUITE, 6, seed=0)
    words = environment.reset().observation['instruction']
    assert (words != 0).any(axis=1).tolist() == [False, False, False, True, False, False]


def test_a_failure_in_a_part_comes_out_when_all_have_stepped():
    class Part:
        num_envs = 1
        steps = 0

        def __init__(self, fails):
            self.fails = fails

        def step(self, actions):
            self.steps += 1
            if self.fails:
                raise environments.EnvironmentFailure('the emulator is on fire')

        def close(self):
            self.closed = True

    spec = EnvironmentSpec(ArraySpec((1,), np.dtype(np.float32)), 2, ('a', 'b', 'c'))
    parts = [Part(True), Part(False), Part(False)]
    environment = suites.SuiteVectorEnvironment(parts, [np.array([i]) for i in range(3)], spec)  # pyright: ignore
    with pytest.raises(environments.EnvironmentFailure, match='on fire'):
        environment.step(np.zeros(3, np.int32))
    environment.close()
    assert [(part.steps, part.closed) for part in parts] == [(1, True)] * 3


def test_tasks_that_differ_are_one_clear_error(monkeypatch):
    monkeypatch.setitem(suites.SUITES, 'mixed', lambda: ('catch', 'minisuite/catch'))
    monkeypatch.setitem(
        suites.SUITES, 'actions', lambda: ('tests.helpers.factories:scripted', 'tests.helpers.factories:different')
    )
    for name, message in (
        ('mixed', "the tasks of 'mixed' cannot share a network: the observations of catch are .* of minisuite/catch"),
        ('actions', 'tests.helpers.factories:scripted has 6 actions, tests.helpers.factories:different has [0-9]+$'),
    ):
        config = EnvironmentConfig(name)
        for build in (lambda config=config: environments.spec(config), lambda c=config: environments.make(c, 2, 0)):
            with pytest.raises(ConfigError, match=message) as error:
                build()
            assert '\n' not in str(error.value)


def test_an_unknown_task_names_the_closest():
    with pytest.raises(ConfigError, match="'minisuite/cach'; did you mean 'minisuite/catch'"):
        environments.spec(EnvironmentConfig('minisuite/cach'))
    with pytest.raises(ConfigError, match="unknown environment.name 'minisuit'; did you mean 'minisuite'"):
        environments.spec(EnvironmentConfig('minisuit'))


@pytest.mark.atari
class TestAtari:
    @pytest.fixture(autouse=True)
    def few_games(self, monkeypatch):
        monkeypatch.setitem(suites.SUITES, 'atari57', lambda: ('atari/pong', 'atari/breakout', 'atari/skiing'))

    def test_all_games_have_all_18_actions(self):
        """Skiing too, which has no fire button."""
        spec = environments.spec(EnvironmentConfig('atari57'))
        assert spec.num_actions == 18 and len(spec.tasks) == 3
        assert spec.observation == ArraySpec((84, 84, 4), np.dtype(np.uint8), stacked=True)
        with pytest.raises(ConfigError, match='atari/pong has 6 actions, atari/breakout has 4'):
            environments.spec(EnvironmentConfig('atari57', full_action_space=False))

    def test_games_step_together(self):
        environment = environments.make(EnvironmentConfig('atari57'), 5, seed=0)
        try:
            first = environment.reset().observation
            for action in range(18):
                timestep, _ = environment.step(np.full(5, action, np.int32))
        finally:
            environment.close()
        screens = timestep.observation[..., -1].astype(int)
        # Pong, Breakout, Skiing, Pong, Breakout: another screen is another game.
        difference = np.abs(screens[:, None] - screens[None]).mean(axis=(2, 3))
        assert max(difference[0, 3], difference[1, 4]) < 5 < difference[[0, 0, 1], [1, 2, 2]].min()
        assert (timestep.observation != first).any(axis=(1, 2, 3)).all()

    def test_fire_is_no_fire_where_there_is_no_button(self):
        """RIGHTFIRE is RIGHT on Skiing."""
        screens = {}
        for name, action in (('RIGHT', 3), ('RIGHTFIRE', 11), ('LEFT', 4)):
            environment = environments.make(EnvironmentConfig('atari/skiing', full_action_space=True), 1, seed=0)
            environment.reset()
            for _ in range(40):
                timestep, _ = environment.step(np.array([action], np.int32))
            screens[name] = timestep.observation
            environment.close()
        np.testing.assert_array_equal(screens['RIGHT'], screens['RIGHTFIRE'])
        assert (screens['RIGHT'] != screens['LEFT']).any()

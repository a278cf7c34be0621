"""Atari: lives, games, frames and presets."""

import numpy as np
import pytest

from impala_jax import environments
from impala_jax.config import (
    EnvironmentConfig,
)
from impala_jax.environments import atari, make
from impala_jax.seeds import derived_seed
from impala_jax.types import FIRST, LAST, MID
from tests.helpers.counting import SMALL, make_actor

pytestmark = pytest.mark.atari

N = 2


@pytest.fixture
def create():
    made = []

    def create(name='atari/breakout', num_envs=N, evaluation=False, seed=5, **kwargs):
        made.append(make(EnvironmentConfig(name, **kwargs), num_envs, seed, evaluation=evaluation))
        return made[-1]

    yield create
    for environment in made:
        environment.close()


def random_actions(environment, steps, seed=0):
    rng = np.random.RandomState(seed)
    return rng.randint(environment.spec.num_actions, size=(steps, environment.num_envs)).astype(np.int32)


def test_games_begin_with_1_to_30_noops(create, monkeypatch):
    """Those of a reset, and those that follow another."""
    monkeypatch.setattr(atari, '_MAX_FRAMES', 40)

    def num_frames(environment):
        untouched = np.zeros(environment.num_envs, bool)
        return environment._emulator._emulator.reset(options={'reset_mask': untouched})[1]['episode_frame_number']

    counts = {'reset': [], 'after a game': []}
    environment = create(num_envs=16, evaluation=True)
    for actions in random_actions(environment, 400):
        if len(counts['reset']) < 800:
            environment.reset()
            counts['reset'].extend(num_frames(environment))
        timestep, _ = environment.step(actions)
        if (timestep.step_type == FIRST).any():
            counts['after a game'].extend(num_frames(environment)[timestep.step_type == FIRST])
    for drawn in counts.values():
        assert set(drawn) == set(range(1, 31))
        assert np.mean(drawn) == pytest.approx(15.5, abs=4 * np.std(drawn) / np.sqrt(len(drawn)))


def test_a_lost_life_ends_an_episode_but_not_the_game(create):
    """Step by step the same as whole games, but for the no-op that follows a lost life."""
    lives, games = create(), create(evaluation=True)
    timestep = lives.reset()
    np.testing.assert_array_equal(timestep.observation, games.reset().observation)
    scores = np.zeros(N)
    episodes, ended = np.zeros(N, int), 0
    life_lost = np.zeros(N, bool)
    for actions in random_actions(lives, 300):
        timestep, info = lives.step(actions)
        whole, whole_info = games.step(np.where(life_lost, 0, actions))
        np.testing.assert_array_equal(timestep.observation, whole.observation)
        np.testing.assert_array_equal(info.episode_return, whole_info.episode_return)
        over = whole.step_type == LAST

        # Episodes: those of the games, and one more end at each lost life.
        assert (timestep.step_type[over] == LAST).all()
        assert (timestep.step_type[whole.step_type == FIRST] == FIRST).all()
        assert (timestep.step_type[life_lost] == FIRST).all()
        assert (timestep.reward[timestep.step_type == FIRST] == 0).all()
        assert (timestep.previous_action[timestep.step_type == FIRST] == 0).all()
        life_lost = (timestep.step_type == LAST) & ~over
        assert (whole.step_type[life_lost] == MID).all()
        np.testing.assert_array_equal(timestep.discount, np.where(timestep.step_type == LAST, 0, 1))

        # Scores: of games, over all their lives.
        scores += whole.reward
        np.testing.assert_array_equal(info.episode_return, np.where(over, scores, 0).astype(np.float32))
        np.testing.assert_array_equal(info.episode_ended, over)
        scores[over] = 0
        episodes += timestep.step_type == LAST
        assert (episodes[over] == 5).all()
        episodes[over] = 0
        ended += over.sum()
    assert ended


def test_a_game_scores_with_several_lives(create):
    """Some game's return holds points that were made after a life was lost."""
    environment = create(num_envs=4)
    environment.reset()
    lives_with_points, returns = np.zeros(4, int), np.zeros(4)
    points, seen = np.zeros(4), 0
    for actions in random_actions(environment, 400, seed=1):
        timestep, info = environment.step(actions)
        points += timestep.reward
        returns += timestep.reward
        last = timestep.step_type == LAST
        lives_with_points += last & (points > 0)
        points[last] = 0
        for i in np.flatnonzero(info.episode_ended):
            assert info.episode_return[i] == returns[i]
            seen += lives_with_points[i] > 1
            lives_with_points[i], returns[i] = 0, 0
    assert seen


def test_frames_are_stacked_as_ale_would(create):
    """The observation is AtariVectorEnv's own stack of four, newest last; across lives and games."""
    from ale_py.vector_env import AtariVectorEnv

    environment = create(evaluation=True)
    reference = AtariVectorEnv(
        'breakout', N, stack_num=4, noop_max=31, reward_clipping=False, use_fire_reset=False, frameskip=4
    )
    expected, _ = reference.reset(seed=np.array([derived_seed(5, i) for i in range(N)]))
    timestep = environment.reset()
    games = 0
    for actions in random_actions(environment, 300):
        np.testing.assert_array_equal(timestep.observation, expected.transpose(0, 2, 3, 1))
        assert timestep.observation.flags.c_contiguous
        timestep, _ = environment.step(actions)
        expected = reference.step(actions)[0]
        games += (timestep.step_type == FIRST).sum()
    assert games


@pytest.mark.parametrize('repeat', [2, 4])
def test_one_step_is_as_many_frames_as_configured(create, repeat):
    """One step is as many frames as the configuration says."""
    many = create('atari/space_invaders', evaluation=True, action_repeat=repeat)
    one = create('atari/space_invaders', evaluation=True, action_repeat=1)
    many.reset()
    one.reset()
    total = 0
    for actions in random_actions(many, 120):
        rewards = many.step(actions)[0].reward
        np.testing.assert_array_equal(rewards, sum(one.step(actions)[0].reward for _ in range(repeat)))
        total += rewards.sum()
    assert total
    assert EnvironmentConfig('atari/pong').frames_per_step == 4


def test_pong_is_lost_by_single_points(create):
    """A random player's game: rewards are single points, and it is lost 21 to a few."""
    environment = create('atari/Pong')
    assert environment.spec.num_actions == 6
    environment.reset()
    rewards, returns = [], []
    for actions in random_actions(environment, 1100):
        timestep, info = environment.step(actions)
        rewards += timestep.reward.tolist()
        returns += info.episode_return[info.episode_ended].tolist()
        assert (timestep.discount[timestep.step_type == LAST] == 0).all()
    assert set(rewards) == {-1, 0, 1}
    assert returns
    assert all(-21 <= value <= -15 for value in returns)


def test_rewards_are_raw(create):
    environment = create('atari/space_invaders')
    environment.reset()
    assert max(environment.step(actions)[0].reward.max() for actions in random_actions(environment, 150)) >= 5


def test_no_op_starts_are_1_to_30(create):
    """1 to 30, of all numbers; none with the preset machado."""
    emulator = create(num_envs=8)._emulator
    frames = np.concatenate([emulator.reset()[1]['episode_frame_number'] for _ in range(30)])
    assert min(frames) == 1
    assert max(frames) == 30
    assert len(set(frames.tolist())) > 15
    machado = create(preset='machado')
    assert (machado._emulator.reset()[1]['episode_frame_number'] == 0).all()


def test_machado_has_all_actions_and_whole_games(create):
    """All 18 actions, and episodes are games in training too."""
    environment, paper = create(preset='machado'), create(evaluation=True)
    assert environment.spec.num_actions == 18
    assert paper.spec.num_actions == 4
    environment.reset()
    lives = set()
    for actions in random_actions(environment, 150):
        timestep, info = environment.step(actions)
        lives |= set(environment._lives[timestep.step_type == MID].tolist())
        assert ((timestep.step_type == LAST) == info.episode_ended).all()
    assert len(lives) > 1


def test_machado_has_sticky_actions(create):
    """Without no-ops and sticky actions all games under the same actions would be the same."""
    environment = create('atari/space_invaders', num_envs=8, preset='machado', evaluation=True)
    environment.reset()
    for actions in random_actions(environment, 60):
        timestep, _ = environment.step(np.full(8, actions[0]))
    newest = timestep.observation[..., -1]
    assert (newest != newest[:1]).any()


def test_a_truncated_game_has_discount_one(create, monkeypatch):
    monkeypatch.setattr(atari, '_MAX_FRAMES', 40)
    environment = create('atari/pong')
    environment.reset()
    for step in range(1, 25):
        timestep, info = environment.step(np.zeros(N, np.int32))
        expected = FIRST if step % 11 == 0 else LAST if step % 11 == 10 else MID
        np.testing.assert_array_equal(timestep.step_type, expected)
        np.testing.assert_array_equal(timestep.discount, 1)
        assert info.episode_ended.all() == (expected == LAST)


class FakeEmulator:
    """Replays (reward, lives, terminated) of one game for `AtariVectorEnvironment`."""

    def __init__(self, script):
        self.script = iter(script)
        self.actions = []

    def reset(self, seed):
        return np.zeros((1, 1, 84, 84), np.uint8), {'lives': np.array([3], np.int32)}

    def step(self, actions):
        self.actions.append(int(actions[0]))
        reward, lives, terminated = next(self.script)
        frames = np.full((1, 1, 84, 84), len(self.actions), np.uint8)
        info = {'lives': np.array([lives], np.int32)}
        return frames, np.array([reward], np.int32), np.array([terminated]), np.array([False]), info


def test_points_and_ends_in_the_no_op_after_a_lost_life_count(create):
    """Points of the no-op count in the score, but are no reward; a game may even end there."""
    environment = create(num_envs=1)
    environment._emulator = emulator = FakeEmulator(
        [(1, 3, False), (2, 2, False), (4, 2, False), (8, 1, False), (16, 0, True), (0, 3, False), (32, 0, True)]
    )
    environment.reset()
    rows = [environment.step(np.array([3], np.int32)) for _ in range(7)]
    assert [int(timestep.step_type[0]) for timestep, _ in rows] == [MID, LAST, FIRST, LAST, FIRST, FIRST, LAST]
    assert [float(timestep.reward[0]) for timestep, _ in rows] == [1, 2, 0, 8, 0, 0, 32]
    assert [float(timestep.discount[0]) for timestep, _ in rows] == [1, 0, 1, 0, 1, 1, 0]
    returns = [float(info.episode_return[0]) for _, info in rows]
    np.testing.assert_array_equal(returns, [0] * 4 + [1 + 2 + 4 + 8 + 16, 0, 32])
    assert [bool(info.episode_ended[0]) for _, info in rows] == [False] * 4 + [True, False, True]
    assert emulator.actions == [3, 3, 0, 3, 0, 3, 3]
    stacks = [timestep.observation[0, 0, 0].tolist() for timestep, _ in rows]
    assert stacks[4:] == [[2, 3, 4, 5], [0, 0, 0, 6], [0, 0, 6, 7]]


def test_a_life_lost_in_the_no_op_ends_no_other_episode(create):
    environment = create(num_envs=1)
    environment._emulator = emulator = FakeEmulator([(0, 2, False), (0, 1, False), (0, 1, False), (0, 0, True)])
    environment.reset()
    rows = [environment.step(np.array([3], np.int32)) for _ in range(4)]
    assert [int(timestep.step_type[0]) for timestep, _ in rows] == [LAST, FIRST, MID, LAST]
    assert emulator.actions == [3, 0, 3, 3]


def test_a_state_cannot_be_saved(create):
    environment = create()
    environment.reset()
    with pytest.raises(NotImplementedError, match='new games'):
        environment.get_state()


@pytest.mark.parametrize('name', ['space_invaders', 'SpaceInvaders', 'spaceinvaders', 'Space-Invaders'])
def test_names_of_games_are_recognised(name):
    assert atari.game_name(name) == 'space_invaders'


def test_nothing_is_printed(create, capfd):
    create().reset()
    assert capfd.readouterr() == ('', '')


def test_closing_twice_does_no_harm(create):
    environment = create()
    environment.close()
    environment.close()


@pytest.mark.atari
def test_returns_are_per_game():
    """In training an episode is a life, but a return is that of all lives of a game."""
    environment = environments.make(EnvironmentConfig('atari/breakout'), 2, seed=0)
    actor, params = make_actor(environment, 400, SMALL)
    trajectory = actor.unroll(0, params)
    environment.close()
    last = trajectory.timesteps.step_type[1:] == LAST
    returns = trajectory.info.episode_return
    for i in range(2):
        ends = np.flatnonzero(trajectory.info.episode_ended[:, i])
        assert len(ends) >= 1
        start = 0
        for end in ends:
            assert last[start : end + 1, i].sum() == 5
            assert returns[end, i] == trajectory.timesteps.reward[1 + start : 2 + end, i].sum()
            start = end + 1
    assert np.nanmax(returns) > 0


@pytest.mark.atari
@pytest.mark.parametrize('repeat', [1, 4])
def test_no_double_frame_skip(repeat):
    """An agent step is as many frames of the emulator as are counted."""
    config = EnvironmentConfig('atari/pong', action_repeat=repeat)
    environment = environments.make(config, 2, seed=0)
    environment.reset()
    frames = []
    emulator_step = environment._emulator.step

    def step(actions):
        result = emulator_step(actions)
        frames.append(result[-1]['episode_frame_number'].copy())
        return result

    environment._emulator.step = step
    for _ in range(10):
        environment.step(np.zeros(2, np.int32))
    environment.close()
    np.testing.assert_array_equal(np.diff(frames, axis=0), repeat)
    assert config.frames_per_step == repeat
    assert EnvironmentConfig('atari/pong').frames_per_step == 4


@pytest.mark.atari
@pytest.mark.parametrize('preset, sticky, num_actions', [('paper', False, 6), ('machado', True, 18)])
def test_presets_do_not_mix(preset, sticky, num_actions):
    """`paper`: no-ops, the minimal actions, nothing sticky. `machado`: all actions, sticky ones, no no-ops."""
    environment = environments.make(EnvironmentConfig('atari/pong', preset=preset), 16, seed=0)
    assert environment.spec.num_actions == num_actions
    _, info = environment._emulator.reset(seed=np.arange(16))
    no_ops = info['episode_frame_number']
    assert no_ops.any() == (preset == 'paper')
    rng = np.random.RandomState(0)
    for _ in range(30):
        timestep, _ = environment.step(np.full(16, rng.randint(num_actions)))
    newest = timestep.observation[..., -1]
    environment.close()
    # Games of other seeds that begin alike and get the same actions stay alike, unless actions stick.
    groups = [newest[no_ops == number] for number in set(no_ops.tolist())]
    assert max(len(group) for group in groups) > 1
    assert any((group != group[:1]).any() for group in groups) == sticky

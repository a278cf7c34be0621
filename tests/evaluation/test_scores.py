"""Human-normalised scores, the paper's own numbers, aggregates and their intervals."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from impala_jax import data
from impala_jax.config import ConfigError
from impala_jax.evaluation import scores
from impala_jax.studies import plotting
from impala_jax.studies.plotting.figures import PALETTE
from tests.helpers.programs import ROOT

GAMES = ['atari/' + row['game'] for row in data.rows('atari57_scores.csv')]
LEVELS = ['dmlab/' + row['level_train'] for row in data.rows('dmlab30_scores.csv')]


def test_a_human_scores_100_and_a_random_policy_0():
    # Pong: random -20.7, human 14.6.
    assert scores.human_normalised('atari/pong', 14.6) == pytest.approx(100)
    assert scores.human_normalised('atari/pong', -20.7) == pytest.approx(0)
    assert scores.human_normalised('atari/SpaceInvaders', 1668.7) == pytest.approx(100)
    assert scores.human_normalised('atari/space_invaders', 1668.7) == pytest.approx(100)
    assert scores.human_normalised('dmlab/rooms_watermaze', 4.065 + 0.5 * (54 - 4.065)) == pytest.approx(50)
    assert scores.human_normalised('dmlab/language_execute_random_task', -5.913) == pytest.approx(0)
    for name in ('train', 'test'):
        assert scores.human_normalised(f'dmlab/rooms_collect_good_objects_{name}', 10) == pytest.approx(100)
    for name in ('catch', 'atari/no_such_game', 'dmlab/seekavoid_arena_01', 'minisuite/catch'):
        assert scores.human_normalised(name, 1.0) is None


def test_the_reference_data_are_complete():
    assert len(set(GAMES)) == 57 and len(set(LEVELS)) == 30
    assert all(scores.reference(task) for task in GAMES + LEVELS)
    assert {row['game'] for row in data.rows('impala_table_c1.csv')} == {name.removeprefix('atari/') for name in GAMES}


def test_medians_of_table_4_from_table_c1():
    agents = {agent.label: agent for agent in scores.paper_agents('atari57')}
    for label, median in (
        ('shallow experts (paper)', 93.2),
        ('deep experts (paper)', 191.8),
        ('deep multi-task (paper)', 59.7),
    ):
        assert round(float(scores.aggregate([agents[label].score(game) for game in GAMES])['median']), 1) == median


def test_means_of_table_4_from_table_c1():
    """To 0.4, and only with a random score of 0 on Video Pinball, where the table's is near the human's."""
    agents = {agent.label: agent for agent in scores.paper_agents('atari57')}
    columns = {row['game']: row for row in data.rows('impala_table_c1.csv')}
    pinball = scores.reference('atari/VideoPinball')
    assert pinball is not None
    for label, column, mean in (
        ('shallow experts (paper)', 'impala_shallow_expert', 466.4),
        ('deep experts (paper)', 'impala_deep_expert', 957.6),
        ('deep multi-task (paper)', 'impala_deep_multitask', 176.9),
    ):
        values = [agents[label].score(game) for game in GAMES]
        values[GAMES.index('atari/VideoPinball')] = 100 * float(columns['VideoPinball'][column]) / pinball.human
        assert float(scores.aggregate(values)['mean']) == pytest.approx(mean, abs=0.4)
        assert agents[label].score('atari/VideoPinball') > 2 * values[GAMES.index('atari/VideoPinball')]


def test_headlines_of_dmlab30_from_table_b1():
    """49.4 with PBT, and 44.5 for the experts, from scores that are printed with one digit after the point."""
    pbt, experts = scores.paper_agents('dmlab30')
    assert float(scores.aggregate([pbt.score(level) for level in LEVELS])['capped_mean']) == pytest.approx(
        49.4, abs=0.06
    )
    capped_mean = scores.aggregate([experts.score(level) for level in LEVELS])['capped_mean']
    assert float(capped_mean) == pytest.approx(44.5, abs=0.06)
    # The rows of both files are of the same levels: humans scored the same, as far as it is printed.
    for printed, level in zip(data.rows('dmlab30_table_b1.csv'), data.rows('dmlab30_scores.csv'), strict=True):
        for column in ('human', 'random'):
            assert float(printed[column]) == pytest.approx(float(level[column]), abs=0.0501), (printed, level)
    assert pbt.score('dmlab/lasertag_one_opponent_small') == pytest.approx(100 * (0.3 + 0.224) / (12.65 + 0.224))


def test_scores_are_aggregated_by_median_and_means():
    values = {name: float(value) for name, value in scores.aggregate([50.0, 300.0, -10.0, 90.0]).items()}
    assert values == {'median': 70.0, 'capped_mean': (50 + 100 - 10 + 90) / 4, 'mean': 107.5}
    stacked = scores.aggregate([[0.0, 200.0], [50.0, 70.0]])
    np.testing.assert_array_equal(stacked['capped_mean'], [50, 60])


def returns_with(normalised, spread=0.0, episodes=4):
    """Returns of LEVELS' first tasks with these normalised means, and a standard deviation in percent."""
    result = {}
    for task, value in zip(LEVELS, normalised, strict=False):
        known = scores.reference(task)
        assert known is not None
        noise = np.random.RandomState(0).normal(size=episodes)
        noise = spread * (noise - noise.mean()) / noise.std() if spread else np.zeros(episodes)
        result[task] = (known.random + (value + noise) / 100 * (known.human - known.random)).tolist()
    return result


def test_the_cap_is_on_a_levels_mean_and_not_on_its_episodes():
    # Half of the episodes at 150 %, half at 50 %: the mean is 100 and not 75.
    result = scores.suite_scores(returns_with([100.0, 20.0], spread=50.0))
    assert result.tasks[LEVELS[0]].value == pytest.approx(100)  # pyright: ignore[reportOptionalMemberAccess]
    assert result.aggregates['capped_mean'].value == pytest.approx(60)
    assert result.aggregates['mean'].value == pytest.approx(60)
    assert scores.suite_scores(returns_with([180.0, 20.0])).aggregates['capped_mean'].value == pytest.approx(60)


def test_intervals_are_those_of_stratified_means():
    """Of the mean of four tasks with n episodes each: 1.96 spread / sqrt(4 n), if tasks are resampled apart."""
    n, spread = 100, 30.0
    result = scores.suite_scores(returns_with([10.0, 30.0, 50.0, 70.0], spread, n))
    half = 1.96 * spread / np.sqrt(n)
    for value, estimate in zip((10.0, 30.0, 50.0, 70.0), result.tasks.values(), strict=True):
        assert estimate is not None and estimate.interval is not None
        assert estimate.value == pytest.approx(value)
        np.testing.assert_allclose(estimate.interval, [value - half, value + half], atol=0.1 * half)
    mean = result.aggregates['mean']
    assert mean.interval is not None
    np.testing.assert_allclose(mean.interval, [40 - half / 2, 40 + half / 2], atol=0.06 * half)


def test_the_same_seed_gives_the_same_intervals():
    returns = returns_with([10.0, 30.0], 20.0, 10)
    assert scores.suite_scores(returns) == scores.suite_scores(returns)
    assert scores.suite_scores(returns, seed=1) != scores.suite_scores(returns)


def test_a_single_episode_has_no_interval():
    returns = returns_with([10.0, 30.0], 20.0, 10)
    returns[LEVELS[0]] = returns[LEVELS[0]][:1]
    result = scores.suite_scores(returns)
    first, second = result.tasks.values()
    assert first is not None and first.interval is None
    assert second is not None and second.interval is not None
    assert all(estimate.interval is None for estimate in result.aggregates.values())


def test_without_human_scores_returns_are_averaged():
    result = scores.suite_scores({'minisuite/a': [1.0, 0.0, 1.0, 0.0], 'minisuite/b': [2.0, 2.0]})
    assert result.tasks == {'minisuite/a': None, 'minisuite/b': None}
    assert list(result.aggregates) == ['mean_return'] and result.aggregates['mean_return'].value == 1.25
    assert not scores.suite_scores({'minisuite/a': [1.0], 'atari/pong': [1.0]}).aggregates


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match='no tasks'):
        scores.suite_scores({})
    with pytest.raises(ValueError, match='N > 0'):
        scores.suite_scores({'atari/pong': []})


def result(suite, returns):
    """What evaluation makes of these returns."""
    scored = scores.suite_scores(returns)
    tasks = {}
    for task, values in returns.items():
        estimate = scored.tasks[task]
        tasks[task] = {
            'mean_return': float(np.mean(values)),
            'stderr': float(np.std(values)),
            'human_normalised': None if estimate is None else estimate.value,
            'human_normalised_interval': None if estimate is None else estimate.interval,
        }
    aggregates = {name: {'value': value, 'interval': limits} for name, (value, limits) in scored.aggregates.items()}
    episodes = sum(map(len, returns.values()))
    return {'environment': suite, 'frames': 4000, 'episodes': episodes, 'tasks': tasks, 'aggregates': aggregates}


def printed(values):
    console = Console(width=120, file=io.StringIO())
    console.print(scores.table(values))
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def test_the_table_has_every_level():
    rows = printed(result('dmlab30', returns_with(range(30), 10.0))).splitlines()
    assert 'dmlab30, 120 episodes at 4,000 frames' in rows[0]
    (first,) = [row for row in rows if 'rooms_collect_good_objects' in row]
    # The level that evaluation plays, its return, its score, and the paper's.
    assert 'rooms_collect_good_objects_test' in first and '0.07' in first and ' 0.0 [-' in first and ' 57.7 ' in first
    (mean,) = [row for row in rows if 'mean capped at 100' in row]
    assert ' 14.5 [' in mean and ' 49.4 ' in mean


def test_the_table_needs_no_human_scores():
    text = printed(result('minisuite', {'minisuite/a': [1.0, 0.0], 'minisuite/b': [2.0, 2.0]}))
    assert 'human' not in text and '0.50 ± 0.50' in text and '1.25 [' in text


def bars(figure):
    """Label -> the bar's end, from the bottom to the top."""
    (axes,) = figure.axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    return dict(zip(labels, [bar.get_width() for bar in axes.patches], strict=True))


def test_figure_has_the_scores_and_those_of_the_paper():
    normalised = np.arange(30.0)[::-1]
    returns = returns_with(normalised, 10.0)
    figure = plotting.suite(result('dmlab30', returns))
    drawn = bars(figure)
    np.testing.assert_allclose(list(drawn.values()), np.arange(30), atol=1e-9)
    assert list(drawn)[-1] == 'rooms_collect_good_objects_test' and len(drawn) == 30
    (axes,) = figure.axes
    pbt, experts = scores.paper_agents('dmlab30')
    for agent, color in ((pbt, PALETTE[1]), (experts, PALETTE[2])):
        (points,) = [line for line in axes.lines if line.get_color() == color]
        np.testing.assert_allclose(points.get_xdata(), [agent.score(task) for task in LEVELS[::-1]])
        np.testing.assert_array_equal(points.get_ydata(), np.arange(30))
    (human,) = [line for line in axes.lines if line.get_label() == 'human']
    assert set(human.get_xdata()) == {100}
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ['this run', 'deep multi-task, PBT (paper)', 'deep experts (paper)', 'human']
    (errors,) = axes.collections
    low, high = scores.suite_scores(returns).tasks[LEVELS[0]].interval  # pyright: ignore
    np.testing.assert_allclose(errors.get_segments()[-1][:, 0], [low, high])
    assert 'dmlab30 at 4,000 frames\nmedian: 14.5 [' in axes.get_title() and axes.get_xscale() == 'linear'


def test_figure_of_atari_is_logarithmic():
    """Video Pinball's scores would leave the others no room."""
    returns = {game: [scores.reference(game).human] * 2 for game in GAMES}  # pyright: ignore
    figure = plotting.suite(result('atari57', returns))
    assert figure.axes[0].get_xscale() == 'symlog'
    assert len(bars(figure)) == 57 and set(np.round(list(bars(figure).values()), 6)) == {100}


def test_figure_without_human_scores():
    figure = plotting.suite(result('minisuite', {'minisuite/a': [1.0, 0.0], 'minisuite/b': [2.0, 2.0]}))
    assert bars(figure) == {'a': 0.5, 'b': 2.0}
    assert figure.get_suptitle() == 'only 1 seed; intervals are over episodes'
    assert figure.axes[0].get_xlabel() == 'return of an episode' and 'mean: 1.25 [' in figure.axes[0].get_title()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ['this run']


def test_figure_from_the_command_line(tmp_path):
    files = ['--scores', tmp_path / 'scores.json', '--output', tmp_path / 'a.svg']

    def plot(content):
        (tmp_path / 'scores.json').write_text(json.dumps(content))
        return subprocess.run(
            [sys.executable, 'launch/plot.py', 'suite', *files],
            **{'cwd': ROOT, 'env': os.environ | {'PYTHONPATH': str(ROOT)}, 'timeout': 100},
            **{'capture_output': True, 'text': True},
        )

    done = plot(result('minisuite', {'minisuite/a': [1.0, 0.0], 'minisuite/b': [2.0, 2.0]}))
    assert (done.returncode, done.stderr) == (0, '') and (tmp_path / 'a.svg').read_bytes().startswith(b'<?xml')
    done = plot({'episodes': 3, 'mean_return': 1.0})
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith('error: these are not scores of a suite')


def test_what_is_no_suite_is_refused():
    for content in ([], {}, {'tasks': {}}, {'tasks': {'a': {}}}):
        with pytest.raises(ConfigError, match='not scores of a suite'):
            plotting.suite(content)  # pyright: ignore[reportArgumentType]

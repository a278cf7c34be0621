"""Experts against one agent: the same total of frames, one table, and a figure that shows what it holds."""

import csv
import json

import numpy as np
import pytest

from impala_jax.config import (
    ActorConfig,
    Config,
    ConfigError,
    EnvironmentConfig,
    EvaluatorConfig,
    LearnerConfig,
    LoggingConfig,
    NetworkConfig,
    replace,
)
from impala_jax.environments import suites
from impala_jax.studies import plotting
from impala_jax.studies.ablation import experts, run_sweep

SMALL = Config(
    total_frames=1600,
    environment=EnvironmentConfig(name='minisuite'),
    network=NetworkConfig(torso='mlp', mlp_sizes=(8,)),
    learner=LearnerConfig(batch_size=4, unroll_length=10, num_devices=1),
    actor=ActorConfig(num_actors=1, num_envs=4),
    evaluator=EvaluatorConfig(episodes=2, num_envs=2),
    logging=LoggingConfig(interval_updates=10),
)
TASKS = suites.tasks(SMALL.environment)


@pytest.mark.parametrize('suite', ['minisuite', 'atari57', 'dmlab30'])
def test_experts_share_the_frames_of_the_multi_task_agent(suite):
    config = replace(SMALL, {'environment.name': suite, 'total_frames': 11_400_000_000})
    cells = experts(config, seeds=(0, 1)).cells()
    tasks = suites.tasks(config.environment)
    assert len(cells) == 2 * (len(tasks) + 1)
    of_seed = [cell for cell in cells if cell.config.seed == 1]
    assert [cell.values['task'] for cell in of_seed] == [*tasks, suite]
    *singles, together = [cell.config for cell in of_seed]
    assert together.total_frames == 11_400_000_000
    assert sum(single.total_frames for single in singles) == pytest.approx(together.total_frames, rel=1e-8)
    assert [single.environment.name for single in singles] == list(tasks)
    if suite == 'atari57':  # As in the suite, where one network serves all games.
        assert all(single.environment.full_action_space for single in singles)
    assert len(experts(config, multitask=False).cells()) == len(tasks)


@pytest.mark.parametrize(
    'values, message',
    [
        ({'environment.name': 'catch'}, "'catch' is not a suite of tasks; did you mean"),
        ({'evaluator.episodes': 0}, 'evaluator.episodes is 0, but experts are compared by evaluations'),
    ],
)
def test_what_cannot_be_compared(values, message):
    with pytest.raises(ConfigError, match=message):
        experts(replace(SMALL, values))


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    """Of real, hardly trained agents; two seeds."""
    return run_sweep(experts(SMALL, seeds=(0, 1)).cells(), tmp_path_factory.mktemp('sweep'), 2)


def test_the_table_has_each_task_of_both(results):
    rows = list(csv.DictReader(results.read_text().splitlines()))
    assert {(row['task'], row['seed']) for row in rows} == {(t, s) for t in (*TASKS, 'minisuite') for s in '01'}
    for row in rows:
        of_tasks = [row[f'final_return/{task}'] for task in TASKS]
        if row['task'] == 'minisuite':
            assert float(row['final_return']) == pytest.approx(np.mean([float(value) for value in of_tasks]))
        else:
            assert set(of_tasks) == {''} and float(row['final_return']) <= 2


def bars(figure):
    """Label of a task -> lengths of its bars (experts', multi-task's)."""
    (axes,) = figure.axes
    count = len(axes.get_yticks())
    lengths = [patch.get_width() for patch in axes.patches]
    assert len(lengths) == 2 * count
    labels = [label.get_text() for label in axes.get_yticklabels()]
    return {label: (lengths[i], lengths[count + i]) for i, label in enumerate(labels)}


def test_the_figure_shows_the_table(results):
    figure = plotting.experts(plotting.read_table(results))
    rows = list(csv.DictReader(results.read_text().splitlines()))

    def mean(column, task):
        finals = {(row['cell'], row[column]) for row in rows if row['task'] == task}
        assert len(finals) == 2
        return np.mean([float(value) for _, value in finals])

    assert figure.get_suptitle() == 'only 2 seeds'
    drawn = bars(figure)
    assert len(drawn) == len(TASKS)
    for task in TASKS:
        expected = mean('final_return', task), mean(f'final_return/{task}', 'minisuite')
        np.testing.assert_allclose(drawn[task.partition('/')[2]], expected)
    gains = [together - alone for alone, together in drawn.values()]
    assert gains == sorted(gains)  # What gains most is on top.
    assert f'better on {sum(gain > 0 for gain in gains)} of 4 tasks' in figure.axes[0].get_title()


def test_the_figure_of_a_run_apart_and_of_human_scores(tmp_path):
    """Pong's random and human scores are -20.7 and 14.6: 14.6 is 100 %."""
    path = tmp_path / 'results.csv'
    path.write_text('cell,task,seed,frames,final_return\na,atari/pong,0,100,14.6\nb,atari/breakout,0,100,1.7\n')
    with pytest.raises(ConfigError, match='has no agent that was trained on all tasks'):
        plotting.experts(plotting.read_table(path))
    row = {'frames': 200, 'mean_return': 0.0, 'mean_return/atari/pong': -20.7, 'mean_return/atari/breakout': 30.5}
    (tmp_path / 'evaluations.jsonl').write_text(json.dumps(row) + '\n')
    figure = plotting.experts(plotting.read_table(path), tmp_path)
    assert bars(figure)['pong'] == pytest.approx((100.0, 0.0), abs=1e-6)
    alone, together = bars(figure)['breakout']
    assert alone == pytest.approx(0.0, abs=1e-6) and together == pytest.approx(100.0)
    assert figure.axes[0].get_xlabel() == 'human-normalised score (%)'

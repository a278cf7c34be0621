"""launch/evaluate.py --suite: every task from one checkpoint, scored as in the paper."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import impala_jax
from impala_jax import evaluation
from impala_jax.checkpoint import CheckpointError
from impala_jax.config import ConfigError
from impala_jax.environments import suites
from impala_jax.scores import human_normalised
from impala_jax.types import ArraySpec, EnvironmentSpec

ROOT = Path(__file__).parent.parent
STAND_INS = ROOT / 'tests' / 'stand_ins'


def trained(workdir, name, **options):
    """A run of one update."""
    config = impala_jax.Config(
        total_frames=1,
        environment=impala_jax.EnvironmentConfig(name=name, level_cache='', **options),
        network=impala_jax.NetworkConfig(torso='mlp', mlp_sizes=(8,), core='lstm', lstm_size=8),
        learner=impala_jax.LearnerConfig(batch_size=4, unroll_length=2, num_devices=1),
        actor=impala_jax.ActorConfig(num_actors=1, num_envs=4),
        evaluator=impala_jax.EvaluatorConfig(episodes=0),
    )
    impala_jax.run(config, workdir, runtime='threads')
    return workdir


@pytest.fixture(scope='module')
def minisuite(tmp_path_factory):
    return trained(tmp_path_factory.mktemp('runs') / 'minisuite', 'minisuite')


@pytest.fixture(scope='module')
def catch(tmp_path_factory):
    return trained(tmp_path_factory.mktemp('runs') / 'catch', 'minisuite/catch')


def test_a_run_on_a_suite_is_evaluated_on_it(minisuite):
    scores = impala_jax.evaluate(minisuite, episodes=6, num_envs=3)
    assert scores == impala_jax.evaluate(minisuite, suite='minisuite', episodes=6, num_envs=3)
    assert scores['environment'] == 'minisuite' and scores['episodes'] == 24
    assert list(scores['tasks']) == [
        f'minisuite/{task}' for task in ('catch', 'catch_memory', 'delayed_bandit', 'go_to_colour')
    ]
    means = [task['mean_return'] for task in scores['tasks'].values()]
    mean = scores['aggregates']['mean_return']
    assert mean['value'] == pytest.approx(sum(means) / 4) == scores['mean_return']
    assert mean['interval'][0] < mean['value'] < mean['interval'][1]
    assert all(task['episodes'] == 6 and task['human_normalised'] is None for task in scores['tasks'].values())


def test_parameters_that_do_not_fit_the_environment_are_one_line(catch, monkeypatch):
    """As when an environment has changed since, or is read in another way."""
    wider = EnvironmentSpec({'board': ArraySpec((9, 5), np.dtype(np.float32))}, 3)
    monkeypatch.setattr(evaluation.environments, 'spec', lambda *_: wider)
    with pytest.raises(CheckpointError, match='holds another state.*MLPTorso_0/Dense_0/kernel') as error:
        impala_jax.evaluate(catch, episodes=3)
    assert '\n' not in str(error.value)


def test_a_run_on_a_single_task_is_evaluated_on_all(catch):
    alone = impala_jax.evaluate(catch, episodes=3)
    assert alone['environment'] == 'minisuite/catch' and 'tasks' not in alone
    assert alone['human_normalised_interval'] is None
    assert len(impala_jax.evaluate(catch, suite='minisuite', episodes=3)['tasks']) == 4


def test_suites_that_cannot_be_played(catch):
    with pytest.raises(ConfigError, match="unknown suite 'minisuit'; did you mean 'minisuite'"):
        impala_jax.evaluate(catch, suite='minisuit')


def test_a_suite_with_other_actions_is_refused(tmp_path):
    workdir = trained(tmp_path / 'run', 'delayed_bandit')
    with pytest.raises(ConfigError, match='delayed_bandit .* minisuite '):
        impala_jax.evaluate(workdir, suite='minisuite')


def script(*arguments):
    environment = os.environ | {'PYTHONPATH': f'{ROOT}:{STAND_INS}', 'COLUMNS': '120'}
    environment.pop('XLA_FLAGS', None)
    return subprocess.run(
        [sys.executable, 'launch/evaluate.py', *map(str, arguments)],
        **{'cwd': ROOT, 'env': environment, 'timeout': 280, 'capture_output': True, 'text': True},
    )


@pytest.fixture
def watermaze(tmp_path, monkeypatch):
    """A run on one level of the stand-in."""
    monkeypatch.syspath_prepend(STAND_INS)
    monkeypatch.delitem(sys.modules, 'deepmind_lab', raising=False)
    yield trained(tmp_path / 'run', 'dmlab/rooms_watermaze', dataset_path='dummy')
    sys.modules.pop('deepmind_lab', None)  # Not by monkeypatch, which would put it back.


def test_levels_are_scored(watermaze, monkeypatch):
    levels = 'dmlab/rooms_collect_good_objects_train', 'dmlab/psychlab_continuous_recognition'
    monkeypatch.setitem(suites.SUITES, 'dmlab30', lambda: levels)
    scores = impala_jax.evaluate(watermaze, suite='dmlab30', episodes=2)
    assert tuple(scores['tasks']) == levels and set(scores['aggregates']) == {'median', 'capped_mean', 'mean'}
    normalised = []
    for task, values in scores['tasks'].items():
        assert -42 <= values['mean_return'] <= 42
        normalised.append(human_normalised(task, values['mean_return']))
        assert values['human_normalised'] == pytest.approx(normalised[-1])
    assert scores['aggregates']['mean']['value'] == pytest.approx(sum(normalised) / 2)


@pytest.mark.slow
def test_all_30_levels_from_the_command_line(watermaze, tmp_path):
    workdir = watermaze
    plot = ['--plot', tmp_path / 'scores.svg'] if importlib.util.find_spec('matplotlib') else []
    done = script(
        '--workdir', workdir, '--suite', 'dmlab30', '--episodes', 1, '--json', tmp_path / 'scores.json', *plot
    )
    assert (done.returncode, done.stderr) == (0, '')
    rows = [line for line in done.stdout.splitlines() if line.startswith('│')]
    assert len(rows) == 30 + 3 and 'rooms_exploit_deferred_effects_test' in rows[1] and 'capped at 100' in rows[31]
    scores = json.loads((tmp_path / 'scores.json').read_text())
    assert len(scores['tasks']) == 30 and set(scores['aggregates']) == {'median', 'capped_mean', 'mean'}
    if plot:
        assert (tmp_path / 'scores.svg').read_bytes().startswith(b'<?xml')


def test_a_figure_of_a_single_task_is_refused_before_any_game(catch, tmp_path):
    pytest.importorskip('matplotlib')
    done = script('--workdir', catch, '--plot', tmp_path / 'a.png')
    assert done.returncode == 1 and done.stdout == ''
    assert "--plot draws the scores of a suite, and 'minisuite/catch' is none; add --suite" in done.stderr
    done = script('--workdir', catch, '--suite', 'minisuite', '--plot', tmp_path / 'a.pdf')
    assert done.returncode == 1 and '--plot' in done.stderr and '.png or .svg' in done.stderr

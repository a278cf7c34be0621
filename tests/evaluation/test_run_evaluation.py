"""launch/evaluate.py --suite: every task from one checkpoint, scored as in the paper."""

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import impala_jax
from impala_jax.config import ConfigError
from impala_jax.environments import EnvironmentFailure, suites
from impala_jax.evaluation import evaluator as evaluation
from impala_jax.evaluation.scores import human_normalised
from impala_jax.rundir.checkpoint import CheckpointError
from impala_jax.types import ArraySpec, EnvironmentSpec
from tests.helpers.programs import ROOT, STAND_INS, finish, start


def run_config(name, episodes=0, **options):
    """Of one update."""
    return impala_jax.Config(
        total_frames=1,
        environment=impala_jax.EnvironmentConfig(name=name, level_cache='', **options),
        network=impala_jax.NetworkConfig(torso='mlp', mlp_sizes=(8,), core='lstm', lstm_size=8),
        learner=impala_jax.LearnerConfig(batch_size=4, unroll_length=2, num_devices=1),
        actor=impala_jax.ActorConfig(num_actors=1, num_envs=4),
        evaluator=impala_jax.EvaluatorConfig(episodes=episodes, num_envs=2),
    )


def trained(workdir, name, **options):
    impala_jax.run(run_config(name, **options), workdir, runtime='threads')
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


TASKS = [f'minisuite/{task}' for task in ('catch', 'catch_memory', 'delayed_bandit', 'go_to_colour')]


class Makes:
    """`environments.make`, which raises the `errors` of tasks in evaluations, and notes the names of the others."""

    def __init__(self, monkeypatch, **errors):
        self.names, self.errors, self._make = [], errors, evaluation.environments.make
        monkeypatch.setattr(evaluation.environments, 'make', self)

    def __call__(self, config, *args, **kwargs):
        name = config.name.removeprefix('minisuite/')
        if kwargs.get('evaluation'):
            if name in self.errors:
                raise self.errors[name]
            self.names.append(name)
        return self._make(config, *args, **kwargs)


def test_an_evaluation_goes_on_where_it_was_stopped(minisuite, tmp_path, monkeypatch):
    """With the scores that it would have had, to the last bit."""
    whole = impala_jax.evaluate(minisuite, episodes=6, num_envs=3)
    partial, makes = tmp_path / 'partial.jsonl', Makes(monkeypatch, delayed_bandit=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        impala_jax.evaluate(minisuite, episodes=6, num_envs=3, partial=partial)
    rows = [json.loads(line) for line in partial.read_text().splitlines()]
    assert [row['task'] for row in rows] == TASKS[:2]
    assert rows[0]['mean_return'] == whole['tasks'][TASKS[0]]['mean_return'] and rows[0]['human_normalised'] is None
    with partial.open('a') as file:
        file.write('{"task": "minisuite/delay')  # Torn by a kill.
    makes.errors = {'go_to_colour': KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        impala_jax.evaluate(minisuite, episodes=6, num_envs=3, partial=partial)
    makes.errors = {}
    makes.names.clear()
    assert impala_jax.evaluate(minisuite, episodes=6, num_envs=3, partial=partial) == whole
    assert makes.names == ['go_to_colour'] and not partial.exists()


@pytest.mark.parametrize('change', [{'seed': 5}, {'episodes': 4}, {'num_envs': 2}, {'greedy': True}])
def test_another_evaluation_starts_from_the_first_task(change, minisuite, tmp_path, monkeypatch, caplog):
    partial, makes = tmp_path / 'partial.jsonl', Makes(monkeypatch, go_to_colour=KeyboardInterrupt())
    settings: dict[str, Any] = {'episodes': 3, 'num_envs': 3, 'seed': 4}
    with pytest.raises(KeyboardInterrupt):
        impala_jax.evaluate(minisuite, partial=partial, **settings)
    makes.errors = {}
    makes.names.clear()
    ((name, value),) = change.items()
    impala_jax.evaluate(minisuite, partial=partial, **{**settings, **change})
    assert len(makes.names) == 4 and not partial.exists()
    (text,) = caplog.messages
    was = {**settings, 'greedy': False}[name]
    assert f'{partial} is from a different evaluation (' in text and f'{name} {was} instead of {value}' in text


def test_a_task_that_fails_is_named_and_costs_the_others_nothing(minisuite, tmp_path, monkeypatch, caplog):
    partial, makes = tmp_path / 'partial.jsonl', Makes(monkeypatch)
    makes.errors = {'catch': TimeoutError('waited 3 s for it'), 'delayed_bandit': ConfigError('it is gone')}
    with pytest.raises(evaluation.TaskFailed) as error:
        impala_jax.evaluate(minisuite, episodes=3, partial=partial)
    assert str(error.value) == (
        'task minisuite/catch fails (as do minisuite/delayed_bandit): waited 3 s for it; 2 other tasks are saved in '
        f'{partial}'
    )
    assert caplog.messages[-1] == 'minisuite/delayed_bandit cannot be played, skipping it: it is gone'
    assert makes.names == ['catch_memory', 'go_to_colour']
    makes.errors = {}
    makes.names.clear()
    assert list(impala_jax.evaluate(minisuite, episodes=3, partial=partial)['tasks']) == TASKS
    assert makes.names == ['catch', 'delayed_bandit']
    # Where nothing could be kept, the first one ends it.
    makes.errors = {'catch_memory': EnvironmentFailure('Traceback ...\nit burns')}
    makes.names.clear()
    with pytest.raises(evaluation.TaskFailed, match='^Traceback ...\ntask minisuite/catch_memory fails: it burns$'):
        impala_jax.evaluate(minisuite, episodes=3)
    assert makes.names == ['catch']


def test_a_video_needs_the_first_task_again(minisuite, tmp_path, monkeypatch):
    pytest.importorskip('imageio')
    partial, makes = tmp_path / 'partial.jsonl', Makes(monkeypatch, go_to_colour=KeyboardInterrupt())
    options: dict[str, Any] = {'episodes': 3, 'partial': partial, 'video': tmp_path / 'game.gif'}
    with pytest.raises(KeyboardInterrupt):
        impala_jax.evaluate(minisuite, **options)
    makes.errors = {}
    makes.names.clear()
    impala_jax.evaluate(minisuite, **options)
    assert makes.names == ['catch', 'go_to_colour'] and (tmp_path / 'game.gif').exists()


def test_the_last_evaluation_of_a_run_goes_on_too(tmp_path, monkeypatch, capsys):
    config = run_config('minisuite', episodes=2)
    makes = Makes(monkeypatch, delayed_bandit=ConfigError('it is gone'))
    with pytest.raises(evaluation.TaskFailed, match='task minisuite/delayed_bandit fails: it is gone'):
        impala_jax.run(config, tmp_path, runtime='lockstep')
    assert not (tmp_path / 'evaluations.jsonl').exists()
    makes.errors = {}
    makes.names.clear()
    capsys.readouterr()
    impala_jax.run(config, tmp_path, runtime='lockstep')
    assert makes.names == ['delayed_bandit'] and not (tmp_path / 'evaluations.partial.jsonl').exists()
    (row,) = (tmp_path / 'evaluations.jsonl').read_text().splitlines()
    assert {f'mean_return/{task}' for task in TASKS} <= set(json.loads(row))
    lines = [line for line in capsys.readouterr().out.splitlines() if 'minisuite/' in line]
    assert [line.split(':')[0] for line in lines] == [f'{i + 1}/4 {task}' for i, task in enumerate(TASKS)]
    assert [line.endswith(' (played before)') for line in lines] == [True, True, False, True]


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


def test_a_killed_evaluation_goes_on_from_the_command_line(minisuite, tmp_path):
    arguments = ['--workdir', minisuite, '--suite', 'minisuite', '--episodes', 800, '--json', tmp_path / 'scores.json']
    process = start(tmp_path, 'launch/evaluate.py', *map(str, arguments))
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        process.kill()
        finish(process)
    finally:
        process.kill()
    assert line.startswith('1/4 minisuite/catch: mean return ')
    assert (tmp_path / 'scores.json.partial.jsonl').read_text().count('\n') < 4
    done = script(*arguments)
    assert (done.returncode, done.stderr) == (0, '')
    lines = [row for row in done.stdout.splitlines() if row[1:2] == '/']
    assert lines[0] == f'{line.rstrip()} (played before)'
    assert lines[3].startswith('4/4 minisuite/go_to_colour: ') and not lines[3].endswith(' (played before)')
    assert json.loads((tmp_path / 'scores.json').read_text())['episodes'] == 3200
    assert not (tmp_path / 'scores.json.partial.jsonl').exists()


def test_a_figure_of_a_single_task_is_refused_before_any_game(catch, tmp_path):
    pytest.importorskip('matplotlib')
    done = script('--workdir', catch, '--plot', tmp_path / 'a.png')
    assert done.returncode == 1 and done.stdout == ''
    assert "--plot draws the scores of a suite, and 'minisuite/catch' is not a suite; add --suite" in done.stderr
    done = script('--workdir', catch, '--suite', 'minisuite', '--plot', tmp_path / 'a.pdf')
    assert done.returncode == 1 and '--plot' in done.stderr and '.png or .svg' in done.stderr

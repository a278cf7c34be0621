"""Many tasks through whole runs: what trajectories, metrics and evaluations say of each task."""

import dataclasses
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest

import impala_jax
from impala_jax import config as config_lib
from impala_jax.cli.command_line import load_config_file
from impala_jax.config import ConfigError, EnvironmentConfig
from impala_jax.environments import suites
from impala_jax.rundir import checkpoint
from impala_jax.rundir.rows import read_rows
from tests.helpers.configs import TASKS, small_suite
from tests.helpers.programs import ROOT
from tests.helpers.runs import rows_of

CONFIGS = ROOT / 'configs'
RUNTIMES = ['lockstep', 'threads', pytest.param('launchpad', marks=pytest.mark.launchpad)]


def run(config, workdir, runtime):
    """In a process of its own if Launchpad runs it, which takes over the signals that pytest-timeout needs."""
    if runtime != 'launchpad':
        impala_jax.run(config, workdir, runtime)
        return
    code = f"""
import impala_jax
from impala_jax import config
impala_jax.run(config.from_dict({config_lib.to_dict(config)!r}), {str(workdir)!r}, 'launchpad')
"""
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr


PLAIN: dict[str, Any] = {}
POPART_AND_REPLAY: dict[str, Any] = {
    'popart': impala_jax.PopArtConfig(enabled=True),
    'replay': impala_jax.ReplayConfig(fraction=0.5, capacity=20),
    'learner': impala_jax.LearnerConfig(batch_size=16, unroll_length=10, num_devices=1),
}


@pytest.mark.parametrize(
    'runtime, changes',
    [
        ('lockstep', PLAIN),
        ('threads', POPART_AND_REPLAY),
        pytest.param('launchpad', POPART_AND_REPLAY, marks=pytest.mark.launchpad),
    ],
)
def test_a_run_reports_each_task(runtime, changes, tmp_path):
    run(small_suite(**changes), tmp_path, runtime)
    row = rows_of(tmp_path)[-1]
    for name in ('episode_return_last_100', 'episode_return_last_100/minisuite/go_to_colour', 'suite_return_last_100'):
        assert name in row
    found = {name for row in rows_of(tmp_path) for name in row}
    assert {name for name in found if name.startswith('episode_return/')} == {f'episode_return/{t}' for t in TASKS}
    np.testing.assert_allclose(
        row['suite_return_last_100'], np.mean([row[f'episode_return_last_100/{task}'] for task in TASKS]), rtol=1e-6
    )
    assert row['frames'] == 1600
    evaluation = read_rows(tmp_path / 'evaluations.jsonl')[-1]
    assert evaluation['episodes'] == 12
    np.testing.assert_allclose(
        evaluation['mean_return'], np.mean([evaluation[f'mean_return/{task}'] for task in TASKS]), rtol=1e-6
    )
    scores = impala_jax.evaluate(tmp_path, episodes=2)
    assert tuple(scores['tasks']) == TASKS and scores['episodes'] == 8
    assert all(scores['tasks'][task]['episodes'] == 2 for task in TASKS)
    catch = scores['tasks']['minisuite/catch']
    assert {catch['min_return'], catch['max_return']} <= {-1.0, 1.0}


def test_lockstep_resumes_bit_for_bit(tmp_path):
    config = small_suite(
        **POPART_AND_REPLAY,
        optimizer=impala_jax.OptimizerConfig(schedule='constant'),
        evaluator=impala_jax.EvaluatorConfig(episodes=0),
    )
    impala_jax.run(config, tmp_path / 'whole', runtime='lockstep')
    for frames in (800, 1600):
        impala_jax.run(dataclasses.replace(config, total_frames=frames), tmp_path / 'parts', runtime='lockstep')
    whole, parts = (checkpoint.restore(tmp_path / name, {'learner': None}).state for name in ('whole', 'parts'))
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    assert whole['learner']['popart']['mean'].shape == (4,)
    times = ('wall_time_s', 'frames_per_second', 'learner_wait_fraction')
    rows = [rows_of(tmp_path / name)[-1] for name in ('whole', 'parts')]
    whole_row, parts_row = ({name: row[name] for name in row if name not in times} for row in rows)
    assert whole_row == parts_row


@pytest.mark.parametrize('runtime', RUNTIMES)
def test_too_few_environments_are_refused_before_any_work(runtime, tmp_path):
    config = small_suite(actor=impala_jax.ActorConfig(num_actors=1, num_envs=2))
    with pytest.raises(ConfigError, match='minisuite has 4 tasks, but there are 2 .*actor.num_envs that works is 4'):
        impala_jax.run(config, tmp_path / 'run', runtime=runtime)
    assert not (tmp_path / 'run').exists()


@pytest.mark.slow
@pytest.mark.atari
def test_eight_games_at_once(monkeypatch, tmp_path):
    games = suites.tasks(EnvironmentConfig('atari57'))[::8]
    monkeypatch.setitem(suites.SUITES, 'atari57', lambda: games)
    config = load_config_file(str(CONFIGS / 'atari57.py'))
    config = dataclasses.replace(
        config,
        total_frames=20_000,
        learner=dataclasses.replace(config.learner, num_devices=1),
        actor=impala_jax.ActorConfig(num_actors=2, num_envs=4),
    )
    assert len(games) == 8
    assert impala_jax.run(config, tmp_path, runtime='threads').frames >= 20_000
    parameters = checkpoint.restore(tmp_path, {'learner': {'params': None}}).state['learner']['params']['params']
    assert parameters['policy']['bias'].shape == (18,)

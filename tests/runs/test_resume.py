"""Starting again: what is refused changes nothing, and what is resumed is the run that was stopped."""

import dataclasses
import logging
import re
import signal

import numpy as np
import pytest

from impala_jax import config, run
from impala_jax.config import CheckpointConfig, ConfigError, EnvironmentConfig, EvaluatorConfig, ReplayConfig
from impala_jax.rundir import checkpoint
from impala_jax.rundir.checkpoint import Checkpointer, CheckpointError
from impala_jax.runtimes import nodes
from impala_jax.runtimes.nodes import REPLAY as REPLAY_FOLDER
from impala_jax.studies import ablation
from tests.helpers import runs
from tests.helpers.configs import small
from tests.helpers.programs import ROOT, finish, marked_processes, wait_for
from tests.helpers.runs import ENDLESS, REPLAY, SMALL, files, learned, rows_of, start, train
from tests.helpers.runs import assert_same as assert_same_run

RUNTIMES = [
    'threads',
    pytest.param('ray', marks=pytest.mark.ray),
    pytest.param('launchpad', marks=pytest.mark.launchpad),
]


TORSO = """
import os
from flax import linen as nn

class Torso(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(int(os.environ['SIZE']))(x.reshape(len(x), -1))
"""


# What is refused.


def change(**values):
    return lambda _: config.replace(small(), values)


def shape_of_another_version(workdir):
    """The same configuration, but a state of another shape."""
    folder = workdir / checkpoint.DIRECTORY
    Checkpointer(folder, small(), keep=2).save(100, {'learner': np.zeros(3), 'runtime': None}, {})
    return small()


def all_damaged(workdir):
    for path in workdir.glob('checkpoints/*/checkpoint.json'):
        path.write_text('{}')
    return small()


@pytest.mark.parametrize(
    ('runtime', 'prepare', 'message'),
    [
        ('lockstep', change(seed=1), 'seed: 0 in the checkpoint, 1 now'),
        ('threads', change(seed=1), 'seed: 0 in the checkpoint, 1 now'),
        pytest.param('launchpad', change(seed=1), 'seed: 0 in the checkpoint, 1 now', marks=pytest.mark.launchpad),
        ('threads', shape_of_another_version, 'holds another state'),
        ('lockstep', all_damaged, 'no checkpoint in .* is good'),
        ('lockstep', change(**{'actor.num_envs': 4}), 'actor.num_envs is 2 in the checkpoint, 4 now'),
        ('lockstep', change(**{'actor.num_actors': 2}), 'actor.num_actors is 1 in the checkpoint, 2 now'),
    ],
)
def test_a_refused_resume_changes_nothing(runtime, prepare, message, tmp_path):
    run(small(), tmp_path, 'lockstep')
    with (tmp_path / 'metrics.jsonl').open('a') as file:
        file.write('{"frames": 1000000}\n{"torn')  # Beyond the checkpoint, and so dropped by an accepted resume.
    (tmp_path / 'checkpoints' / '.temporary-000000007-1').mkdir()
    changed = prepare(tmp_path)
    before = files(tmp_path)
    with pytest.raises((ConfigError, CheckpointError), match=message) as error:
        run(changed, tmp_path, runtime)
    assert '\n' not in str(error.value)
    assert files(tmp_path) == before
    if prepare is not all_damaged and prepare is not shape_of_another_version:
        run(small(total_frames=440), tmp_path, 'lockstep')
        assert [row['frames'] for row in rows_of(tmp_path)] == [200, 400, 440]


@pytest.mark.launchpad
def test_what_only_the_learner_refuses_is_one_line_under_launchpad(tmp_path):
    (tmp_path / 'torso.py').write_text(TORSO)
    arguments = [*SMALL, '--runtime', 'launchpad', '--network.torso', 'torso:Torso']
    path = f'{ROOT}:{tmp_path}'
    train(tmp_path / 'run', *arguments, environment={'PYTHONPATH': path, 'SIZE': '8'})
    process = start(tmp_path / 'run', *arguments, environment={'PYTHONPATH': path, 'SIZE': '9'})
    code, _, stderr = finish(process)
    (line,) = stderr.splitlines()
    assert code == 1 and line.startswith('error: checkpoint ') and 'holds another state' in line


@pytest.mark.parametrize('runtime', ['threads', 'lockstep'])
def test_a_refused_start_leaves_no_folder(runtime, tmp_path):
    with pytest.raises(ConfigError):
        run(config.replace(small(), {'learner.num_devices': 99, 'learner.batch_size': 99}), tmp_path / 'run', runtime)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('runtime', ['lockstep', 'threads'])
def test_a_finished_run_repeats_no_row(runtime, tmp_path):
    settings = small(evaluator=EvaluatorConfig(episodes=3))
    first = run(settings, tmp_path, runtime).evaluation
    before = {path: path.read_bytes() for path in tmp_path.glob('*.json*')}
    assert len((tmp_path / 'evaluations.jsonl').read_text().splitlines()) == 1
    again = run(settings, tmp_path, runtime).evaluation
    assert first is not None and first == again
    assert {path: path.read_bytes() for path in tmp_path.glob('*.json*')} == before


@pytest.mark.slow
@pytest.mark.launchpad
def test_processes_end_with_the_one_that_launched_them(tmp_path):
    """Otherwise a learner without a launcher goes on beside the next one."""
    process = start(tmp_path, *ENDLESS, '--runtime', 'launchpad', '--launch-type', 'local_mp')
    wait_for(lambda: rows_of(tmp_path), process)
    process.kill()
    finish(process)
    wait_for(lambda: not marked_processes(tmp_path), timeout_s=20)
    train(tmp_path, *ENDLESS, '--runtime', 'threads', '--total-frames', '100')


# Replay.


def saved_replay(workdir):
    """The versions of the trajectories that are saved, the oldest first."""
    settings = checkpoint.load_config(workdir)
    saved = Checkpointer(workdir / REPLAY_FOLDER, settings, keep=1).restore_latest({'runtime': None})
    assert saved is not None
    leaves = saved.state['runtime']['leaves']
    (versions,) = (leaf for leaf in leaves.values() if leaf.ndim == 1 and leaf.dtype == np.int32 and leaf.any())
    return versions


@pytest.mark.parametrize('runtime', runs.RUNTIMES, ids=runs.IDS)
def test_replay_is_resumed(runtime, tmp_path):
    arguments = [*runtime, '--learner.batch-size', '8', '--replay.fraction', '0.5', *SMALL[4:]]
    arguments += ['--optimizer.schedule', 'constant']
    process = start(tmp_path, '--total-frames', '100000000', *arguments, '--logging.interval-s', '0.1')
    wait_for(lambda: any(row['replay_size'] > 500 for row in rows_of(tmp_path)), process)
    process.send_signal(signal.SIGTERM)
    code, _, stderr = finish(process)
    assert code == 128 + signal.SIGTERM, stderr
    versions = saved_replay(tmp_path)
    assert len(versions) > 500
    stopped_at = checkpoint.steps(tmp_path / 'checkpoints')[-1]
    assert 0 <= versions[0] < versions[-1] <= stopped_at
    train(tmp_path, '--total-frames', str((stopped_at + 10) * 40), *arguments)
    row = rows_of(tmp_path)[-1]
    assert row['learner_steps'] == stopped_at + 10
    # Four new ones an update, and those of the batches that were on their way.
    assert len(versions) + 10 * 4 <= row['replay_size'] <= min(len(versions) + 100 * 4, 10_000)
    resumed = saved_replay(tmp_path)
    assert resumed[: len(versions)].tolist() == versions.tolist()
    assert len(resumed) >= row['replay_size']
    assert not marked_processes(tmp_path)


@pytest.mark.parametrize('saved', [None, 3])
def test_replay_that_was_not_saved_is_told(saved, tmp_path, caplog):
    settings = small(replay=ReplayConfig(fraction=0.5), total_frames=200)
    run(settings, tmp_path, 'threads')
    (folder,) = (tmp_path / REPLAY_FOLDER).iterdir()
    folder = folder.rename(folder.with_name('away'))
    if saved is not None:
        state = {'leaves': {}}
        Checkpointer(tmp_path / REPLAY_FOLDER, settings, keep=1).save(saved, {'runtime': state}, {})
    caplog.clear()
    run(dataclasses.replace(settings, total_frames=240), tmp_path, 'threads')
    (message,) = [record.getMessage() for record in caplog.records if 'replay' in record.getMessage()]
    expected = 'starts again with new traj' if saved is None else r'continues from update 3 of 10: .* was killed since'
    assert re.search(expected, message) and '\n' not in message


# Lockstep.


def test_lockstep_resumes_bit_for_bit_after_a_failure(tmp_path):
    """In an environment, in the middle of an unroll; from a checkpoint written before."""
    environment = '--environment.name tests.helpers.factories:flaky --environment.processes 1'
    flaky = [*environment.split(), '--checkpoint.interval-s', '0.05', '--total-frames', '2000']
    train(tmp_path / 'unbroken', *REPLAY, *flaky)
    # An unroll of two environments has 18 steps that are not resets; each environment fails three times in a row.
    failed = start(tmp_path / 'run', *REPLAY, *flaky, environment={'FLAKY_AFTER': str(38 * 18 + 5)})
    code, _, stderr = finish(failed)
    assert code == 1 and 'the emulator is on fire' in stderr.strip().splitlines()[-1]
    assert 'resumes from the last checkpoint' in stderr
    assert 0 < checkpoint.steps(tmp_path / 'run' / 'checkpoints')[-1] < 50
    train(tmp_path / 'run', *REPLAY, *flaky)
    assert_same_run(learned(tmp_path / 'unbroken'), learned(tmp_path / 'run'))


def test_a_failure_without_a_whole_checkpoint_keeps_what_is_the_learners(tmp_path, monkeypatch, caplog):
    """Environments that cannot be saved: parameters, their history and replay are; new episodes start, as told."""
    settings = small(policy_lag=3, replay=ReplayConfig(fraction=0.5), environment=EnvironmentConfig(name='catch'))
    monkeypatch.setattr(nodes.Actor, 'get_state', lambda _: (_ for _ in ()).throw(NotImplementedError('no states')))
    unroll, count = nodes.Actor.unroll, []

    def fail_at_last(self, *args):
        count.append(1)
        if len(count) > 8:
            raise ZeroDivisionError
        return unroll(self, *args)

    monkeypatch.setattr(nodes.Actor, 'unroll', fail_at_last)
    with pytest.raises(ZeroDivisionError):
        run(settings, tmp_path, 'lockstep')
    (record,) = caplog.records
    assert 'will start new episodes: no states' in record.getMessage()
    saved = checkpoint.restore(tmp_path, {'runtime': None})
    assert saved.step == 8
    assert sorted(saved.state['runtime']['history']) == ['5', '6', '7', '8']
    assert saved.state['runtime']['replay']['counts'].tolist() == [16, 8]
    monkeypatch.setattr(nodes.Actor, 'unroll', unroll)
    run(settings, tmp_path, 'lockstep')
    assert [row['policy_lag_max'] for row in rows_of(tmp_path)][1:] == [3] * (len(rows_of(tmp_path)) - 1)


def test_a_cell_that_failed_goes_on_as_the_same_experiment(tmp_path, monkeypatch):
    values = {'checkpoint': CheckpointConfig(interval_s=0.05), 'policy_lag': 4, 'replay': ReplayConfig(fraction=0.5)}
    environment = EnvironmentConfig(name='tests.helpers.factories:flaky', processes=1)
    cells = ablation.Grid({'flaky': small(total_frames=800, environment=environment, **values)}, {'seed': (0,)}).cells()
    unbroken = ablation.run_sweep(cells, tmp_path / 'unbroken', 1).read_text()
    monkeypatch.setenv('FLAKY_AFTER', '601')
    with pytest.raises(ablation.CellFailed, match='the emulator is on fire'):
        ablation.run_sweep(cells, tmp_path / 'sweep', 1)
    (folder,) = (tmp_path / 'sweep').glob('cells/*')
    assert checkpoint.steps(folder / checkpoint.DIRECTORY)
    monkeypatch.delenv('FLAKY_AFTER')
    assert ablation.run_sweep(cells, tmp_path / 'sweep', 1).read_text() == unbroken


def test_a_cell_whose_environments_cannot_be_saved_starts_again(tmp_path):
    cell = ablation.Grid({'catch': small(total_frames=400)}, {'seed': (0,)}).cells()[0]
    workdir = tmp_path / 'cells' / cell.id
    unbroken = ablation.run_sweep([cell], tmp_path / 'unbroken', 1).read_text()
    # As one that was stopped, with nothing of the environments in its checkpoint.
    run(dataclasses.replace(cell.config, total_frames=200), workdir, 'threads')
    assert ablation.run_sweep([cell], tmp_path, 1).read_text() == unbroken
    assert 'the cell restarts' in (workdir / 'log.txt').read_text()


# Schedules.


def schedules(**values):
    fields = {'optimizer.schedule': 'linear', 'optimizer.learning_rate': 1e-3, 'loss.entropy_schedule': 'linear'}
    return config.replace(small(), fields | values)


def test_a_schedule_that_jumps_is_told(tmp_path, caplog):
    settings = schedules()
    run(settings, tmp_path, 'lockstep')
    caplog.clear()
    run(dataclasses.replace(settings, total_frames=800), tmp_path, 'lockstep')
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(messages) == 2
    assert messages[0].startswith('the learning rate jumps back from 0 to 0.0005 at 400 frames')
    assert messages[1].startswith('the entropy cost jumps back from 0 to 0.005 at 400 frames')
    assert not any('\n' in message for message in messages)


def test_schedule_frames_keep_a_schedule(tmp_path, caplog):
    settings = schedules(**{'optimizer.schedule_frames': 800})
    run(settings, tmp_path / 'prolonged', 'lockstep')
    run(dataclasses.replace(settings, total_frames=800), tmp_path / 'prolonged', 'lockstep')
    assert not caplog.records
    run(schedules(total_frames=800), tmp_path / 'at_once', 'lockstep')
    assert_same_run(learned(tmp_path / 'prolonged'), learned(tmp_path / 'at_once'))
    rates = [row['learning_rate'] for row in rows_of(tmp_path / 'prolonged')]
    assert rates == pytest.approx([1e-3 * (1 - (i - 1) / 20) for i in (5, 10, 15, 20)])


def test_a_schedule_that_ends_before_training_is_refused():
    message = 'optimizer.schedule_frames 300 is below total_frames 400: the learning rate would be 0'
    with pytest.raises(ConfigError, match=message):
        schedules(**{'optimizer.schedule_frames': 300})
    schedules(**{'optimizer.schedule_frames': 300, 'optimizer.schedule': 'constant'})

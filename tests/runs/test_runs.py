"""Whole runs through the real command line: they repeat, resume, fail and end as promised."""

import dataclasses
import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import impala_jax
from impala_jax.environments import EnvironmentFailure
from impala_jax.rundir import checkpoint
from tests.helpers.programs import finish, marked_processes, wait_for
from tests.helpers.runs import (
    ENDLESS,
    IDS,
    REPLAY,
    RUNTIMES,
    SMALL,
    assert_same,
    learned,
    rows_of,
    start,
    train,
)


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    """With replay and lag. Sweeps (tests/studies) repeat and resume runs without."""
    workdir = tmp_path_factory.mktemp('uninterrupted')
    train(workdir, *REPLAY)
    return learned(workdir)


def test_lockstep_repeats_bit_for_bit(uninterrupted, tmp_path):
    train(tmp_path, *REPLAY)
    assert_same(uninterrupted, learned(tmp_path))
    assert uninterrupted[0][-1]['frames'] == 4000 and len(uninterrupted[0]) == 25


def test_lockstep_resumes_bit_for_bit_after_sigterm_to_the_group(uninterrupted, tmp_path):
    """As a shell, a container or a batch system sends it. The workers of the environments are left to the run."""
    in_workers = [*REPLAY, '--environment.processes', '2']
    process = start(tmp_path, *in_workers, prefix=['setsid'])
    wait_for(lambda: len(rows_of(tmp_path)) >= 5, process)
    os.killpg(process.pid, signal.SIGTERM)
    code, _, stderr = finish(process)
    assert code == 128 + signal.SIGTERM, stderr
    assert 'resumes' in stderr.splitlines()[-1]
    assert 0 < checkpoint.steps(tmp_path / 'checkpoints')[-1] < 100, 'it was over before the signal came'
    train(tmp_path, *in_workers)
    assert_same(uninterrupted, learned(tmp_path))


def test_lockstep_resumes_after_sigkill(uninterrupted, tmp_path):
    often = ['--checkpoint.interval-s', '0.05']
    process = start(tmp_path, *REPLAY, *often)
    wait_for(lambda: len(checkpoint.steps(tmp_path / 'checkpoints')) >= 2 and len(rows_of(tmp_path)) >= 3, process)
    process.kill()
    finish(process)
    train(tmp_path, *REPLAY, *often)
    assert_same(uninterrupted, learned(tmp_path))


@pytest.mark.parametrize('lag', [0, 1, 3])
def test_policy_lag_is_exact(lag, tmp_path):
    config = impala_jax.Config(
        total_frames=8 * 40,
        environment=impala_jax.EnvironmentConfig(name='catch'),
        network=impala_jax.NetworkConfig(torso='mlp', mlp_sizes=(8,)),
        learner=impala_jax.LearnerConfig(batch_size=4, unroll_length=10, num_devices=1),
        actor=impala_jax.ActorConfig(num_actors=1, num_envs=4),
        evaluator=impala_jax.EvaluatorConfig(episodes=0),
        logging=impala_jax.LoggingConfig(interval_updates=1),
        policy_lag=lag,
    )
    impala_jax.run(config, tmp_path, runtime='lockstep')
    lags = [(row['policy_lag_min'], row['policy_lag_mean'], row['policy_lag_max']) for row in rows_of(tmp_path)]
    assert lags == [(min(i, lag),) * 3 for i in range(8)]


@pytest.mark.parametrize('runtime', RUNTIMES, ids=IDS)
def test_a_run_leaves_what_is_promised(runtime, tmp_path):
    """Four new trajectories an update, and four old ones beside them."""
    options = '--learner.batch-size 8 --replay.fraction 0.5 --evaluator.episodes 3'.split()
    # Also the run in which rlax is loaded, before Launchpad's TensorFlow.
    other = [] if 'local_mp' in runtime else ['--vtrace.implementation', 'rlax']
    stdout = train(tmp_path, *SMALL, *runtime, *options, *other)
    assert 'python launch/evaluate.py' in stdout
    row = rows_of(tmp_path)[-1]
    assert row['frames'] == 1600 and row['learner_steps'] == 40
    missing = set(
        'frames learner_steps wall_time_s frames_per_second episodes episode_return policy_lag_mean policy_lag_max '
        'loss policy_loss baseline_loss entropy grad_norm learning_rate learner_wait_fraction'.split()
    ) - set(row)
    assert not missing - {'episode_return'}, missing
    assert 'replay_lag_mean' in row
    assert 'versions' in json.loads((tmp_path / 'config.json').read_text())
    evaluation = json.loads((tmp_path / 'evaluations.jsonl').read_text().splitlines()[-1])
    assert evaluation['episodes'] == 3 and evaluation['frames'] == 1600
    assert checkpoint.steps(tmp_path / 'checkpoints')[-1] == 40
    assert list((tmp_path / 'tensorboard').iterdir())
    assert not marked_processes(tmp_path)
    # The same command again has nothing left to do, says so by ending well, and writes no row again.
    before = {path: path.read_bytes() for path in tmp_path.glob('*.json*')}
    assert 'Trained' in train(tmp_path, *SMALL, *runtime, *options, *other)
    assert {path: path.read_bytes() for path in tmp_path.glob('*.json*')} == before


@pytest.mark.parametrize('runtime', RUNTIMES, ids=IDS)
def test_an_exception_in_an_actor_ends_the_run(runtime, tmp_path):
    failure_time = tmp_path / 'failure_time'
    workdir = tmp_path / 'run'
    process = start(
        workdir,
        *ENDLESS,
        *runtime,
        *['--environment.name', 'tests.helpers.factories:fails_and_notes_when', '--environment.processes', '1'],
        environment={'FAILURE_TIME': str(failure_time)},
    )
    code, stdout, stderr = finish(process)
    ended = time.time()
    assert code not in (0, None), stdout + stderr
    assert 'Traceback' in stderr
    assert 'ZeroDivisionError: the emulator is on fire' in stderr.strip().splitlines()[-1]
    assert ended - float(failure_time.read_text()) < 10
    assert not marked_processes(workdir)


@pytest.mark.slow
@pytest.mark.launchpad
def test_a_killed_actor_process_ends_the_run(tmp_path):
    process = start(tmp_path, *ENDLESS, '--runtime', 'launchpad', '--launch-type', 'local_mp')
    wait_for(lambda: rows_of(tmp_path), process)
    children = [pid for pid in marked_processes(tmp_path) if is_actor(pid)]
    os.kill(int(children[0]), signal.SIGKILL)
    code, _, stderr = finish(process)
    assert code == 1, stderr
    reason = r'error: actor \d \(process \d+\) was killed by signal 9 \(SIGKILL\), as .* when memory runs out'
    assert re.fullmatch(reason, stderr.splitlines()[-1]), stderr
    assert checkpoint.steps(tmp_path / 'checkpoints')
    assert not marked_processes(tmp_path)


def is_actor(pid):
    """Whether this is the Python process of an actor: Launchpad names each node to the shell around its shell."""
    if Path(f'/proc/{pid}/comm').read_text() in ('bash\n', 'decorate_output\n', 'python\n', 'sed\n'):
        return False
    return b'actor/' in Path(f'/proc/{parent_of(parent_of(pid))}/cmdline').read_bytes()


def parent_of(pid):
    return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[1]


@pytest.mark.parametrize('runtime', RUNTIMES, ids=IDS)
def test_a_signal_saves_and_leaves_nothing_behind(runtime, tmp_path):
    """As by Ctrl-C, and by a terminal that is closed; all signals have the same handler."""
    number = signal.SIGINT if runtime[-1] in ('ray', 'local_mp') else signal.SIGHUP
    process = start(tmp_path, *ENDLESS, *runtime)
    wait_for(lambda: rows_of(tmp_path), process)
    process.send_signal(number)
    sent = time.monotonic()
    code, _, stderr = finish(process)
    assert code == 128 + number, stderr
    assert stderr.splitlines()[-1].startswith(f'stopped by signal {number:d} at '), stderr
    assert time.monotonic() - sent < 20
    assert not marked_processes(tmp_path)
    saved = checkpoint.steps(tmp_path / 'checkpoints')[-1]
    row = rows_of(tmp_path)[-1]
    assert saved >= row['learner_steps'] > 0 and 'replay_lag_mean' not in row


def test_a_signal_in_the_last_evaluation(tmp_path):
    """One line and 128 + n; the same command again evaluates, and is done."""
    endless = '--environment.name tests.helpers.hostile:endless --network.torso mlp --evaluator.max-episode-steps'
    arguments = [*SMALL, '--runtime', 'lockstep', '--evaluator.episodes', '2', *endless.split()]
    process = start(tmp_path, *arguments, '1000000000')
    wait_for(lambda: checkpoint.steps(tmp_path / 'checkpoints') == [40], process)
    time.sleep(1.0)  # Whether it hits the evaluation's first or its thousandth step, the promise is the same.
    process.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    code, _, stderr = finish(process)
    assert time.monotonic() - sent < 20
    assert code == 128 + signal.SIGTERM, stderr
    assert stderr.splitlines()[-1].startswith('stopped by signal 15 at 1,600 frames; the same command resumes')
    assert 'Traceback' not in stderr
    assert not (tmp_path / 'evaluations.jsonl').exists() and not marked_processes(tmp_path)
    code, _, stderr = finish(start(tmp_path, *arguments, '50'))
    assert code == 0, stderr
    assert json.loads((tmp_path / 'evaluations.jsonl').read_text())['truncated_episodes'] == 2


def small_config(name='catch', **learner):
    return impala_jax.Config(
        total_frames=2000,
        environment=impala_jax.EnvironmentConfig(name=name),
        network=impala_jax.NetworkConfig(torso='mlp', mlp_sizes=(8,)),
        learner=impala_jax.LearnerConfig(batch_size=4, unroll_length=10, num_devices=1, **learner),
        actor=impala_jax.ActorConfig(num_actors=2, num_envs=2),
        evaluator=impala_jax.EvaluatorConfig(episodes=4, num_envs=2),
    )


def test_a_run_in_this_process_ends_its_threads(tmp_path):
    before = set(threading.enumerate())
    for i in range(2):
        result = impala_jax.run(small_config(), tmp_path / str(i), runtime='threads')
        assert result.learner_steps == 50 and result.frames == 2000
        assert result.evaluation is not None and len(result.evaluation.returns) == 4
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize('runtime', ['threads', 'lockstep'])
def test_gradients_that_are_never_finite_end_the_run(runtime, tmp_path):
    config = small_config('tests.helpers.factories:rewards_huge', max_nonfinite_updates=5)
    config = dataclasses.replace(config, loss=impala_jax.LossConfig(reward_clip='none'))
    with pytest.raises(RuntimeError, match='learner.max_nonfinite_updates'):
        impala_jax.run(config, tmp_path, runtime=runtime)
    parameters = checkpoint.restore(tmp_path, {'learner': {'params': None, 'skipped': np.int32(0)}}).state['learner']
    assert parameters['skipped'] >= 5
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(parameters['params']))


@pytest.mark.parametrize('runtime', ['threads', 'lockstep'])
def test_rewards_that_are_not_finite_end_the_run(runtime, tmp_path):
    with pytest.raises(EnvironmentFailure, match='failed 3 times .*: the reward is nan'):
        impala_jax.run(small_config('tests.helpers.factories:rewards_nan'), tmp_path, runtime=runtime)


@pytest.mark.parametrize('runtime', RUNTIMES[:3], ids=IDS[:3])
def test_an_environment_that_keeps_failing_is_reported_and_ends_the_run(runtime, tmp_path):
    exits = '--environment.name tests.helpers.hostile:exits_later --network.torso mlp'.split()
    code, _, stderr = finish(start(tmp_path / 'run', *ENDLESS, *exits, *runtime))
    assert code == 1
    lines = stderr.rstrip('\n').splitlines()
    assert "of 'tests.helpers.hostile:exits_later' failed at step 3 and is rebuilt: SystemExit: 0" in stderr
    assert re.fullmatch(
        r"(error: )?environment \d+ of 'tests.helpers.hostile:exits_later' failed 3 times .*at step 3: SystemExit: 0",
        lines[-1],
    )
    assert not marked_processes(tmp_path / 'run')


@pytest.mark.parametrize('runtime', RUNTIMES[:3], ids=IDS[:3])
def test_an_environment_that_hangs_ends_the_run_in_one_line(runtime, tmp_path):
    hangs = '--environment.name tests.helpers.hostile:hangs_later --network.torso mlp --timeout-s 15'.split()
    code, _, stderr = finish(start(tmp_path / 'run', *ENDLESS, *hangs, *runtime))
    assert code == 1
    assert 'Traceback' not in stderr
    # Actor and learner both wait; either may say so first.
    worker_waits = "waited 15 s for the worker .* of 'tests.helpers.hostile:hangs_later' to answer 'step'"
    assert re.match(f'error: ({worker_waits}|the learner waited 15 s for actors)', stderr.rstrip('\n').splitlines()[-1])
    assert not marked_processes(tmp_path / 'run')

"""Several hosts: they learn as one, tell each other why they end, and resume together."""

import json
import os
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from impala_jax.build import make_agent, make_learner
from impala_jax.cli import command_line
from impala_jax.config import Config, ConfigError, LearnerConfig
from impala_jax.evaluation.run_evaluation import evaluate
from impala_jax.kernels import cpu
from impala_jax.rundir import checkpoint
from impala_jax.runtimes import pod, supervisor
from tests.helpers import programs
from tests.helpers.batches import NETWORK, SPEC, make_batch
from tests.helpers.pod_learner import CONFIG, NUM_UPDATES
from tests.helpers.programs import ROOT, finish, marked_processes, wait_for
from tests.helpers.runs import rows_of

TWO_BY_TWO = ['--simulate-hosts', '2', '--simulate-devices', '2']
SMALL = '--evaluator.episodes 4 --actor.num-actors 1 --actor.num-envs 8 --network.mlp-sizes 16'.split()
RUNTIMES = [
    'threads',
    pytest.param('ray', marks=[pytest.mark.ray, pytest.mark.slow]),
    pytest.param('launchpad', marks=[pytest.mark.launchpad, pytest.mark.slow]),
]


def free_address():
    return f'localhost:{supervisor.free_port()}'


def learned_alone(num_devices):
    learner = make_learner(CONFIG, make_agent(NETWORK, SPEC), jax.devices()[:num_devices])
    state = learner.init(jax.random.PRNGKey(0))
    start = jax.tree.leaves(jax.tree.map(np.array, state.params))
    losses = []
    for i in range(NUM_UPDATES):
        state, logs = learner.update(state, make_batch(i))
        losses.append(float(logs['loss']))
    return start, [np.array(leaf) for leaf in jax.tree.leaves(state)], losses


def test_one_process_four_devices_and_two_hosts_learn_the_same(tmp_path):
    """The same global batches and seed; what the hosts share is the same on both, and so is the decision to stop."""
    address = free_address()
    two_devices = {'XLA_FLAGS': '--xla_force_host_platform_device_count=2'}
    files = [tmp_path / f'{host}.npz' for host in range(2)]
    hosts = [
        programs.start(
            tmp_path, '-m', 'tests.helpers.pod_learner', str(host), address, str(file), environment=two_devices
        )
        for host, file in enumerate(files)
    ]
    start, alone, losses = learned_alone(1)
    _, split, _ = learned_alone(4)
    for host in hosts:
        code, stdout, stderr = finish(host, 120)
        assert code == 0, stdout + stderr
    first, second = (dict(np.load(file)) for file in files)
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], name)
    together = [first[f'leaf/{i}'] for i in range(len(alone))]
    for a, b, c in zip(alone, split, together, strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-5)
        np.testing.assert_allclose(c, a, rtol=0, atol=1e-5)
    assert max(np.abs(a - b).max() for a, b in zip(start, alone, strict=False)) > 0.05
    for i in range(NUM_UPDATES):
        batch = make_batch(i)
        np.testing.assert_allclose(first[f'loss/{i}'], losses[i], rtol=1e-4)
        np.testing.assert_array_equal(first[f'version/{i}'], batch.version)
        np.testing.assert_array_equal(first[f'return/{i}'], batch.info.episode_return)
        assert first[f'waited_s/{i}'] == i + 1  # Of the one that waited longest.
    assert not first['has_learned']
    for i, leaf in enumerate(together):
        np.testing.assert_array_equal(first[f'stopped_leaf/{i}'], leaf)


def start(workdir, *arguments, runtime='threads', hosts=TWO_BY_TWO, environment=None):
    command = ['launch/tpu_pod.py', '--config', 'configs/catch.py', '--workdir', str(workdir), '--runtime', runtime]
    return programs.start(workdir, *command, *SMALL, *hosts, *arguments, environment=environment)


def by_hand(i, address):
    """The options of one of two hosts on two machines."""
    return ['--coordinator', address, '--num-hosts', '2', '--host-id', str(i)]


def steps_of(workdir):
    return checkpoint.steps(workdir / 'checkpoints')


def pid_of(workdir, host, *, is_program):
    """Of a simulated host: its program, or the supervisor of that."""
    for pid in marked_processes(workdir):
        words = Path(f'/proc/{pid}/cmdline').read_text().split('\0')
        if '--host-id' in words and words[words.index('--host-id') + 1] == str(host):
            if ('--supervisor' in words) == is_program and 'launch/tpu_pod.py' in words:
                return int(pid)
    raise AssertionError(f'there is no host {host}')


ENDLESS = '--total-frames 100000000 --logging.interval-s 0.2'.split()
OFTEN = ['--checkpoint.interval-s', '0.5']


def kill(process, workdir, host):
    """Kills the program of a host, and checks that all end and say why."""
    os.kill(pid_of(workdir, host, is_program=True), signal.SIGKILL)
    killed = time.monotonic()
    code, _, stderr = finish(process, 60)
    assert time.monotonic() - killed < 60
    assert code not in (0, None)
    last = stderr.splitlines()[-1]
    assert f'host {host} (' in last and 'SIGKILL' in last, stderr
    assert not marked_processes(workdir)


@pytest.mark.parametrize('runtime', RUNTIMES)
def test_a_killed_host_ends_all_and_all_resume(runtime, tmp_path):
    """The second host, and then the first one, whose end JAX answers by aborting all others."""
    process = start(tmp_path, *ENDLESS, *OFTEN, runtime=runtime)
    wait_for(lambda: steps_of(tmp_path), process)
    kill(process, tmp_path, 1)
    saved = steps_of(tmp_path)[-1]
    first_row = rows_of(tmp_path)[0]
    assert first_row['learner_steps'] <= saved

    process = start(tmp_path, *ENDLESS, *OFTEN, runtime=runtime)
    wait_for(lambda: steps_of(tmp_path)[-1] > saved and rows_of(tmp_path)[-1]['learner_steps'] > saved, process)
    assert rows_of(tmp_path)[0] == first_row, 'they began anew'
    kill(process, tmp_path, 0)


@pytest.mark.parametrize('runtime', RUNTIMES)
def test_all_stop_after_the_same_update_and_finish_later(runtime, tmp_path):
    process = start(tmp_path, *ENDLESS, runtime=runtime)
    wait_for(lambda: rows_of(tmp_path), process)
    os.kill(pid_of(tmp_path, 1, is_program=False), signal.SIGTERM)
    code, _, stderr = finish(process, 60)
    assert code not in (0, None)
    assert 'host 1 (' in stderr and 'stopped by signal 15' in stderr, stderr
    assert 'Traceback' not in stderr, stderr
    [saved] = steps_of(tmp_path)
    assert saved >= rows_of(tmp_path)[-1]['learner_steps'] > 0
    assert not marked_processes(tmp_path)

    # The rest, on more frames.
    config = command_line.load_config_file(str(ROOT / 'configs' / 'catch.py'))
    frames = (saved + 10) * config.frames_per_update
    process = start(tmp_path, '--total-frames', str(frames), runtime=runtime)
    code, stdout, stderr = finish(process, 120)
    assert code == 0 and not stderr.strip(), stdout + stderr
    assert 'Devices     4 x cpu' in stdout and '16 per host, 8 per device' in stdout
    row = rows_of(tmp_path)[-1]
    assert row['learner_steps'] == saved + 10 and row['frames'] == frames
    # Of all hosts: games of Catch last ten steps.
    assert row['episodes'] == pytest.approx(frames / 10, rel=0.1)
    *_, scores = [json.loads(line) for line in (tmp_path / 'evaluations.jsonl').read_text().splitlines()]
    assert scores['frames'] == frames and scores['episodes'] == 4
    assert not marked_processes(tmp_path)

    # A checkpoint belongs to no mesh: one host continues, with four devices and with one.
    for devices in ('4', '1') if runtime != 'launchpad' else ():
        frames += 10 * config.frames_per_update
        hosts = ['--simulate-hosts', '1', '--simulate-devices', devices]
        code, stdout, stderr = finish(start(tmp_path, '--total-frames', str(frames), runtime=runtime, hosts=hosts), 120)
        assert code == 0 and f'Devices     {devices} x cpu' in stdout, stdout + stderr
        assert rows_of(tmp_path)[-1]['frames'] == frames


@pytest.mark.slow
@pytest.mark.parametrize('runtime', ['threads', pytest.param('launchpad', marks=pytest.mark.launchpad)])
def test_a_host_whose_environments_fail_stops_all(runtime, tmp_path):
    """Started by hand, as on two machines. The first host, which fails nowhere, writes the checkpoint."""
    address = free_address()
    failing = ['--environment.name', 'tests.helpers.factories:fails_where_told', '--environment.processes', '1']
    first, second = (
        start(
            tmp_path,
            *ENDLESS,
            *failing,
            runtime=runtime,
            hosts=by_hand(i, address),
            environment={'FAILS_HERE': '1'} if i else None,
        )
        for i in range(2)
    )
    code, _, stderr = finish(second, 120)
    assert code == 1 and 'Traceback' in stderr and 'the emulator is on fire' in stderr
    code, _, stderr = finish(first, 60)
    assert code not in (0, None)
    told, last = stderr.splitlines()
    assert 'stopped with another host' in told
    assert 'host 1 (' in last and 'the emulator is on fire' in last
    assert len(steps_of(tmp_path)) == 1
    assert not marked_processes(tmp_path)


def test_hosts_that_differ_are_refused(tmp_path):
    address = free_address()
    hosts = [
        start(
            tmp_path / str(i),
            *['--loss.discount', f'0.9{i}'],
            hosts=by_hand(i, address),
        )
        for i in range(2)
    ]
    for host in hosts:
        code, _, stderr = finish(host, 120)
        assert code == 1
        [line] = stderr.splitlines()
        assert 'configurations of the hosts differ: loss.discount 0.9 on host 0' in line and '0.91 on host 1' in line
    assert not (tmp_path / '0' / 'metrics.jsonl').exists()


def make_host(**changes):
    host = pod.Host('a', 'localhost', 1, '', 4, {'jax': '1', 'impala_jax': 'abc'}, {'seed': 0})
    return host._replace(**changes)


def test_hosts_agree_before_they_start():
    hosts = [make_host(), make_host(name='b')]
    pod.check_agreement(hosts)
    lines = '\n'.join(pod.report(Config(), hosts))
    assert '2: a, b' in lines and '8 x cpu' in lines and '32 trajectories, 16 per host, 4 per device' in lines
    with pytest.raises(ConfigError, match='versions of the hosts differ: impala_jax abc on host 0 .a., def on host 1'):
        pod.check_agreement([make_host(), make_host(name='b', versions={'jax': '1', 'impala_jax': 'def'})])
    with pytest.raises(ConfigError, match='configurations of the hosts differ: seed 0 on host 0 .a., 1 on host 2 .c.'):
        pod.check_agreement([*hosts, make_host(name='c', config={'seed': 1})])
    with pytest.raises(ConfigError, match='batch_size 12 does not divide over the 8 devices of 2 hosts.* such as 16'):
        pod.report(Config(learner=LearnerConfig(batch_size=12)), hosts)
    with pytest.raises(ConfigError, match='different numbers of devices: 4 on host 0 .a., 2 on host 1 .b.'):
        pod.report(Config(), [make_host(), make_host(name='b', num_devices=2)])
    assert pod.code_versions().keys() >= {'python', 'jax', 'impala_jax'}


def test_hosts_with_and_without_kernels_compile_different_programs(monkeypatch):
    monkeypatch.setattr(cpu, 'REASON', '')
    first = make_host(versions=pod.code_versions())
    monkeypatch.setattr(cpu, 'REASON', 'not compiled')
    with pytest.raises(ConfigError, match=r'differ: CPU kernels in use on host 0 \(a\), not compiled on host 1'):
        pod.check_agreement([first, make_host(name='b', versions=pod.code_versions())])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_catch_is_solved_by_two_hosts(tmp_path):
    """As shipped, in the default runtime."""
    command = ['launch/tpu_pod.py', '--config', 'configs/catch.py', '--workdir', str(tmp_path), *TWO_BY_TWO]
    code, stdout, stderr = finish(programs.start(tmp_path, *command), 800)
    assert code == 0, stdout + stderr
    assert evaluate(tmp_path, episodes=100)['mean_return'] >= 0.95

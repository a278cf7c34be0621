"""Runs that join a cluster of Ray: several nodes on this machine, which come and go."""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest

from impala_jax.rundir.checkpoint import steps
from impala_jax.rundir.lock import LOCK
from tests.helpers import paced, programs
from tests.helpers.programs import ROOT, finish, wait_for
from tests.helpers.runs import rows_of, start

pytestmark = pytest.mark.ray

OPTIONS = (
    '--runtime ray --actor.num-actors auto --actor.num-envs 4 --evaluator.episodes 0 --learner.num-devices 1 '
    '--learner.batch-size 4 --learner.unroll-length 5 --logging.interval-updates 1 --network.mlp-sizes 8'
).split()


class Nodes:
    """The helper program `ray_cluster`, and the environment variables to join its cluster."""

    def __init__(self, folder):
        token = folder / 'token'
        token.touch(0o600)
        token.write_text(secrets.token_hex(32))
        self.free = folder / 'free'
        self.joining = {
            'RAY_AUTH_MODE': 'token',
            'RAY_AUTH_TOKEN_PATH': str(token),
            'RAY_USAGE_STATS_ENABLED': '0',
            # Ray then notices a dead node within a few seconds.
            'RAY_health_check_initial_delay_ms': '1000',
            'RAY_health_check_period_ms': '500',
            'RAY_health_check_failure_threshold': '3',
            # Of the learner's process, too, so that nothing comes from the home directory.
            'HOME': str(folder),
            paced.FREE: str(self.free),
        }
        command = ['tests/helpers/ray_cluster.py', str(folder / 'r')]
        self.process = programs.start(folder, *command, environment=self.joining, stdin=subprocess.PIPE)
        self.address = self.process.stdout.readline().strip()
        assert self.address, self.process.communicate()

    def ask(self, command):
        self.process.stdin.write(f'{command}\n')
        self.process.stdin.flush()
        assert self.process.stdout.readline() == 'done\n', self.process.communicate()


@pytest.fixture(scope='module')
def cluster():
    """A cluster whose learner's machine has no CPU for actors."""
    folder = Path(tempfile.mkdtemp(prefix='ray_', dir='/tmp'))  # Paths of sockets are limited.
    nodes = None
    try:
        nodes = Nodes(folder)
        yield nodes
    finally:
        if nodes is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                nodes.process.communicate(timeout=30)
        for pid in programs.marked_processes(folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def last(workdir):
    rows = rows_of(workdir)
    return rows[-1] if rows else {'actors': 0, 'frames': 0}


def test_a_node_that_joins_is_used_and_one_that_dies_is_survived(cluster, tmp_path):
    budget = 20_000
    options = [*OPTIONS, '--ray-address', cluster.address, '--total-frames', str(budget)]
    options += ['--environment.name', 'tests.helpers.paced:paced']
    cluster.ask('add 1')
    process = start(tmp_path, *options, environment=cluster.joining)
    wait_for(lambda: last(tmp_path)['actors'] == 1, process)
    cluster.ask('add 2')
    wait_for(lambda: last(tmp_path)['actors'] == 3, process)
    before = last(tmp_path)['frames']
    wait_for(lambda: last(tmp_path)['frames'] > before, process)
    cluster.ask('remove')
    # Ray notices after its heartbeats; meanwhile the learner goes on with the other node's actor.
    wait_for(lambda: last(tmp_path).get('actor_deaths') == 2 and last(tmp_path)['actors'] == 1, process)
    after = last(tmp_path)['frames']
    wait_for(lambda: last(tmp_path)['frames'] > after, process)
    cluster.ask('add 1')
    wait_for(lambda: last(tmp_path)['actors'] == 2, process)
    cluster.free.touch()
    code, stdout, stderr = finish(process)
    assert code == 0, stdout + stderr
    warnings = stderr.splitlines()
    assert len(warnings) == 2 and all(' died: ' in line for line in warnings), stderr
    rows = rows_of(tmp_path)
    frames = [row['frames'] for row in rows]
    assert frames == sorted(set(frames)) and frames[-1] == budget
    assert all(row['frames'] == row['learner_steps'] * 4 * 5 for row in rows)
    assert rows[-1]['actor_deaths'] == 2
    cluster.ask('remove')
    cluster.ask('remove')


def refused(workdir, *options, prefix=(), **kwargs):
    """Last line of a run that is refused, after which its workdir contains nothing."""
    command = ['-m', 'impala_jax', 'train', '--config', str(ROOT / 'configs/catch.py'), '--workdir', str(workdir)]
    code, stdout, stderr = finish(programs.start(workdir, *command, *OPTIONS, *options, prefix=prefix, **kwargs))
    assert code == 1, stdout + stderr
    assert not [path for path in workdir.rglob('*') if path.name != LOCK] if workdir.exists() else True
    assert len(stderr.strip().splitlines()) == 1, stderr
    return stderr.strip()


def test_an_address_where_nothing_listens_is_refused(tmp_path):
    with socket.socket() as bound:
        bound.bind(('127.0.0.1', 0))
        address = f'127.0.0.1:{bound.getsockname()[1]}'
        environment = {'RAY_AUTH_MODE': 'disabled'}
        said = refused(tmp_path / 'run', '--ray-address', address, environment=environment)
    assert said.startswith(f'error: ray_address {address!r} cannot be reached: ') and 'ray start --head' in said


def test_a_run_without_the_token_is_refused(cluster, tmp_path):
    environment = {**cluster.joining, 'RAY_AUTH_TOKEN_PATH': ''}
    said = refused(tmp_path / 'none', '--ray-address', cluster.address, environment=environment)
    assert 'no token to join the cluster with' in said and 'RAY_AUTH_TOKEN_PATH' in said
    wrong = tmp_path / 'token'
    wrong.write_text(secrets.token_hex(32))
    environment = {**cluster.joining, 'RAY_AUTH_TOKEN_PATH': str(wrong)}
    said = refused(tmp_path / 'wrong', '--ray-address', cluster.address, environment=environment)
    assert f'ray_address {cluster.address!r} cannot be joined: the token is not that of the cluster' in said


def test_a_machine_with_other_code_is_refused(cluster, tmp_path):
    other = tmp_path / 'other'
    shutil.copytree(ROOT / 'impala_jax', other / 'impala_jax', ignore=shutil.ignore_patterns('__pycache__', '*.so'))
    with open(other / 'impala_jax' / 'actor.py', 'a') as file:
        file.write('\n# Changed.\n')
    cluster.ask(f'add 1 {other}')
    elsewhere = ['env', '--chdir', str(tmp_path)]  # Ray adds the working directory to the path of its workers.
    options = ['--ray-address', cluster.address]
    try:
        said = refused(tmp_path / 'run', *options, environment=cluster.joining, prefix=elsewhere)
    finally:
        cluster.ask('remove')
    assert f'machine {socket.gethostname()} of the Ray cluster has impala_jax' in said and 'install the same' in said


def test_a_head_that_dies_ends_the_run_and_nothing_is_lost(cluster, tmp_path):
    """The last test with this cluster."""
    cluster.free.touch()
    cluster.ask('add 1')
    options = [*OPTIONS, '--ray-address', cluster.address, '--total-frames', '100000000']
    process = start(tmp_path, *options, '--checkpoint.interval-s', '1000', environment=cluster.joining)
    wait_for(lambda: rows_of(tmp_path), process)
    cluster.ask('behead')
    code, _, stderr = finish(process)
    assert code == 1
    last_line = stderr.splitlines()[-1]
    assert last_line.startswith('error: the head of the Ray cluster has not answered for '), stderr
    assert last_line.endswith('the same command, with the address of a new cluster, resumes'), stderr
    assert steps(tmp_path / 'checkpoints')[-1] >= rows_of(tmp_path)[-1]['learner_steps'] > 0

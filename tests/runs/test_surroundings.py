"""Containers, shells and networks that lack something, or have something in the way."""

import logging
import os
import pwd
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from impala_jax import config, environments, evaluate, run
from impala_jax.config import ConfigError
from impala_jax.kernels import compilation_cache
from impala_jax.runtimes.host_share import resolved
from impala_jax.system import machine
from impala_jax.system.native_messages import native_messages_to
from tests.helpers.configs import small
from tests.helpers.programs import ROOT, finish, marked_processes
from tests.helpers.runs import SMALL, rows_of, start

RUNTIMES = ['threads', pytest.param('launchpad', marks=pytest.mark.launchpad)]
ASCII = {'LC_ALL': 'C', 'PYTHONCOERCECLOCALE': '0', 'PYTHONUTF8': '0', 'PYTHONIOENCODING': 'ascii'}
BROKEN = """
from impala_jax.environments.catch import Catch

class Broken(Catch):
    def step(self, action):
        raise ValueError('schön: ' + __file__)
"""


# Without a home directory.


@pytest.fixture
def no_home(monkeypatch):
    """As the user of a container who is a bare number."""

    def unknown(uid):
        raise KeyError(f'getpwuid(): uid not found: {uid}')

    for name in ('HOME', 'XDG_CACHE_HOME', 'JAX_COMPILATION_CACHE_DIR'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, 'getpwuid', unknown)
    with pytest.raises(RuntimeError):
        Path.home()


def test_without_a_home_nothing_is_cached(no_home, monkeypatch):
    folder = compilation_cache.jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr(compilation_cache.jax.config, 'update', lambda *_: pytest.fail('a cache is set'))
    try:
        compilation_cache.jax.config._value_holders['jax_compilation_cache_dir']._set(None)
        assert compilation_cache.enable_cache() is None
    finally:
        compilation_cache.jax.config._value_holders['jax_compilation_cache_dir']._set(folder)


def test_without_a_home_maps_are_not_cached(no_home, caplog):
    from impala_jax.environments import dmlab

    assert dmlab._level_cache('~/levels') is None
    assert "environment.level_cache '~/levels': this user has no home directory" in caplog.text
    assert len(caplog.records) == 1


# Cores.


@pytest.mark.parametrize(
    ('own', 'files', 'cores'),
    [
        ('0::/', {}, 8),
        ('0::/', {'cpu.max': 'max 100000'}, 8),
        ('0::/', {'cpu.max': '150000 100000'}, 2),
        ('0::/', {'cpu.max': '10000 100000'}, 1),
        ('0::/', {'cpu.max': '6400000 100000'}, 8),
        ('0::/a/b', {'a/b/cpu.max': 'max 100000', 'a/cpu.max': '300000 100000', 'cpu.max': 'max 100000'}, 3),
        ('4:cpu,cpuacct:/', {'cpu/cpu.cfs_quota_us': '250000', 'cpu/cpu.cfs_period_us': '100000'}, 3),
        ('4:cpu,cpuacct:/', {'cpu/cpu.cfs_quota_us': '-1', 'cpu/cpu.cfs_period_us': '100000'}, 8),
        # The path is the host's, the mount is the container's.
        ('4:cpu:/docker/1f', {'cpu/cpu.cfs_quota_us': '400000', 'cpu/cpu.cfs_period_us': '100000'}, 4),
        ('5:cpuset:/\n0::/', {'cpu.max': '200000 100000'}, 2),
        (None, {'cpu.max': '100000 100000'}, 8),
    ],
)
def test_cores_of_a_container(own, files, cores, tmp_path, monkeypatch):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f'{text}\n')
    if own is not None:
        (tmp_path / 'own').write_text(f'{own}\n')
    monkeypatch.setattr(machine, '_CGROUPS', tmp_path)
    monkeypatch.setattr(machine, '_OWN_CGROUPS', tmp_path / 'own')
    monkeypatch.setattr(machine.os, 'sched_getaffinity', lambda _: set(range(8)))
    assert machine.num_cores() == cores
    assert resolved(config.Config()).actor.num_actors == cores
    assert environments.num_cores() == cores


# A proxy.


@pytest.mark.launchpad
@pytest.mark.parametrize('launch_type', ['local_mt', pytest.param('local_mp', marks=pytest.mark.slow)])
def test_reverb_is_reached_beside_a_proxy(launch_type, tmp_path):
    """Nobody listens on port 9."""
    proxy = {name: 'http://127.0.0.1:9' for name in ('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY')}
    arguments = ['--runtime', 'launchpad', '--launch-type', launch_type, '--timeout-s', '60']
    code, stdout, stderr = finish(start(tmp_path, *SMALL, *arguments, environment=proxy))
    assert code == 0, stdout + stderr
    assert rows_of(tmp_path)[-1]['frames'] == 1600


def test_hosts_without_a_proxy_are_added_to_those_that_there_are(monkeypatch):
    monkeypatch.setenv('no_proxy', 'example.org,localhost')
    monkeypatch.delenv('no_grpc_proxy', raising=False)
    for _ in range(2):
        machine.connect_without_proxy('tpu-w0')
    names = os.environ['no_grpc_proxy'].split(',')
    assert names == ['example.org', 'localhost', '127.0.0.1', '::1', socket.gethostname(), 'tpu-w0']
    assert os.environ['no_proxy'] == 'example.org,localhost'


# Streams.


def shell(tmp_path, redirections, *arguments, environment=None):
    """A run whose standard streams a shell has closed."""
    command = ['launch/local.py', '--config', 'configs/catch.py', '--workdir', str(tmp_path / 'run'), *arguments]
    inherited = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'}
    return subprocess.run(
        ['sh', '-c', f'exec "$@" {redirections}', 'sh', sys.executable, *command],
        cwd=ROOT,
        env=inherited | {'PYTHONPATH': str(ROOT), 'RUN_MARK': str(tmp_path)} | (environment or {}),
        capture_output=True,
        timeout=240,
    )


@pytest.mark.parametrize('redirections', ['2>&-', '1>&-', '1>&- 2>&-', '0<&- 1>&- 2>&-'])
def test_a_reason_is_said_where_it_can_be(redirections, tmp_path):
    result = shell(tmp_path, redirections, *SMALL, '--runtime', 'nope')
    assert result.returncode == 1
    if redirections.count('>') < 2:
        assert b"error: unknown runtime 'nope'" in result.stdout + result.stderr
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('runtime', RUNTIMES)
def test_a_run_without_streams_writes_its_files_only(runtime, tmp_path):
    """A file opened in place of a closed stream would receive what libraries write there."""
    result = shell(tmp_path, '0<&- 1>&- 2>&-', *SMALL, '--runtime', runtime)
    assert result.returncode == 0
    assert rows_of(tmp_path / 'run')[-1]['frames'] == 1600
    lines = (tmp_path / 'run' / 'metrics.jsonl').read_bytes().splitlines()
    assert len(rows_of(tmp_path / 'run')) == len(lines)


@pytest.mark.parametrize('runtime', RUNTIMES)
def test_a_failure_without_standard_error_is_reported(runtime, tmp_path):
    failing = ['--environment.name', 'tests.helpers.factories:fails_and_notes_when', '--environment.processes', '1']
    result = shell(
        tmp_path, '2>&-', *SMALL, '--runtime', runtime, *failing, environment={'FAILURE_TIME': str(tmp_path / 'time')}
    )
    assert result.returncode == 1
    assert b'ZeroDivisionError: the emulator is on fire' in result.stdout
    assert not marked_processes(tmp_path)


@pytest.mark.parametrize('runtime', RUNTIMES)
def test_a_failure_is_reported_in_ascii(runtime, tmp_path):
    """Its traceback names a folder that the locale cannot encode."""
    folder = tmp_path / 'übung'
    folder.mkdir()
    (folder / 'broken.py').write_text(BROKEN, encoding='utf-8')
    result = shell(
        tmp_path,
        '',
        *[*SMALL, '--runtime', runtime, '--environment.name', 'broken:Broken', '--environment.processes', '1'],
        environment=ASCII | {'PYTHONPATH': f'{ROOT}:{folder}'},
    )
    assert result.returncode == 1
    assert b'the last time at step 1: ValueError: sch' in result.stderr.strip().splitlines()[-1], result.stderr


def test_a_workdir_that_the_locale_cannot_name_is_refused_at_once(tmp_path):
    result = shell(tmp_path / 'ü', '', *SMALL, '--runtime', 'threads', environment=ASCII)
    (line,) = result.stderr.splitlines()
    assert result.returncode == 1 and b'this name needs UTF-8, but the locale is ascii; set LC_ALL=C.UTF-8' in line
    assert not (tmp_path / 'ü').exists()


def test_a_workdir_of_other_letters(tmp_path):
    assert run(small(), tmp_path / 'übung', 'threads').learner_steps == 10
    unreadable = tmp_path / os.fsdecode(b'\xff')
    with pytest.raises(ConfigError, match='needs UTF-8'):
        run(small(), unreadable, 'threads')
    shutil.copytree(tmp_path / 'übung', unreadable)
    with pytest.raises(ConfigError, match='needs UTF-8'):  # And not that its checkpoints are damaged.
        evaluate(unreadable)


def test_warnings_are_no_native_messages(tmp_path, capfd):
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(handler)
    try:
        with native_messages_to(tmp_path / 'native.log'):
            logging.getLogger('impala_jax').warning('a checkpoint is damaged')
            os.write(2, b'a server started\n')
        logging.getLogger('impala_jax').warning('after it')
    finally:
        logging.getLogger().removeHandler(handler)
    assert capfd.readouterr().err.splitlines() == ['a checkpoint is damaged', 'after it']
    assert (tmp_path / 'native.log').read_text() == 'a server started\n'

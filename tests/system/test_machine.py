"""What a machine has, and has not: cores, a home, a way past a proxy."""

import os
import pwd
import socket
from pathlib import Path

import pytest

from impala_jax import environments
from impala_jax.config import Config
from impala_jax.kernels import compilation_cache
from impala_jax.runtimes.host_share import resolved
from impala_jax.system import machine


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
    assert resolved(Config()).actor.num_actors == cores
    assert environments.num_cores() == cores


def test_hosts_without_a_proxy_are_added_to_those_that_there_are(monkeypatch):
    monkeypatch.setenv('no_proxy', 'example.org,localhost')
    monkeypatch.delenv('no_grpc_proxy', raising=False)
    for _ in range(2):
        machine.connect_without_proxy('tpu-w0')
    names = os.environ['no_grpc_proxy'].split(',')
    assert names == ['example.org', 'localhost', '127.0.0.1', '::1', socket.gethostname(), 'tpu-w0']
    assert os.environ['no_proxy'] == 'example.org,localhost'

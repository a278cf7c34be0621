"""Supervisors of hosts: each says where it began, none is held up, none is left."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from impala_jax.runtimes import supervisor
from tests.helpers import programs
from tests.helpers.programs import ROOT, command_line, finish, marked_processes, wait_for


def supervised(folder, *ends):
    """Hosts whose programs end like this; all have met."""
    hosts = [
        programs.start(folder, '-m', 'tests.helpers.pod_program', str(i), str(len(ends)), str(folder), end)
        for i, end in enumerate(ends)
    ]
    wait_for(lambda: all((folder / f'joined{i}').exists() for i in range(len(ends))), timeout_s=30)
    return hosts


def test_every_host_says_where_it_began(tmp_path):
    """One fails, one fails for it, and one hangs for it, as in a collective, until its supervisor ends it."""
    hosts = supervised(tmp_path, 'hangs', 'fails', 'follows')
    (tmp_path / 'go').touch()
    codes, lasts = zip(*((code, stderr.splitlines()[-1:]) for code, _, stderr in map(finish, hosts)), strict=True)
    assert all(codes)
    assert lasts[1] == []  # Its program has said it.
    for last in (lasts[0], lasts[2]):
        assert 'host 1 (machine1): the emulator is on fire (this host ended with it' in last[0]
    assert not marked_processes(tmp_path)


@pytest.mark.parametrize('gone', [0, 2])
def test_a_host_that_is_gone_is_named(gone, tmp_path):
    """Its supervisor is killed, and the program with it."""
    hosts = supervised(tmp_path, 'hangs', 'hangs', 'hangs')
    hosts[gone].kill()
    for i, host in enumerate(hosts):
        code, _, stderr = finish(host, 30)
        assert code
        if i != gone:
            assert f'host {gone} (machine{gone}): it has ended' in stderr.splitlines()[-1]
    wait_for(lambda: not marked_processes(tmp_path), timeout_s=10)


def test_a_program_that_is_stopped_for_good_ends_all(tmp_path):
    hosts = supervised(tmp_path, 'hangs', 'hangs')
    commands = {int(pid): command_line(pid).split('\0') for pid in marked_processes(tmp_path)}
    (program,) = (pid for pid, words in commands.items() if '--supervisor' in words and words[2] == '1')
    os.kill(program, signal.SIGSTOP)
    for host in hosts:
        code, _, stderr = finish(host, 30)
        assert code and 'host 1 (machine1): its program was stopped for 1 s' in stderr.splitlines()[-1]
    assert not marked_processes(tmp_path)


NONSENSE = [
    b'',
    b'{"token": "token", "host": 1',  # and nothing more
    b'[' * 900 + b'\n',
    b'[1]\n',
    b'{"token": "tokem", "host": 1}\n',
    b'{"token": ["token"], "host": 1}\n',
    b'{"token": "\\ud800", "host": 1}\n',
    b'{"token": "token", "host": true}\n',
    b'{"token": "token", "host": 7}\n',
    b'x' * 100_000,
    bytes(range(256)),
]


def test_strangers_do_not_hold_up_the_hosts(tmp_path):
    """They connect before the second host does, and say nothing, or nonsense; each was waited for, for five seconds."""
    first = programs.start(tmp_path, '-m', 'tests.helpers.pod_program', '0', '2', str(tmp_path), 'finishes')
    wait_for((tmp_path / 'port').exists, first, timeout_s=30)
    address = 'localhost', int((tmp_path / 'port').read_text())
    strangers = [socket.create_connection(address) for _ in range(4 * len(NONSENSE))]
    for stranger, sent in zip(strangers, NONSENSE * 4, strict=True):
        with contextlib.suppress(ConnectionError):
            stranger.sendall(sent)
    started = time.monotonic()
    second = programs.start(tmp_path, '-m', 'tests.helpers.pod_program', '1', '2', str(tmp_path), 'finishes')
    assert [finish(host, 30)[::2] for host in (first, second)] == [(0, '')] * 2
    assert time.monotonic() - started < 4
    for stranger in strangers:
        stranger.close()


def test_supervisors_of_simulated_hosts_listen_on_this_machine_only():
    """And JAX's coordinator, which has no authentication."""
    assert supervisor.is_local('localhost:8476') and supervisor.is_local('127.0.0.1:1')
    assert not supervisor.is_local('10.0.0.1:8476') and not supervisor.is_local(None)
    code = """
import sys, jax
from impala_jax.runtimes import pod, supervisor
made = supervisor._Supervisor(['true'], '127.0.0.1')
print(made._listener.getsockname()[0])
port = supervisor.free_port()
pod.join(f'localhost:{port}', 1, 0, 30.0)
for line in open('/proc/net/tcp').readlines() + open('/proc/net/tcp6').readlines():
    fields = line.split()
    if fields[1].endswith(f':{port:04X}') and fields[3] == '0A':
        print(fields[1].partition(':')[0])
"""
    result = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    loopback, *coordinators = result.stdout.split()
    assert loopback == '127.0.0.1' and coordinators, result.stdout + result.stderr
    assert set(coordinators) <= {'0100007F', '00000000000000000000000001000000', '0000000000000000FFFF00000100007F'}


def test_hosts_that_finish_alarm_nobody(tmp_path):
    hosts = supervised(tmp_path, 'finishes', 'finishes', 'finishes')
    assert [finish(host)[::2] for host in hosts] == [(0, '')] * 3


def test_a_stopped_supervisor_does_not_hold_up_the_simulated_hosts(tmp_path):
    script = f"""
import sys
from impala_jax.runtimes import supervisor
from impala_jax.system import stop_watch

stop_watch.STOPPED_S, supervisor._CONNECT_S, supervisor._ENDING_S = 1.0, 2.0, 1.0
host = "import sys, time; open(sys.argv[1] + '/' + sys.argv[-3], 'w').close(); time.sleep(60)"
sys.exit(supervisor.simulate(2, 1, [sys.executable, '-c', host, {str(tmp_path)!r}]))
"""
    process = programs.start(tmp_path, '-c', script)
    wait_for((tmp_path / '1').exists, process, timeout_s=30)
    (host,) = (int(pid) for pid in marked_processes(tmp_path) if '--host-id\0001' in command_line(pid))
    os.kill(host, signal.SIGSTOP)
    code, _, stderr = finish(process, 30)
    assert (code, stderr) == (137, 'error: host 1: its supervisor was stopped for 1 s; it is killed\n')
    assert not marked_processes(tmp_path)

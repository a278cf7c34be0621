"""The gate of a learner that serves actors: who gets through, and who cannot hold it up."""

import contextlib
import json
import os
import resource
import signal
import socket
import threading
import time

import pytest

from impala_jax.config import ConfigError
from impala_jax.runtimes import gate
from impala_jax.runtimes.gate import SECRET_FILE, Gate, Tunnel, secret_in
from impala_jax.runtimes.supervisor import free_port
from tests.helpers import programs
from tests.helpers.programs import finish, listening_ports, wait_for
from tests.helpers.remote import SECRET, Echo

pytestmark = pytest.mark.launchpad


def recorded_handshake(port, secret):
    """What an actor sends to a gate before it is let through, as somebody in the network reads it."""
    sent = b''
    with socket.create_server(('localhost', 0)) as listener, socket.create_connection(('localhost', port)) as gate:
        actor = threading.Thread(target=Tunnel, args=('localhost', listener.getsockname()[1], secret))
        actor.start()
        near, _ = listener.accept()
        with near:
            near.sendall(gate.recv(1000))
            for size in (51, 32):
                part = near.recv(size, socket.MSG_WAITALL)
                sent += part
                gate.sendall(part)
            near.sendall(gate.recv(1000))
            actor.join(10)
    return sent


def test_a_run_that_serves_actors_goes_on_beside_another_user_at_its_port(tmp_path):
    """Nobody gets through, those who have joined go on, and who comes late joins as soon as there is room."""
    temporary, workdir, port = tmp_path / 'tmp', tmp_path / 'run', free_port()
    temporary.mkdir()
    command = ['launch/local.py', '--config', 'configs/catch.py', '--workdir', str(workdir), '--runtime', 'launchpad']
    command += ['--serve-actors', str(port), '--actor.num-actors', '0', '--total-frames', '100000000']
    command += ['--learner.num-devices', '1', '--evaluator.episodes', '0', '--logging.interval-s', '0.2']
    act = ['launch/actors.py', '--learner', f'localhost:{port}', '--num-actors', '1']
    act += ['--secret-file', str(workdir / SECRET_FILE)]
    environment = {'TMPDIR': str(temporary)}
    learner = programs.start(tmp_path, *command, environment=environment)
    early = programs.start(tmp_path / 'early', *act, environment=environment)
    rows = workdir / 'metrics.jsonl'

    def wait_for_rows(count):
        start = rows.read_text().count('\n') if rows.exists() else 0
        wait_for(lambda: rows.exists() and rows.read_text().count('\n') >= start + count, learner)

    wait_for_rows(2)
    assert listening_ports(tmp_path) == {port}
    intruder = programs.start(
        tmp_path / 'intruder',
        '-m',
        'tests.helpers.gate_intruder',
        str(port),
        recorded_handshake(port, secret_in(workdir / SECRET_FILE)).hex(),
    )
    said = [intruder.stdout.readline() for _ in range(2)]
    late = programs.start(tmp_path / 'late', *act, environment=environment)
    wait_for_rows(5)  # While it holds all the places that there are.
    said.append(intruder.stdout.readline())
    intruder.kill()
    intruder.communicate()
    assert said == ['Reverb: DeadlineExceededError\n', 'busy\n', 'busy\n']
    while 'joined the learner' not in (line := late.stdout.readline()):
        assert line, late.communicate()
    wait_for_rows(2)
    for process in (early, late, learner):
        process.send_signal(signal.SIGTERM)
        code, stdout, stderr = finish(process)
        assert code == 128 + signal.SIGTERM and 'Traceback' not in stderr, stdout + stderr
        if process is early:
            assert 'lost the learner' not in stdout
    warnings = stderr.splitlines()[:-1]
    assert warnings and all('did not get through' in line for line in warnings), stderr
    row = json.loads(rows.read_text().splitlines()[-1])
    assert 'refused_items' not in row and -1 <= row['episode_return_last_100'] <= 1
    assert not list(temporary.iterdir())


def test_a_secret_that_others_may_read_or_guess_is_refused(tmp_path, monkeypatch):
    monkeypatch.delenv(gate.SECRET_VARIABLE, raising=False)
    made = gate.learners_secret(tmp_path)
    path = tmp_path / gate.SECRET_FILE
    assert path.stat().st_mode & 0o777 == 0o600 and len(made) == 64
    assert gate.learners_secret(tmp_path) == made == gate.actors_secret(path)()
    path.chmod(0o640)
    with pytest.raises(ConfigError, match=r'can be read by others \(mode 640\): chmod 600'):
        gate.learners_secret(tmp_path)
    path.chmod(0o600)
    path.write_text('short\n')
    with pytest.raises(ConfigError, match='has 5 characters; give at least 16'):
        gate.actors_secret(path)()
    with pytest.raises(ConfigError, match='give --secret-file with a copy of the file actors_secret .* or set IMPALA'):
        gate.actors_secret(None)
    monkeypatch.setenv(gate.SECRET_VARIABLE, 'of the environment')
    assert gate.learners_secret(tmp_path) == gate.actors_secret(None)() == b'of the environment'


def test_the_gate_lets_strangers_neither_through_nor_hold_it_up(caplog):
    """Silent ones, ones that talk nonsense or repeat what they have heard; an actor gets through meanwhile."""
    port, echo = free_port(), Echo()
    open_gate = Gate(port, SECRET, echo.address)
    silent = [socket.create_connection(('localhost', port)) for _ in range(20)]
    for sent in (b'GET / HTTP/1.1\r\n\r\n', bytes(200), b'PRI * HTTP/2.0' + bytes(100)):
        with socket.create_connection(('localhost', port)) as stranger:
            stranger.sendall(sent.ljust(83, b'.'))
            with contextlib.suppress(ConnectionResetError):
                while stranger.recv(1000):
                    pass
    with socket.create_connection(('localhost', port)) as mirror:
        mirror.sendall(mirror.recv(1000))
        with contextlib.suppress(ConnectionResetError):
            while mirror.recv(1000):
                pass
    started = time.monotonic()
    tunnel = Tunnel('localhost', port, SECRET)
    assert time.monotonic() - started < 2
    wait_for(lambda: echo.num_connections == 1)
    with socket.socket(socket.AF_UNIX) as actor:
        actor.connect(tunnel.address.removeprefix('unix:'))
        data = bytes(range(256)) * 4000
        threading.Thread(target=actor.sendall, args=(data,), daemon=True).start()
        received = b''
        while len(received) < len(data):
            received += actor.recv(100_000)
        assert received == data
        open_gate.close()
        assert actor.recv(1) == b''
    assert echo.num_connections == 2
    assert 'did not get through: it is not the gate' in caplog.text
    for stranger in silent:
        stranger.close()
    tunnel.close()
    echo.listener.close()


def test_a_gate_without_files_to_open_goes_on_when_it_has_some(caplog):
    port, echo = free_port(), Echo()
    open_gate = Gate(port, SECRET, echo.address)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket() as stranger:
        free = os.dup(stranger.fileno())
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, before[1]))  # All lower ones are taken.
        try:
            stranger.connect(('127.0.0.1', port))  # A name would be looked up in a file.
            wait_for(lambda: 'Too many open files' in caplog.text, timeout_s=10)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
    Tunnel('localhost', port, SECRET).close()
    open_gate.close()
    echo.listener.close()

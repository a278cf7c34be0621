"""One process per folder: who holds it is named, and a lock whose process is gone is taken over."""

import json
import os
import socket
import subprocess
import sys
import threading

import pytest

from impala_jax import run
from impala_jax.config import ConfigError
from impala_jax.rundir import lock
from impala_jax.rundir.lock import LOCK, only_process
from impala_jax.studies import ablation
from tests.helpers.configs import small
from tests.helpers.programs import ROOT, finish, start
from tests.helpers.runs import files

HOLD = """
import sys, time
from pathlib import Path
from impala_jax.rundir.lock import only_process

with only_process(Path(sys.argv[1])):
    print('held', flush=True)
    time.sleep(600)
"""


def hold(folder):
    """A process that holds the lock of `folder`."""
    process = subprocess.Popen([sys.executable, '-c', HOLD, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == 'held\n'
    return process


def test_the_holder_is_named_and_nothing_is_left(tmp_path):
    folder = tmp_path / 'new' / 'run'
    with only_process(folder):
        (folder / 'file').touch()
        with pytest.raises(ConfigError) as error:
            with only_process(folder):
                pass
        message = str(error.value)
        for part in (str(folder), f'process {os.getpid()}', socket.gethostname(), 'since 20', 'wait for its end'):
            assert part in message
        assert '\n' not in message and 'another machine' not in message
    assert [path.name for path in folder.iterdir()] == ['file']
    with only_process(folder):
        pass


def test_a_folder_that_was_not_used_goes_away(tmp_path):
    with pytest.raises(ZeroDivisionError):
        with only_process(tmp_path / 'run'):
            raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_killed_process_is_taken_over_at_once(tmp_path, monkeypatch, caplog):
    process = hold(tmp_path)
    with pytest.raises(ConfigError, match=f'process {process.pid} on'):
        with only_process(tmp_path):
            pass
    process.kill()
    process.communicate()
    assert (tmp_path / LOCK).exists()
    monkeypatch.setattr(lock, '_SILENCE_S', 600.0)
    with only_process(tmp_path):
        assert json.loads((tmp_path / LOCK).read_bytes())['pid'] == os.getpid()
    assert not caplog.records


def foreign(folder):
    holder = {'host': 'elsewhere', 'pid': 7, 'since': '2026-01-01', 'command': 'launch/local.py'}
    (folder / LOCK).write_text(json.dumps(holder))


@pytest.mark.parametrize('has_flock', [True, False])
def test_a_process_on_another_machine_whose_flock_is_not_seen(tmp_path, monkeypatch, has_flock, caplog):
    foreign(tmp_path)
    if not has_flock:
        monkeypatch.setattr(
            lock.fcntl, 'flock', lambda *_: (_ for _ in ()).throw(OSError(lock.errno.ENOLCK, 'no locks'))
        )
    monkeypatch.setattr(lock, '_SILENCE_S', 30.0)
    monkeypatch.setattr(lock, '_HEARTBEAT_S', 0.05)
    released = threading.Event()
    descriptor = os.open(tmp_path / LOCK, os.O_RDWR)
    heart = threading.Thread(target=lock._touch, args=(descriptor, released))
    heart.start()
    try:
        with pytest.raises(ConfigError, match='another process on another machine trains in .*process 7 on elsewhere'):
            with only_process(tmp_path):
                pass
    finally:
        released.set()
        heart.join()
        os.close(descriptor)
    monkeypatch.setattr(lock, '_SILENCE_S', 0.2)
    with only_process(tmp_path):
        assert json.loads((tmp_path / LOCK).read_bytes())['pid'] == os.getpid()
    assert 'waiting 0.2 s for a sign of life' in caplog.text


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(ConfigError, match='cannot write to --output .*file/run: Not a directory'):
        with only_process(tmp_path / 'file' / 'run', '--output'):
            pass


@pytest.mark.parametrize('runtime', ['threads', 'lockstep', pytest.param('launchpad', marks=pytest.mark.launchpad)])
def test_a_second_run_is_refused_and_changes_nothing(runtime, tmp_path):
    run(small(), tmp_path, 'lockstep')
    with only_process(tmp_path):
        before = files(tmp_path)
        with pytest.raises(ConfigError, match='another process trains in'):
            run(small(), tmp_path, runtime)
        assert files(tmp_path) == before


def test_a_second_sweep_is_refused(tmp_path):
    with only_process(tmp_path):
        with pytest.raises(ConfigError, match='another process trains in'):
            ablation.run_sweep(ablation.Grid({'catch': small()}, {'seed': (0,)}).cells(), tmp_path, 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ('script', 'folder'),
    [
        (['local.py', '--workdir'], ''),
        (['pbt.py', '--member', '0', '--workdir'], 'member_00'),
        (['tpu_pod.py', '--simulate-hosts', '2', '--workdir'], 'hosts/1'),
    ],
    ids=['local', 'pbt', 'tpu_pod'],
)
def test_every_program_keeps_to_it(script, folder, tmp_path):
    arguments = ['--config', 'configs/catch.py', '--runtime', 'threads', '--total-frames', '3000']
    with only_process(tmp_path / folder):
        process = start(tmp_path, f'launch/{script[0]}', *script[1:], str(tmp_path), *arguments)
        code, stdout, stderr = finish(process)
    assert code not in (0, None), stdout
    assert f'process {os.getpid()} on' in stderr.splitlines()[-1], stderr

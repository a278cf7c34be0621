"""Other users at the ports of a run: nothing of theirs is learned from, acted on or written to the disk."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.helpers import programs
from tests.helpers.programs import finish, listening_ports, wait_for
from tests.helpers.runs import rows_of
from tests.helpers.transport import intrude

pytestmark = pytest.mark.launchpad


ASK_AS_NOBODY = """
import os, sys, reverb
if os.getuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    print(reverb.Client(f'unix:{sys.argv[1]}').server_info(timeout=3))
except Exception as error:
    print('refused')
"""


@pytest.fixture
def short_folder():
    """A folder that all users can enter, whose name leaves room for that of a socket."""
    with tempfile.TemporaryDirectory(prefix='doors') as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.mark.parametrize('launch_type', ['local_mt', 'local_mp'])
def test_a_run_of_this_machine_listens_to_nobody_else_and_leaves_no_files(launch_type, short_folder, tmp_path):
    temporary = short_folder
    command = ['launch/local.py', '--config', 'configs/catch.py', '--workdir', str(tmp_path / 'run')]
    command += ['--runtime', 'launchpad', '--launch-type', launch_type, '--total-frames', '100000']
    command += ['--learner.num-devices', '1', '--evaluator.episodes', '0', '--logging.interval-s', '0.2']
    process = programs.start(tmp_path, *command, environment={'TMPDIR': str(temporary)})
    rows = tmp_path / 'run' / 'metrics.jsonl'
    wait_for(lambda: rows.exists() and rows.read_text().count('\n') > 1, process)
    ports = listening_ports(tmp_path)
    (address,) = temporary.glob('impala_jax_*/*/reverb')
    asked = subprocess.run(
        [sys.executable, '-c', ASK_AS_NOBODY, str(address)], capture_output=True, text=True, timeout=60, check=True
    )
    code, stdout, stderr = finish(process)
    assert code == 0, stdout + stderr
    assert not ports
    if os.getuid() == 0:
        assert asked.stdout == 'refused\n'
    assert not list(temporary.iterdir())
    assert 'open on all addresses' not in stdout
    assert 'refused_items' not in json.loads(rows.read_text().splitlines()[-1])


# The run's own program, where the port cannot be closed.
OPEN = """
import runpy, sys
from impala_jax.runtimes import private_socket
def listen_privately(port, path):
    raise OSError('this is a test')
private_socket.listen_privately = listen_privately
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


def test_a_run_whose_port_stays_open_says_so_and_goes_on(tmp_path):
    """Another user writes to all of its tables meanwhile."""
    temporary = tmp_path / 'tmp'
    temporary.mkdir()
    command = ['launch/local.py', '--config', 'configs/catch.py', '--workdir', str(tmp_path / 'run')]
    command += ['--runtime', 'launchpad', '--total-frames', '300000', '--learner.num-devices', '1']
    command += ['--evaluator.episodes', '0', '--logging.interval-s', '0.2']
    process = programs.start(tmp_path, '-c', OPEN, *command, environment={'TMPDIR': str(temporary)})
    said = ''
    while 'cannot be closed here (this is a test)' not in said:
        said = process.stdout.readline()
        assert said, process.communicate()
    (port,) = listening_ports(tmp_path)
    assert f"Reverb's port {port} cannot be closed" in said and 'nothing that they write is used' in said

    def rows():
        return rows_of(tmp_path / 'run')

    wait_for(rows, process)
    number = sum(intrude(f'localhost:{port}', 'trajectories', table) for table in ('trajectories', 'parameters'))
    seen = len(rows())
    wait_for(lambda: len(rows()) > seen + 1, process)
    code, stdout, stderr = finish(process)
    assert code == 0 and 'Trained     300,' in stdout, stdout + stderr
    assert 0 < rows()[-1]['refused_items'] < number
    assert 'was refused' in stderr and 'Traceback' not in stderr
    assert all(-1 <= row['episode_return'] <= 1 for row in rows() if 'episode_return' in row)
    assert all(0 <= row['policy_lag_min'] <= row['policy_lag_max'] < 100 for row in rows())
    assert not list(temporary.iterdir())


def test_a_server_that_moves_cuts_earlier_connections():
    import reverb

    from impala_jax.runtimes import reverb_tables
    from impala_jax.runtimes.private_socket import listen_privately

    server = reverb.Server([reverb.Table.queue('q', 3)], checkpointer=reverb_tables.NoCheckpointer())
    with socket.create_connection(('localhost', server.port)) as early, tempfile.TemporaryDirectory() as folder:
        early.settimeout(10)
        listen_privately(server.port, Path(folder) / 'socket')
        with contextlib.suppress(ConnectionResetError):
            while early.recv(1000):  # What the server had said first.
                pass
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(('localhost', server.port))
        assert reverb.Client(f'unix:{folder}/socket').server_info(timeout=60)['q'].current_size == 0
        with pytest.raises(OSError, match='does not wait for connections at port'):
            listen_privately(server.port, Path(folder) / 'other')
    server.stop()

"""Other users at the ports of a run: nothing of theirs is learned from, acted on or written to the disk."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import jax
import numpy as np
import pytest

from impala_jax.runtimes.gate import SECRET_FILE, Way, secret_in
from impala_jax.runtimes.host_share import host_share
from impala_jax.runtimes.supervisor import free_port
from tests.helpers import programs
from tests.helpers.programs import finish, marked_processes, wait_for
from tests.runtimes.test_transport import KEY, PARAMS, leaves_of, make_config, make_trajectories, reverb_queue

pytestmark = pytest.mark.launchpad

REPLAYED = {'fraction': 1 / 3, 'capacity': 100}


@pytest.fixture
def server():
    """As a run makes it."""
    import reverb

    from impala_jax.runtimes import reverb_tables

    config = make_config(**REPLAYED)
    server = reverb.Server(reverb_tables.tables(host_share(config)), checkpointer=reverb_tables.NoCheckpointer())
    yield server
    server.stop()


def write_item(*args):
    from tests.helpers import intruder

    intruder.write(*args)


def intrude(address, source, target):
    """Runs the intruder, and returns how many items it has written."""
    command = [sys.executable, '-m', 'tests.helpers.intruder', address, source, target]
    result = subprocess.run(command, cwd=programs.ROOT, capture_output=True, text=True, timeout=120, check=True)
    refused, number = result.stdout.splitlines()
    assert refused == 'refused: no Checkpointer configured for the replay service.'
    return int(number)


def test_only_what_the_run_wrote_is_learned_from_and_once(server, caplog, tmp_path, monkeypatch):
    """Copies of genuine trajectories, altered and malformed ones from another user stand between genuine ones."""
    monkeypatch.setenv('TMPDIR', str(tmp_path))
    tmp_path.chmod(0o777)
    address = f'localhost:{server.port}'
    writer, reader = (reverb_queue(address, 60.0, **REPLAYED) for _ in range(2))
    writer.put(make_trajectories(0, 4))
    batches = [reader.get_batch()]
    number = intrude(address, 'replay', 'trajectories')
    assert number > 20
    writer.put(make_trajectories(4, 4))
    batches.append(reader.get_batch())
    fresh = np.concatenate([batch.version[:4] for batch in batches])
    assert fresh.tolist() == list(range(8))
    for batch in batches:
        for i, version in enumerate(batch.version):
            sent = make_trajectories(4 * (version // 4), 4)
            for a, b in zip(leaves_of(sent, version % 4), leaves_of(batch, i), strict=True):
                np.testing.assert_array_equal(a, b)
    assert reader.num_refused == number
    warned = [record for record in caplog.records if 'was refused' in record.getMessage()]
    assert 2 <= len(warned) <= 7 and 'no part of this run has written it (1 so far)' in warned[0].getMessage()
    assert not list(tmp_path.iterdir()), 'tables were written to the disk'


def test_what_others_write_into_replay_is_neither_sampled_nor_saved(server):
    import reverb

    address = f'localhost:{server.port}'
    queue = reverb_queue(address, 60.0, **REPLAYED)
    queue.put_replay(make_trajectories(0, 4))
    for table in ('replay_in_order', 'replay'):  # It reads in the one that it writes to last.
        intrude(address, 'replay', table)
    queue.put(make_trajectories(4, 4))
    batch = queue.get_batch()
    assert batch.version[:4].tolist() == [4, 5, 6, 7] and set(batch.version[4:].tolist()) <= set(range(8))
    # What was written for replay is not new experience.
    client = reverb.Client(address)
    (replayed,) = client.sample('replay_in_order', 1, emit_timesteps=False)
    write_item(client, 'trajectories', *[[np.asarray(column)[0]] for column in replayed.data])
    queue.put(make_trajectories(8, 4))
    assert queue.get_batch().version[:4].tolist() == [8, 9, 10, 11]
    saved = queue.take_replay()
    assert saved.version.tolist() == list(range(1, 12))
    queue.close()


def make_store(server, key=KEY, timeout_s=30.0):
    import reverb

    from impala_jax.runtimes.reverb_transport import ReverbParameterStore

    return ReverbParameterStore(reverb.Client(f'localhost:{server.port}'), key, PARAMS, timeout_s)


def numbered(version):
    return jax.tree.map(lambda x: x + np.float32(version), PARAMS)


def assert_latest(store, version):
    got, params = store.latest()
    assert got == version
    jax.tree.map(np.testing.assert_array_equal, params, numbered(version))


def test_only_the_learners_parameters_are_acted_with_and_never_older_ones(server, monkeypatch):
    """Altered ones, malformed ones, genuine ones of an earlier update; and they come back where they were removed."""
    import reverb

    monkeypatch.setattr('impala_jax.runtimes.reverb_transport._KEEP_S', 0.1)
    learner, actor = make_store(server), make_store(server)
    client = reverb.Client(f'localhost:{server.port}')
    learner.publish(3, numbered(3))
    assert_latest(actor, 3)
    (old,) = client.sample('parameters', 1, emit_timesteps=False)
    learner.publish(5, numbered(5))
    assert_latest(actor, 5)
    for _ in range(3):
        write_item(client, 'parameters', *[[np.asarray(column)[0]] for column in old.data])
        assert_latest(actor, 5)
    assert intrude(f'localhost:{server.port}', 'parameters', 'parameters')
    assert_latest(actor, 5)
    assert_latest(make_store(server), 5)  # One that has not seen them yet.
    client.reset('parameters')
    assert_latest(actor, 5)
    assert_latest(make_store(server), 5)
    learner.publish(6, numbered(6))
    assert_latest(actor, 6)
    for store in (learner, actor):
        store.close()


def test_what_another_start_wrote_does_not_fit(server):
    other = make_store(server, key=bytes(32))
    other.publish(0, PARAMS)
    other.close()
    with pytest.raises(TimeoutError, match='for the learner to publish'):
        make_store(server, timeout_s=0.5).latest()


def test_a_seal_covers_all_that_an_item_says():
    from impala_jax.runtimes import seals

    leaves = [np.arange(6, dtype=np.float32).reshape(2, 3), np.zeros([0, 2], np.int32), np.int64(7)]
    sealer = seals.Sealer(KEY, seals.TRAJECTORY)
    opener = seals.Opener(KEY, [seals.TRAJECTORY], leaves)
    columns = [np.asarray(leaf)[None] for leaf in [*leaves, sealer.seal(leaves)]]
    opened = opener.open(columns)
    assert opened.count == 0 and opened.leaves[2] == 7
    second = opener.open([*columns[:3], sealer.seal(leaves)[None]])
    assert (second.writer, second.count) == (opened.writer, 1)
    for i, column in enumerate(columns):
        for byte in range(0, column.nbytes, 5):
            changed = [c.copy() for c in columns]
            changed[i].reshape(-1).view(np.uint8)[byte] ^= 1
            with pytest.raises(seals.Refused, match='its checksum is wrong'):
                opener.open(changed)
    for purposes, key in (([seals.PARAMETERS], KEY), ([seals.TRAJECTORY], bytes(32))):
        with pytest.raises(seals.Refused):
            seals.Opener(key, purposes, leaves).open(columns)
    # The same bytes in another shape or of another type.
    for wrong in (columns[0].reshape(1, 3, 2), columns[0].view(np.int32), columns[0][:, :1], columns[0][0]):
        with pytest.raises(seals.Refused, match='its array 0 is'):
            opener.open([wrong, *columns[1:]])


def listening_ports(folder):
    """TCP ports at which the processes of the program started for `folder` listen."""
    ports = set()
    inodes = set()
    for pid in marked_processes(folder):
        for descriptor in Path(f'/proc/{pid}/fd').iterdir():
            try:
                inodes.add(os.readlink(descriptor).removeprefix('socket:[').removesuffix(']'))
            except OSError:
                continue
    for table in ('tcp', 'tcp6'):
        for line in Path(f'/proc/net/{table}').read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == '0A' and fields[9] in inodes:
                ports.add(int(fields[1].rpartition(':')[2], 16))
    return ports


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
    assert f"Reverb's port {port} cannot be closed" in said and 'nothing that they write is learned from' in said

    def rows():
        path = tmp_path / 'run' / 'metrics.jsonl'
        return (
            [json.loads(line) for line in path.read_text().splitlines() if line.endswith('}')] if path.exists() else []
        )

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


def recorded_handshake(port, secret):
    """What an actor sends to a gate before it is let through, as somebody in the network reads it."""
    sent = b''
    with socket.create_server(('localhost', 0)) as listener, socket.create_connection(('localhost', port)) as gate:
        actor = threading.Thread(target=Way, args=('localhost', listener.getsockname()[1], secret))
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
        assert reverb.Client(f'unix:{folder}/socket').server_info(timeout=10)['q'].current_size == 0
        with pytest.raises(OSError, match='does not wait for connections at port'):
            listen_privately(server.port, Path(folder) / 'other')
    server.stop()

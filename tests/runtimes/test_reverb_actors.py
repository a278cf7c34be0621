"""Actors of other machines: they join, are refused, die, come back, and go on with a learner that was started anew."""

import contextlib
import dataclasses
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import impala_jax
from impala_jax.config import ConfigError
from impala_jax.environments import suites
from impala_jax.rundir import checkpoint
from impala_jax.runtimes import gate
from impala_jax.runtimes.gate import Tunnel
from impala_jax.runtimes.host_share import host_share
from impala_jax.runtimes.nodes import NodeFailure
from impala_jax.runtimes.supervisor import free_port
from tests.helpers import programs
from tests.helpers.programs import finish, marked_processes, wait_for
from tests.helpers.remote import BEHIND, CONFIG, SECRET, SPEC, Echo, announce, join, server
from tests.helpers.transport import in_thread

pytestmark = pytest.mark.launchpad

# All actors are on other machines; rows come often.
SERVE = (
    '--runtime launchpad --actor.num-actors 0 --learner.num-devices 1 --evaluator.episodes 0 --logging.interval-s 0.2'
).split()
ENDLESS = ['--total-frames', '100000000']


def test_a_connection_that_damages_a_proof_is_not_the_end():
    """To the actors it looks like a learner with another secret."""
    from impala_jax.runtimes import reverb_actors

    known = iter([b'quite another secret', b'quite another secret', SECRET])
    with server() as address:
        announce(address)
        with pytest.raises(ConfigError, match='set at the learner only'):
            reverb_actors.run(
                address,
                1,
                threading.Event(),
                secret=lambda: next(known),
                adapt=lambda config: dataclasses.replace(config, seed=7),
                wait_s=60.0,
            )


def test_what_does_not_fit_is_refused(monkeypatch):
    """Another code, another experiment, another environment; each in one line that names both."""
    with server() as address:
        announce(address)
        with pytest.raises(ConfigError, match='set at the learner only: seed: 0 at the learner, 7 now$'):
            join(address, adapt=lambda config: dataclasses.replace(config, seed=7))
        monkeypatch.setattr('impala_jax.runtimes.reverb_actors.code_version', lambda: '0.0.1+abc')
        with pytest.raises(ConfigError, match=r'runs impala_jax \d.*\+\w{12}, and this machine 0\.0\.1\+abc; install'):
            join(address)
        monkeypatch.undo()
        announce(address, spec=SPEC._replace(num_actions=18))
        with pytest.raises(
            ConfigError, match="'catch' differs from that of the learner .*num_actions=18.*num_actions=3"
        ):
            join(address)


def test_what_is_no_learner_is_refused_or_waited_for(capsys):
    echo = Echo()
    with pytest.raises(ConfigError, match='it is not the gate of a learner, or of another version'):
        join(echo.address)
    echo.listener.close()
    with server() as address:  # Nothing was announced yet.
        with pytest.raises(NodeFailure, match='no learner at localhost:.* for 0.2 s: the learner is starting'):
            join(address, wait_s=0.2)
    nobody = f'localhost:{free_port()}'
    with pytest.raises(NodeFailure, match='no learner at localhost:.* for 2 s: Connection refused'):
        join(nobody, wait_s=2.0)
    pauses = [float(pause) for pause in re.findall(f'{nobody} yet: .*; next try in (.*) s', capsys.readouterr().out)]
    assert len(pauses) >= 2 and 0.25 <= pauses[0] <= 0.5 <= pauses[1] <= 1.0  # It backs off.


def test_a_port_in_use_is_refused(tmp_path):
    with server() as address:
        config = dataclasses.replace(CONFIG, serve_actors=int(address.split(':')[1]))
        with pytest.raises(ConfigError, match='serve_actors .*: Address already in use; choose another port'):
            impala_jax.run(config, tmp_path, runtime='launchpad')


def test_only_a_runtime_with_a_server_serves_actors(tmp_path):
    with pytest.raises(ConfigError, match="serve_actors 5000: the runtime 'threads' has no server"):
        impala_jax.run(CONFIG, tmp_path, runtime='threads')


def test_a_writer_of_an_earlier_start_is_refused():
    """Reverb's writer goes on by itself with the next server on the port; the next run may be another experiment."""
    import reverb

    from impala_jax.build import make_agent
    from impala_jax.config import NetworkConfig
    from impala_jax.runtimes.reverb_items import ServerLost
    from impala_jax.runtimes.reverb_transport import ReverbTrajectoryQueue
    from tests.helpers.transport import SPEC as transport_spec
    from tests.helpers.transport import make_trajectories

    agent = make_agent(NetworkConfig(torso='mlp', core='lstm', lstm_size=5), transport_spec)
    with server(suffix='-second') as address:
        queue = ReverbTrajectoryQueue(reverb.Client(BEHIND[address]), SECRET, host_share(CONFIG), agent, '-first')
        with pytest.raises(ServerLost, match='trajectories-first was not found'):
            queue.put(make_trajectories(1, 1))
        queue.close()


# A learner that takes no trajectories, so that the queue fills up.
STUCK_LEARNER = """
import jax, rlax, reverb, time
from tests.helpers import remote
from impala_jax.build import make_agent
from impala_jax.runtimes.reverb_actors import items_key
from impala_jax.runtimes.reverb_transport import ReverbParameterStore
with remote.server() as address:
    params = make_agent(remote.CONFIG.network, remote.SPEC).init(jax.random.PRNGKey(0))
    client = reverb.Client(remote.BEHIND[address])
    store = ReverbParameterStore(client, items_key(remote.SECRET, '-test'), params, 20.0, 'parameters-test')
    store.publish(0, params)
    remote.announce(address)
    print(address, flush=True)
    time.sleep(100)
"""


def test_an_actor_that_waits_for_a_killed_learner_is_told(tmp_path, monkeypatch):
    """Reverb itself would let it wait for room in the queue until its time-out."""
    import reverb

    monkeypatch.setattr('impala_jax.runtimes.reverb_actors._WATCH_INTERVAL_S', 0.1)
    monkeypatch.setattr('impala_jax.runtimes.reverb_actors._ANSWER_TIMEOUT_S', 1)
    learner, stop = programs.start(tmp_path, '-c', STUCK_LEARNER), threading.Event()
    address = learner.stdout.readline().strip()
    thread, errors = in_thread(lambda: join(address, stop=stop))
    tunnel = Tunnel('localhost', int(address.partition(':')[2]), SECRET)
    client = reverb.Client(tunnel.address)
    wait_for(lambda: client.server_info(timeout=5)['trajectories-test'].current_size == 8, learner)
    learner.kill()
    finish(learner)
    tunnel.close()
    thread.join(CONFIG.timeout_s - 5)
    stop.set()
    assert not thread.is_alive() and 'no learner at localhost' in str(errors[0])


def test_tasks_are_left_to_other_machines_in_turn():
    minisuite = impala_jax.EnvironmentConfig('minisuite')
    assert suites.take_turns(minisuite, 1, 2, first=3).tolist() == [[3, 0]]
    assert suites.take_turns(minisuite, 2, 3, first=1).tolist() == [[1, 2, 3], [0, 1, 2]]


def start_learner(folder, port, *arguments, prefix=()):
    command = ['launch/local.py', '--config', 'configs/catch.py', '--workdir', str(folder / 'run')]
    return programs.start(folder, *command, *SERVE, '--serve-actors', str(port), *arguments, prefix=prefix)


def start_actors(folder, address, *arguments, num_actors=1, prefix=(), secret_of=None):
    command = ['launch/actors.py', '--learner', address, '--num-actors', str(num_actors)]
    if secret_of is not None:
        command += ['--secret-file', str(secret_of / 'run' / gate.SECRET_FILE)]
    return programs.start(folder, *command, *arguments, prefix=prefix)


def learner_steps(folder):
    path = folder / 'run' / 'metrics.jsonl'
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1])['learner_steps'] if lines and lines[-1].endswith('}') else 0


def wait_for_steps(folder, process):
    """Waits until the learner has done a few more."""
    steps = learner_steps(folder)
    wait_for(lambda: learner_steps(folder) > steps + 20, process)


def wait_until_joined(actors):
    """Waits until it says so; what it said until then."""
    said = ''
    while 'joined the learner' not in said:
        line = actors.stdout.readline()
        assert line, actors.communicate()
        said += line
    return said


def stop(process):
    """What else it said until it was asked to end."""
    process.send_signal(signal.SIGTERM)
    code, stdout, stderr = finish(process, 30)
    assert code == 128 + signal.SIGTERM, stdout + stderr
    assert stderr.splitlines()[-1] == 'stopped by signal 15' and 'Traceback' not in stderr, stderr
    return stdout


def test_actors_and_learner_outlive_each_other(tmp_path):
    """One of two actors is killed and started again; then the learner is stopped and started again."""
    import reverb
    from reverb.errors import DeadlineExceededError

    port = free_port()
    address, workdir = f'localhost:{port}', tmp_path / 'learner'
    doomed, other = (start_actors(tmp_path / name, address, secret_of=workdir) for name in ('doomed', 'other'))
    for actors in (doomed, other):
        assert 'next try in' in actors.stdout.readline()
    learner = start_learner(workdir, port, *ENDLESS)
    for actors in (doomed, other):
        wait_until_joined(actors)
    wait_for_steps(workdir, learner)
    with pytest.raises(DeadlineExceededError):  # Reverb's own client does not know the secret.
        reverb.Client(address).server_info(timeout=2)
    doomed.kill()
    wait_for_steps(workdir, learner)
    again = start_actors(tmp_path / 'again', address, '--actor.num-envs', '8', secret_of=workdir)
    assert '1 actors with 8 environments' in wait_until_joined(again)
    other.kill()
    wait_for_steps(workdir, learner)  # From the one that came back, and from no other.

    learner.send_signal(signal.SIGTERM)
    code, _, stderr = finish(learner)
    assert code == 128 + signal.SIGTERM, stderr
    saved = checkpoint.steps(workdir / 'run' / 'checkpoints')[-1]
    learner = start_learner(workdir, port, *ENDLESS)
    assert 'lost the learner' in wait_until_joined(again)
    wait_for(lambda: learner_steps(workdir) > saved + 20, learner)
    assert stop(again) == ''
    learner.send_signal(signal.SIGTERM)
    assert finish(learner)[0] == 128 + signal.SIGTERM
    for process in (doomed, other):
        finish(process)
    assert not [pid for name in ('doomed', 'other', 'again', 'learner') for pid in marked_processes(tmp_path / name)]


def test_a_learner_without_actors_of_its_own_outlasts_its_time_out(caplog):
    from impala_jax.runtimes.reverb_actors import waiting_for_actors
    from impala_jax.trajectory_queue import LocalTrajectoryQueue
    from impala_jax.types import Closed

    queue = LocalTrajectoryQueue(batch_size=4, capacity=4, timeout_s=0.1)
    threading.Timer(0.5, queue.close).start()
    with pytest.raises(Closed):
        waiting_for_actors(queue.get_batch)()
    assert 'all actors are on other machines' in caplog.text


@contextlib.contextmanager
def two_hosts():
    """What runs a command on either of two hosts: network namespaces with an address each, and a cable between them.

    Skips the test where the kernel does not allow that.
    """
    hosts = []
    with contextlib.ExitStack() as cleanup:

        def add(*prefix):
            host = subprocess.Popen(
                [*prefix, 'sh', '-c', 'echo ready && exec sleep 600'],
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            cleanup.callback(host.communicate)
            cleanup.callback(host.kill)
            if host.stdout.readline() != 'ready\n':
                pytest.skip(f'no network namespaces here: {host.stderr.read().strip()}')
            hosts.append(['nsenter', '-t', str(host.pid), '-U', '-n', '--preserve-credentials'])
            return host.pid

        def ip(host, command):
            subprocess.run([*host, 'ip', *command.split()], check=True, capture_output=True, text=True)

        try:
            add('unshare', '-r', '-n')
            other = add(*hosts[0], 'unshare', '-n')
            ip(hosts[0], f'link add net0 type veth peer name net1 netns {other}')
            for i, host in enumerate(hosts):
                ip(host, f'addr add 192.0.2.{i + 1}/24 dev net{i}')
                ip(host, f'link set net{i} up')
                ip(host, 'link set lo up')
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            pytest.skip(f'no network namespaces here: {getattr(error, "stderr", "") or error}')
        yield hosts


@pytest.mark.slow
@pytest.mark.parametrize('network', ['loopback', 'namespaces'])
def test_catch_is_solved_by_actors_that_join(network, tmp_path):
    with contextlib.ExitStack() as cleanup:
        here, there = cleanup.enter_context(two_hosts()) if network == 'namespaces' else ([], [])
        port = free_port()
        address = f'{"192.0.2.1" if there else "localhost"}:{port}'
        learner = start_learner(tmp_path / 'learner', port, '--evaluator.episodes', '100', prefix=here)
        actors = start_actors(tmp_path / 'actors', address, num_actors=2, prefix=there, secret_of=tmp_path / 'learner')
        code, stdout, stderr = finish(learner)
        said = stop(actors)
        assert code == 0, stdout + stderr + said
        row = json.loads((tmp_path / 'learner' / 'run' / 'evaluations.jsonl').read_text().splitlines()[-1])
        assert row['frames'] >= 600_000 and row['episodes'] == 100 and row['mean_return'] >= 0.95


def test_the_manifest_runs_the_command():
    """The command of `deploy/actors.yaml` names the port that its service and its firewall open."""
    yaml = pytest.importorskip('yaml')
    documents = list(yaml.safe_load_all((Path(programs.ROOT) / 'deploy' / 'actors.yaml').read_text()))
    kinds = {document['kind']: document for document in documents}
    assert set(kinds) == {'Service', 'NetworkPolicy', 'Deployment'}
    command = kinds['Deployment']['spec']['template']['spec']['containers'][0]['command']
    assert command[:2] == ['python', 'launch/actors.py']
    host, _, port = command[command.index('--learner') + 1].partition(':')
    assert host == kinds['Service']['metadata']['name']
    assert [entry['port'] for entry in kinds['Service']['spec']['ports']] == [int(port)]
    (rule,) = kinds['NetworkPolicy']['spec']['ingress']
    assert [entry['port'] for entry in rule['ports']] == [int(port)]
    labels = kinds['Deployment']['spec']['template']['metadata']['labels']
    assert rule['from'] == [{'podSelector': {'matchLabels': labels}}]
    assert kinds['NetworkPolicy']['spec']['podSelector']['matchLabels'] == kinds['Service']['spec']['selector']


def test_what_is_announced_comes_back_as_it_was():
    from impala_jax.runtimes import reverb_actors

    config = dataclasses.replace(CONFIG, vtrace=impala_jax.VTraceConfig(rho_bar=np.inf, c_bar=2.0))
    with server() as address:
        announce(address, config)
        session = reverb_actors._ask(address, lambda: SECRET)
        session.tunnel.close()
        assert (session.config, session.spec, session.suffix) == (config, str(SPEC), '-test')
        assert session.key == reverb_actors.items_key(SECRET, '-test') != reverb_actors.items_key(SECRET, '-other')


def test_only_who_knows_the_secret_is_believed():
    """Neither end believes the other without it; what is announced by somebody behind the gate, neither."""
    import reverb

    from impala_jax.runtimes import reverb_actors

    with server() as address:
        announce(address)
        with pytest.raises(ConfigError, match='it has another secret; give the secret it was started with$'):
            join(address, secret=b'quite another secret')
        other = dataclasses.replace(CONFIG, seed=7)
        client = reverb.Client(BEHIND[address])
        reverb_actors.announce(client, b'quite another secret', other, SPEC, '-evil').close()
        with pytest.raises(NodeFailure, match='for 0 s: .*waited 5 s for the learner to publish'):
            join(address)


def test_code_of_the_learners_is_imported_only_if_it_is_named_here(tmp_path, monkeypatch):
    (tmp_path / 'theirs.py').write_text('raise SystemExit("it was imported")')
    monkeypatch.syspath_prepend(tmp_path)
    for option, config in (
        ('--environment.name', dataclasses.replace(CONFIG, environment=impala_jax.EnvironmentConfig('theirs:make'))),
        ('--network.torso', dataclasses.replace(CONFIG, network=impala_jax.NetworkConfig(torso='theirs:Torso'))),
    ):
        with server() as address:
            announce(address, config)
            with pytest.raises(ConfigError, match=f"uses code .*'theirs:.*; add {option} theirs:") as error:
                join(address)
            assert '\n' not in str(error.value) and 'theirs' not in sys.modules
            with pytest.raises((ConfigError, SystemExit), match='it was imported'):
                join(address, imports=('theirs:make', 'theirs:Torso'))


def test_actors_try_again_where_a_handshake_was_cut_or_a_learner_was_replaced_by_something_else():
    from impala_jax.runtimes import reverb_actors

    with socket.create_server(('localhost', 0)) as listener:
        port = listener.getsockname()[1]
        thread, errors = in_thread(lambda: Tunnel('localhost', port, SECRET))
        near, _ = listener.accept()
        near.sendall(near.recv(1000)[:-33] + b'l' + bytes(32))
        assert len(near.recv(32, socket.MSG_WAITALL)) == 32
        near.close()
        thread.join(10)
        assert isinstance(errors[0], ConnectionError)
    echo = Echo()
    with pytest.raises(NodeFailure, match='for 2 s: it is not the gate of a learner'):
        reverb_actors._find(echo.address, lambda: SECRET, threading.Event(), 2.0, joined_before=True)
    echo.listener.close()

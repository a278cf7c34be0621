"""The runtime `ray` with an engine of its own: what dies is replaced, and nothing outlives the run."""

import contextlib
import os
import random
import signal
import socket
import tempfile
import time
from pathlib import Path

import pytest

import impala_jax
from impala_jax.config import ConfigError
from impala_jax.rundir import checkpoint
from tests.helpers import programs
from tests.helpers.configs import small
from tests.helpers.programs import STAND_INS, command_line, finish, marked_processes, of_session, wait_for
from tests.helpers.runs import ENDLESS, SMALL, rows_of, start

pytestmark = pytest.mark.ray

RAY = ['--runtime', 'ray']
SLOW = ['--environment.name', 'dmlab/rooms_watermaze', '--environment.level-cache', '', '--network.torso', 'shallow']


@pytest.fixture
def folder():
    """A folder with a short path: Ray's sockets are in it."""
    with tempfile.TemporaryDirectory(prefix='ray_', dir='/tmp') as name:
        yield Path(name)


def start_in(folder, *arguments, **kwargs):
    """A run whose temporary files are in `folder`."""
    (temporary := folder / 't').mkdir(exist_ok=True)
    environment = {'TMPDIR': str(temporary), **kwargs.pop('environment', {})}
    return start(folder / 'run', *arguments, *RAY, environment=environment, **kwargs)


def engine_of(folder):
    """The id of the process that keeps the engine, which is that of its session; None before it has started."""
    return next((int(pid) for pid in marked_processes(folder / 'run') if 'keeper.keep' in command_line(pid)), None)


def nothing_is_left(folder, session):
    wait_for(lambda: not of_session(session) and not marked_processes(folder / 'run'), timeout_s=15)
    wait_for(lambda: not os.listdir(folder / 't'), timeout_s=10)


@pytest.mark.parametrize(
    ('frames', 'num_more'),
    [(400_000, 1), pytest.param(4_000_000, 28, marks=[pytest.mark.slow, pytest.mark.timeout(1500)])],
)
def test_nodes_that_die_are_replaced(frames, num_more, folder):
    """Any of them, at any time; frames are counted once, and the run ends at its budget."""
    options = ['--total-frames', str(frames), '--learner.num-devices', '1', '--evaluator.episodes', '2']
    process = start_in(folder, *options, '--evaluator.interval-s', '0.5', '--actor.num-actors', '2')
    wait_for(lambda: rows_of(folder / 'run'), process)
    session = engine_of(folder)
    draw = random.Random(0)
    killed = []
    for name in ('ray::RemoteActor', 'ray::RemoteEvaluator', *['ray::'] * num_more):
        victim = draw.choice(workers(session, name, process))
        killed.append(command_line(victim))
        os.kill(victim, signal.SIGKILL)
        updates = rows_of(folder / 'run')[-1]['learner_steps']
        wait_for(lambda: rows_of(folder / 'run')[-1]['learner_steps'] > updates + 1, process)  # noqa: B023
    code, stdout, stderr = finish(process, timeout_s=900)
    assert code == 0, stdout + stderr
    rows = rows_of(folder / 'run')
    assert rows[-1]['frames'] == rows[-1]['learner_steps'] * 640 >= frames
    assert all(a['frames'] < b['frames'] for a, b in zip(rows[:-1], rows[1:], strict=True))
    num_actors = sum('RemoteActor' in name for name in killed)
    # Others may have died before Ray gave them the name of an actor.
    assert num_actors <= rows[-1]['actor_deaths'] <= len(killed) and rows[-1]['actors'] == 2
    assert stderr.count(' died: ') >= num_actors, stderr
    nothing_is_left(folder, session)


def workers(session, name, process):
    """Waits until Ray has worker processes of this name; returns them."""
    found = []
    wait_for(
        lambda: found.extend(p for p in of_session(session, name) if 'Agent' not in command_line(p)) or found, process
    )
    return found


def test_an_engine_that_dies_ends_the_run(folder):
    process = start_in(folder, *ENDLESS, '--checkpoint.interval-s', '0.5')
    wait_for(lambda: len(checkpoint.steps(folder / 'run' / 'checkpoints')) > 1, process)
    session = engine_of(folder)
    (raylet,) = [pid for pid in of_session(session, 'raylet/raylet')]
    os.kill(raylet, signal.SIGKILL)
    killed = time.monotonic()
    code, _, stderr = finish(process)
    assert time.monotonic() - killed < 30
    assert code == 1
    assert stderr.splitlines()[-1].startswith('error: the engine of Ray has ended, and this run with it; '), stderr
    nothing_is_left(folder, session)


def test_nothing_is_left_of_a_killed_run(folder):
    """Its environments are busy, in worker processes; the engine's keeper may be killed as well."""
    environment = {'PYTHONPATH': f'{Path.cwd()}:{STAND_INS}', 'DMLAB_STAND_IN_RESET_S': '60'}
    process = start_in(folder, *ENDLESS, *SLOW, environment=environment)
    wait_for(lambda: any('sleep' in command_line(pid) for pid in marked_processes(folder / 'run')), process)
    session = engine_of(folder)
    process.kill()
    finish(process)
    nothing_is_left(folder, session)


def test_the_next_start_sweeps(folder):
    """What is left when a run and its keeper are killed together."""
    process = start_in(folder, *ENDLESS)
    wait_for(lambda: rows_of(folder / 'run'), process)
    session = engine_of(folder)
    (left,) = (folder / 't').glob('impala_ray_*')
    assert left.stat().st_mode & 0o777 == 0o700
    for pid in (session, process.pid):
        os.kill(pid, signal.SIGKILL)
    finish(process)
    assert left.exists()
    code, _, stderr = finish(start_in(folder, *SMALL, '--total-frames', '1'))
    assert code == 0, stderr
    nothing_is_left(folder, session)


def test_every_server_asks_for_the_token(folder):
    """Ray's monitor, for one, would send its metrics to anybody."""
    process = start_in(folder, *ENDLESS)
    wait_for(lambda: rows_of(folder / 'run'), process)
    ports = programs.listening_ports(folder / 'run')
    assert ports
    answers = {port: first_line(port) for port in ports}
    process.terminate()
    code, _, stderr = finish(process)
    assert code == 143, stderr
    assert not [port for port, answer in answers.items() if b' 200 ' in answer], answers


def test_a_signal_in_the_last_evaluation_is_reported(folder):
    """Ray's C++ part has removed the handler of SIGTERM by then."""
    process = start_in(folder, *SMALL, '--total-frames', '1', '--evaluator.episodes', '50000')
    wait_for(lambda: engine_of(folder), process)
    wait_for(lambda: not engine_of(folder), process)  # Ends before the last evaluation.
    process.terminate()
    code, _, stderr = finish(process)
    assert code == 143
    assert stderr.splitlines()[-1:] and stderr.splitlines()[-1].startswith('stopped by signal 15'), stderr


def first_line(port):
    """What a server answers to a request of HTTP without a token; empty if it does not listen on every address."""
    with contextlib.suppress(OSError), socket.create_connection(('127.0.0.1', port), timeout=5) as connection:
        connection.sendall(b'GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n')
        return connection.recv(100)
    return b''


def test_an_empty_token_is_refused_by_the_name_of_its_variable(monkeypatch, folder):
    monkeypatch.setenv('RAY_AUTH_TOKEN', ' ')
    with pytest.raises(ConfigError, match='^RAY_AUTH_TOKEN: the token is empty; '):
        impala_jax.run(small(), folder / 'run', 'ray')


@pytest.mark.atari
def test_batches_are_views_but_for_replay(folder):
    """Replay would keep the views, and so fill the object store; the unroll of one actor is the whole batch."""
    script = folder / 'fleet.py'
    script.write_text("""
import threading
import impala_jax, jax
from impala_jax import ActorConfig, Config, EnvironmentConfig, LearnerConfig, NetworkConfig, ReplayConfig, environments
from impala_jax.build import make_agent
from impala_jax.parameter_store import LocalParameterStore
from impala_jax.rundir.code_version import code_version
from impala_jax.runtimes.host_share import host_share
from impala_jax.runtimes.ray_runtime.engine import LocalEngine
from impala_jax.runtimes.ray_runtime.fleet import Fleet, Published
from impala_jax.runtimes.ray_runtime.remote import Setup

config = Config(
    environment=EnvironmentConfig(name='atari/pong'),
    network=NetworkConfig(torso='mlp', mlp_sizes=(8,)),
    actor=ActorConfig(num_actors=1, num_envs=4),
)
agent = make_agent(config.network, environments.spec(config.environment))
store = LocalParameterStore(60.0)
store.publish(0, jax.device_get(agent.init(jax.random.PRNGKey(0))))
engine = LocalEngine(2, 0, 60.0)
try:
    engine.connect(threading.Event())
    for batch_size, fraction in ((4, 0.0), (8, 0.5)):
        from dataclasses import replace
        changed = replace(
            config, learner=LearnerConfig(batch_size=batch_size), replay=ReplayConfig(fraction=fraction, capacity=8)
        )
        fleet = Fleet(engine, Setup(changed, host_share(changed), agent.spec, code_version()), Published(store))
        print(fleet.get_batch().timesteps.observation.frames.flags.writeable)
        fleet.close()
finally:
    engine.close()
""")
    code, stdout, stderr = finish(programs.start(folder, str(script)))
    assert code == 0, stderr
    assert stdout.split() == ['False', 'True'], stdout


def test_an_actor_that_always_dies_ends_the_run(folder):
    factory = folder / 'dies.py'
    factory.write_text(
        """
import os
from impala_jax.environments.catch import Catch

class Dies(Catch):
    def step(self, action):
        if 'RAY_JOB_ID' in os.environ:  # In a worker process of an actor.
            parent = os.getppid()
            with open(f'/proc/{parent}/cmdline', 'rb') as file:
                if b'ray::' in file.read():  # Else it is dead already, and the parent now is the engine's keeper.
                    os.kill(parent, 9)
        return super().step(action)

def make(seed):
    return Dies(seed=seed)
"""
    )
    environment = {'PYTHONPATH': f'{Path.cwd()}:{folder}'}
    process = start_in(folder, *ENDLESS, '--environment.name', 'dies:make', environment=environment)
    code, _, stderr = finish(process)
    assert code == 1
    assert 'died 5 times in a row' in stderr.splitlines()[-1], stderr


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'ray_address': '127.0.0.1:1'}, "ray_address '127.0.0.1:1'"),
        ({'actor': impala_jax.ActorConfig(inference='accelerator')}, "actor.inference 'accelerator' requires"),
    ],
)
def test_what_is_refused_before_long_work(changes, message, folder):
    import dataclasses

    with pytest.raises(ConfigError, match=message) as error:
        impala_jax.run(dataclasses.replace(small(), **changes), folder / 'run', 'ray')
    assert '\n' not in str(error.value)
    assert not (folder / 'run').exists()

"""Signals: each command ends within 10 s, in every phase, with one line, 128 + n, and nothing left behind."""

import os
import signal
import time

import pytest

from impala_jax.rundir import checkpoint
from tests.helpers import programs
from tests.helpers.programs import STAND_INS, command_line, finish, marked_processes, wait_for

SECONDS = 15  # 10 on a machine that is idle, which it is not beside other tests.
TRAIN = [
    *('launch/local.py', '--config', 'configs/catch.py', '--total-frames', '100000000', '--evaluator.episodes', '0'),
    *('--learner.num-devices', '1'),
]
# Maps take a minute to compile, by grandchildren, while the worker's interpreter is locked.
SLOW = ['--environment.name', 'dmlab/rooms_watermaze', '--environment.level-cache', '', '--network.torso', 'shallow']
RUNTIMES = [
    ['--runtime', 'lockstep'],
    ['--runtime', 'threads'],
    pytest.param(['--runtime', 'ray'], marks=pytest.mark.ray),
    pytest.param(['--runtime', 'launchpad'], marks=pytest.mark.launchpad),
    pytest.param(
        ['--runtime', 'launchpad', '--launch-type', 'local_mp'], marks=[pytest.mark.launchpad, pytest.mark.slow]
    ),
]
IDS = ['lockstep', 'threads', 'ray', 'launchpad', 'launchpad_processes']


def start(folder, *command, reset_s='60'):
    """In a process group of its own, and with a folder for temporary files."""
    temporary = folder / 'temporary'
    temporary.mkdir(exist_ok=True)
    environment = {
        'PYTHONPATH': f'{programs.ROOT}:{STAND_INS}',
        'TMPDIR': str(temporary),
        'DMLAB_STAND_IN_RESET_S': reset_s,
    }
    return programs.start(folder, *command, environment=environment, prefix=['setsid'])


def stops(process, folder, number, *, group=True):
    """Ends as promised; returns the last line, the only one but for warnings of what a resumed run cannot have."""
    (os.killpg if group else os.kill)(process.pid, number)
    sent = time.monotonic()
    code, stdout, stderr = finish(process, timeout_s=60)
    took = time.monotonic() - sent
    assert code == 128 + number, stdout + stderr
    assert took < SECONDS, f'{took} s: {stderr}'
    *above, line = stderr.splitlines()
    assert all('a resumed run will start new episodes' in warning for warning in above), stderr
    assert line.startswith(f'stopped by signal {number:d}')
    wait_for(lambda: not marked_processes(folder), timeout_s=5)
    wait_for(lambda: not os.listdir(folder / 'temporary'), timeout_s=5)
    return line


def compilers(folder):
    """The grandchildren that a reset waits for."""
    return [pid for pid in marked_processes(folder) if 'sleep' in command_line(pid)]


@pytest.mark.parametrize('runtime', RUNTIMES, ids=IDS)
def test_while_environments_reset(runtime, tmp_path):
    """To the whole group, as SLURM does, and systemd."""
    process = start(tmp_path, *TRAIN, '--workdir', str(tmp_path / 'run'), *runtime, *SLOW)
    wait_for(lambda: compilers(tmp_path), process)
    stops(process, tmp_path, signal.SIGTERM)


@pytest.mark.parametrize('runtime', RUNTIMES[2:], ids=IDS[2:])
@pytest.mark.parametrize('seconds', [0.05, 1.0, 4.0])
def test_at_any_moment_of_the_start(runtime, seconds, tmp_path):
    at_a_moment_of_the_start(TRAIN, runtime, seconds, tmp_path)


@pytest.mark.parametrize('seconds', [0.0, 1.0])
def test_at_any_moment_of_the_start_of_the_command(seconds, tmp_path):
    at_a_moment_of_the_start(['-m', 'impala_jax', 'train', *TRAIN[1:]], RUNTIMES[1], seconds, tmp_path)


def at_a_moment_of_the_start(command, runtime, seconds, tmp_path):
    process = start(tmp_path, *command, '--workdir', str(tmp_path / 'run'), *runtime)
    # Python's own start is not ours.
    wait_for(lambda: has_begun(process.pid), process)
    time.sleep(seconds)  # Whatever it hits, the promise is the same.
    stops(process, tmp_path, signal.SIGINT)


@pytest.mark.launchpad
def test_nodes_that_find_the_program_stopped_say_nothing(tmp_path):
    """Each waits for the Reverb server, which takes longer to start than the run lasts."""
    script = tmp_path / 'stopped.py'
    script.write_text(f"""
import sys
import threading
import time
from pathlib import Path

import reverb

sys.path.insert(0, {str(programs.ROOT / 'configs')!r})
import catch
from impala_jax import environments
from impala_jax.build import make_agent
from impala_jax.build import make_agent
from impala_jax.runtimes import launchpad

make_server = reverb.Server
reverb.Server = lambda *arguments: time.sleep(4) or make_server(*arguments)
config = catch.get_config()
stop = threading.Event()
stop.set()
agent = make_agent(config.network, environments.spec(config.environment, 60.0), config.popart.enabled)
(workdir := Path({str(tmp_path / 'run')!r})).mkdir()
print(launchpad.run(config, agent, workdir, stop))
""")
    code, stdout, stderr = finish(programs.start(tmp_path, str(script)))
    assert (code, stdout.splitlines()[0], stderr) == (0, 'None', '')


def has_begun(pid):
    """Whether it has a second thread: `begin` starts it, after it has installed the handlers."""
    return len(os.listdir(f'/proc/{pid}/task')) > 1


def test_in_an_environment_that_hangs_when_it_is_built(tmp_path):
    process = start(
        tmp_path, *TRAIN, '--workdir', str(tmp_path / 'run'), '--environment.name', 'tests.helpers.hostile:hangs'
    )
    wait_for(lambda: len(marked_processes(tmp_path)) > 2, process)
    assert stops(process, tmp_path, signal.SIGINT) == 'stopped by signal 2'
    assert not (tmp_path / 'run').exists()


def test_in_an_evaluation(tmp_path):
    """Of a game whose first reset takes a minute."""
    run = ['--workdir', str(tmp_path / 'run')]
    options = [
        '--total-frames',
        '80',
        '--learner.unroll-length',
        '20',
        '--learner.batch-size',
        '1',
        '--network.torso',
        'mlp',
    ]
    train = [
        *TRAIN[:3],
        *options,
        '--evaluator.episodes',
        '0',
        *SLOW[:4],
        '--actor.num-actors',
        '1',
        '--actor.num-envs',
        '1',
    ]
    code, _, stderr = finish(start(tmp_path, *train, '--runtime', 'lockstep', *run, reset_s='0'))
    assert code == 0, stderr
    assert checkpoint.steps(tmp_path / 'run' / 'checkpoints')
    process = start(tmp_path, 'launch/evaluate.py', *run, '--episodes', '1', '--video', str(tmp_path / 'game.mp4'))
    wait_for(lambda: compilers(tmp_path), process)
    assert stops(process, tmp_path, signal.SIGTERM) == 'stopped by signal 15'
    assert not list(tmp_path.glob('*.mp4')) and not list(tmp_path.glob('.*'))


@pytest.mark.parametrize(('moment', 'number'), [('workers_start', signal.SIGINT), ('cells_run', signal.SIGHUP)])
def test_in_a_sweep(moment, number, tmp_path):
    """To the whole group, as from a terminal that is closed: workers and multiprocessing's tracker leave it alone."""
    options = ['--total-frames', '100000000', '--processes', '2']
    process = start(
        tmp_path, 'launch/ablate.py', '--grid', 'configs/ablations/lag.py', '--output', f'{tmp_path}/x', *options
    )
    if moment == 'workers_start':
        wait_for(lambda: any('spawn_main' in command_line(pid) for pid in marked_processes(tmp_path)), process)
    else:
        wait_for(lambda: list(tmp_path.glob('x/cells/*/metrics.jsonl')), process)
    line = stops(process, tmp_path, number)
    assert line == f'stopped by signal {number:d}; the same command resumes the sweep'


@pytest.mark.parametrize('number, group', [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_while_the_doctor_checks(number, group, tmp_path):
    process = start(tmp_path, '-m', 'impala_jax', 'doctor')
    checks = "exec(sys.argv[1], {'__name__'"  # What a check's own process is started with.
    wait_for(lambda: any(checks in command_line(pid) for pid in marked_processes(tmp_path)), process)
    assert stops(process, tmp_path, number, group=group) == f'stopped by signal {number:d}'


def program(folder, body):
    """A script whose main thread is in a library for minutes, as while XLA compiles."""
    script = folder / 'script.py'
    script.write_text(f"""
from impala_jax.system import stopping

stopping.begin()

import hashlib
import os
from pathlib import Path

from impala_jax.cli import command_line

def work():
    Path({str(folder / 'began')!r}).touch()
    {body}

command_line.main(work)
""")
    process = start(folder, str(script))
    wait_for((folder / 'began').exists, process)
    return process


COMPILES = "hashlib.pbkdf2_hmac('sha256', b'', b'', 1_000_000_000)"


def test_while_a_library_does_not_return(tmp_path):
    process = program(tmp_path, COMPILES)
    assert 'it had not exited by itself within 6 s' in stops(process, tmp_path, signal.SIGTERM)


def test_while_a_module_is_imported(tmp_path):
    """What is left of it cannot be imported by others."""
    imports = f"""
    import sys, time
    class Finder:
        def find_spec(self, name, *_):
            if name == 'jax.numpy':
                Path({str(tmp_path / 'half')!r}).touch()
                time.sleep(60)
    sys.meta_path.insert(0, Finder())
    import jax
"""
    process = program(tmp_path, imports.strip())
    wait_for((tmp_path / 'half').exists, process)
    assert stops(process, tmp_path, signal.SIGINT) == 'stopped by signal 2'


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    process = program(tmp_path, COMPILES)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(1.2)  # Sooner it could be the same one, from the terminal and from a program between.
    sent = time.monotonic()
    assert stops(process, tmp_path, signal.SIGINT) == 'stopped by signal 2, at once'
    assert time.monotonic() - sent < 3


def test_what_is_saved_is_not_cut_short(tmp_path):
    saves = f"""
    import threading, time
    stop = threading.Event()
    with stopping.StopSignals(stop):
        stop.wait()
        with stopping.critical_section():
            time.sleep(7.5)
            Path({str(tmp_path / 'saved')!r}).touch()
    raise stopping.Stopped(15)
"""
    process = program(tmp_path, saves.strip())
    assert stops(process, tmp_path, signal.SIGTERM) == 'stopped by signal 15'
    assert (tmp_path / 'saved').exists()

"""The judge of `make chaos` can say no: programs that break one promise each fail for just that reason."""

import json
import subprocess
import sys
import time

import pytest

from tests.chaos import cases, faults, judge, results
from tests.chaos.cases import Case
from tests.chaos.experiment import FAILED, KEPT, Experiment
from tests.chaos.judge import Bounds
from tests.chaos.processes import Process, Stopped, marked
from tests.chaos.proxy import Proxy
from tests.chaos.recipes import Recipe
from tests.helpers.programs import ROOT

BOUNDS = Bounds(signal_s=1.5, leftovers_s=1.0, failure_s=5.0, finish_s=20.0)

# A run of ten rows; SIGTERM stops it, and the same command goes on. Its argument is how it misbehaves after SIGTERM.
PROGRAM = """
import json, os, pathlib, signal, subprocess, sys, time
folder, fault = pathlib.Path(sys.argv[1]), sys.argv[2]
folder.mkdir(exist_ok=True)
metrics = folder / 'metrics.jsonl'
done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
is_resumed = done > 0

def write(frames):
    row = {'frames': frames, 'learner_steps': frames // 10, 'wall_time_s': time.time()}
    with open(metrics, 'a') as file:
        file.write(json.dumps(row) + chr(10))

def stop(number, _):
    if fault == 'late':
        time.sleep(3)
    if fault == 'hangs':
        time.sleep(600)
    if fault == 'leaves a process':
        subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)
    if fault == 'leaves a file':
        pathlib.Path(os.environ['TMPDIR'], 'left').touch()
    if fault == 'goes backwards':
        write(10)
    if fault == 'tears a row':
        metrics.open('a').write('{"frames": ')
    if fault == 'raises':
        raise ZeroDivisionError('of our own')
    print('' if fault == 'says nothing' else 'stopped by signal 15; the same command resumes', file=sys.stderr)
    os._exit(1 if fault == 'status' else 0 if fault == 'pretends' else 143)

signal.signal(signal.SIGTERM, stop)
if is_resumed and fault == 'does not resume':
    sys.exit('error: it is broken')
if is_resumed and fault == 'starts again':
    metrics.unlink()
    done = 0
for i in range(done + 1, 11 - (is_resumed and fault == 'loses frames')):
    write(10 * i)
    time.sleep(0.05 if is_resumed else 0.3)
(folder / 'evaluations.jsonl').write_text(json.dumps({'frames': 100}) + chr(10))
"""


def conduct(tmp_path, fault, **changes):
    """The verdict on PROGRAM after SIGTERM: an outcome, and the promises that it broke."""
    program = tmp_path / 'program.py'
    program.write_text(PROGRAM)
    folder = tmp_path / 'case'
    folder.mkdir()
    run = folder / 'run'
    recipe = Recipe(
        [str(program), str(run), fault],
        run,
        [run],
        num_updates=10,
        frames_per_update=10,
        environment={'CHAOS_SWITCH': str(folder / 'trouble')},
        timeout_s=5.0,
        patience_s=5.0,
        saves=False,
    )
    case = Case(0, 'threads', 'catch', 'signal', 'SIGTERM', 'main', 'row', 0.3, None, 0.0, ())._replace(**changes)
    experiment = Experiment(case, recipe, folder, 1.0, lambda: False, bounds=BOUNDS)
    outcome = experiment.conduct()
    assert not marked(str(folder)), 'the harness itself leaves something behind'
    return outcome, {failure.promise for failure in experiment.failures}, experiment


def test_a_good_program_is_as_promised(tmp_path):
    outcome, broken, experiment = conduct(tmp_path, 'none')
    assert (outcome, broken) == (KEPT, set()), experiment.failures
    assert experiment.facts['status'] == 143 and experiment.facts['ended_after_s'] < 1.5


@pytest.mark.parametrize(
    ('fault', 'promise'),
    [
        ('late', 'ends within its bound (first)'),
        ('leaves a process', 'nothing is left (first)'),
        ('leaves a file', 'nothing is left (first)'),
        ('goes backwards', 'files are valid and monotone (first)'),
        ('tears a row', 'files are valid and monotone (first)'),
        ('raises', 'one line, no traceback (first)'),
        ('says nothing', 'the last line says why (first)'),
        ('status', 'status (first)'),
        ('pretends', 'status (first)'),
        ('does not resume', 'the same command finishes (again)'),
        ('starts again', 'the same command goes on (again)'),
        ('loses frames', 'no frames are lost (again)'),
    ],
)
def test_a_broken_promise_is_found(fault, promise, tmp_path):
    outcome, broken, experiment = conduct(tmp_path, fault)
    assert outcome == FAILED and promise in broken, experiment.failures
    follows = {  # What one fault does to the promises that come after it.
        'goes backwards': {'files are valid and monotone (again)', 'no frames are lost (again)'},
        'tears a row': {'files are valid and monotone (again)', 'no frames are lost (again)'},
        'raises': {'status (first)', 'the last line says why (first)'},
    }
    assert broken - {promise} <= follows.get(fault, set()), experiment.failures


def test_a_program_that_hangs_is_ended_and_described(tmp_path, monkeypatch):
    monkeypatch.setattr('tests.chaos.experiment._OVERTIME_S', 1.0)
    outcome, broken, experiment = conduct(tmp_path, 'hangs')
    assert outcome == FAILED and broken == {'ends within its bound (first)'}
    assert len(experiment.facts['processes']) == 1 and 'program.py' in experiment.facts['processes'][0]
    assert 'program.py' in experiment.tails()


def test_a_fault_that_comes_too_late_is_no_case(tmp_path):
    outcome, broken, _ = conduct(tmp_path, 'none', delay_s=10.0)
    assert outcome == 'not applied' and not broken


def test_a_harness_that_is_stopped_leaves_nothing(tmp_path):
    began = time.monotonic()
    with pytest.raises(Stopped):
        folder = tmp_path / 'case'
        folder.mkdir()
        command = ['-c', 'import time; time.sleep(600)']
        recipe = Recipe(
            command,
            folder / 'run',
            [folder / 'run'],
            1,
            1,
            {'CHAOS_SWITCH': 'none'},
            1,
            1,
        )
        case = Case(0, 'threads', 'catch', 'signal', 'SIGTERM', 'main', 'row', 0.0, None, 0.0, ())
        Experiment(case, recipe, folder, 1.0, lambda: time.monotonic() > began + 1).conduct()
    assert not marked(str(folder)) and time.monotonic() - began < 10


def test_a_seed_is_a_case():
    drawn = [cases.draw(seed, cases.RUNTIMES) for seed in range(3000)]
    assert drawn == [cases.draw(seed, cases.RUNTIMES) for seed in range(3000)]
    assert {case.runtime for case in drawn} == set(cases.RUNTIMES)
    assert {case.fault for case in drawn} >= {*cases.SIGNALS, *cases.DISK, *cases.DAMAGE, *cases.CONNECTION, 'SIGSTOP'}
    assert len({case.line for case in drawn}) == 3000 and not any('\n' in case.line for case in drawn)
    assert 0.05 < sum(case.is_quick for case in drawn) / 3000 < 0.5
    without = cases.draw(0, ('lockstep', 'threads'))
    assert without.runtime in ('lockstep', 'threads')


def test_leftovers_are_named():
    process = Process(7, 1, 'S', 0, 'python -m launchpad')
    (failure,) = judge.leftovers([process], [], 30.0)
    assert 'python -m launchpad' in failure.seen and failure.expected == 'no process 30 s after the end'
    assert not judge.leftovers([], [], 30.0)


def test_lockstep_is_compared_bit_for_bit():
    import numpy as np

    def learned(value, row):
        return judge.Learned({'run': [{'frames': row}]}, {'run': {'/w': np.float32([value])}}, '')

    assert not judge.same(learned(1.0, 5), learned(1.0, 5))
    (failure,) = judge.same(learned(1.0, 5), learned(np.nextafter(np.float32(1), np.float32(2)), 5))
    assert failure.seen == '/w of run differs'
    (failure,) = judge.same(learned(1.0, 5), learned(1.0, 6))
    assert failure.seen == 'row 0 of run differs in frames'
    assert not judge.same(learned(1.0, 5), learned(1.0, 6), with_rows=False)


def test_a_damaged_checkpoint_is_found(tmp_path):
    import numpy as np

    from impala_jax.config import Config
    from impala_jax.rundir.checkpoint import Checkpointer

    checkpointer = Checkpointer(tmp_path / 'run' / 'checkpoints', Config(), keep=3)
    for step in (1, 2):
        checkpointer.save(step, {'learner': {'w': np.arange(3.0)}}, {})
    recipe = Recipe([], tmp_path / 'run', [tmp_path / 'run'], 2, 1, {}, 1, 1)
    assert not judge.files(recipe, torn=False)
    for fault in cases.DAMAGE:
        case = cases.draw(0, cases.RUNTIMES)._replace(family='damage', fault=fault, target='newest')
        count, restore = faults.damage(case, recipe, tmp_path / f'good_{fault}')
        (failure,) = judge.files(recipe, torn=False)
        assert count == 1 and failure.expected == 'checkpoints/000000002 is good', fault
        restore()
        assert not judge.files(recipe, torn=False)


def test_a_proxy_cuts_stalls_and_garbles():
    import socket
    import threading

    from impala_jax.runtimes.supervisor import free_port

    server = socket.create_server(('127.0.0.1', 0))
    near = free_port()

    def answer():  # Backwards, so that what is flipped twice shows.
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                while data := connection.recv(100):
                    connection.sendall(data[::-1])

    threading.Thread(target=answer, daemon=True).start()
    proxy = Proxy(near, server.getsockname()[1])
    with socket.create_connection(('127.0.0.1', near), 5) as client:
        client.settimeout(5)
        client.sendall(b'as it is')
        assert client.recv(100) == b'si ti sa'
        proxy.mode = 'garbled'
        client.sendall(b'as it is')
        assert client.recv(100) != b'si ti sa'
        proxy.mode = 'stalled'
        client.sendall(b'later')
        client.settimeout(0.5)
        with pytest.raises(TimeoutError):
            client.recv(100)
        proxy.mode = 'pass'
        client.settimeout(5)
        assert client.recv(100) == b'retal'
        proxy.mode = 'cut'
        assert client.recv(100) == b''
    proxy.close()
    server.close()


def test_results_are_kept_by_seed_and_version(tmp_path):
    case = cases.draw(1, cases.RUNTIMES)
    verdict = {'seed': 1, 'line': case.line, 'kind': case.kind, 'runtime': case.runtime, 'failures': []}
    kept = results.Results(tmp_path / 'results.jsonl', 'a')
    assert kept.known(case) is None
    kept.add({**verdict, 'outcome': FAILED})
    with (tmp_path / 'results.jsonl').open('a') as file:
        file.write('{"seed": ')  # Torn by a kill.
        file.write('\n')
    kept.add({**verdict, 'outcome': KEPT})
    assert kept.known(case)['outcome'] == KEPT
    assert kept.known(case._replace(delay_s=99.0)) is None  # The seed means another case now.
    assert results.Results(tmp_path / 'results.jsonl', 'b').known(case) is None
    lines = results.table(kept.rows()).splitlines()
    assert f'| {case.kind} |' in lines[2] and '1/1' in lines[2] and lines[-1].startswith('1 cases: 1 as promised')
    assert json.loads((tmp_path / 'results.jsonl').read_text().splitlines()[0])['version'] == 'a'


def test_the_command_lists_cases_and_prints_the_table(tmp_path):
    def chaos(*arguments):
        command = [sys.executable, '-m', 'tests.chaos', '--results', str(tmp_path), *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout

    lines = chaos('--list', '--cases', '20', '--first-seed', '7').splitlines()
    assert lines == [cases.draw(seed, cases.installed()).line for seed in range(7, 27)]
    quick = chaos('--list', '--cases', '8', '--quick', '--fault', 'SIGTERM').splitlines()
    assert len(quick) == 8 and all('SIGTERM' in line for line in quick)
    assert chaos('--list', '--seed', '9').splitlines() == [lines[2]]
    assert '0 cases: 0 as promised, 0 failed' in chaos('--table')

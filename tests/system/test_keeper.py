"""Programs that are kept: they end with the process that started them, however it ends."""

import os
import signal
import sys
from pathlib import Path

import pytest

from impala_jax.system.keeper import KeptProgram
from tests.helpers.programs import finish, of_session, start, wait_for

# The marks in the environment of its child are gone, and the child ignores what can be ignored.
PROGRAM = [
    sys.executable,
    '-c',
    'import subprocess, sys; subprocess.run([sys.executable, "-c", sys.argv[1]], env={})',
    'import signal, time; [signal.signal(n, signal.SIG_IGN) for n in (1, 2, 15)]; print("up", flush=True); '
    'time.sleep(600)',
]


@pytest.fixture
def kept(tmp_path):
    program = KeptProgram('kept_', tmp_path, 'the program has ended, and this process with it')
    yield program
    if not program.closed:
        program.close()


def test_ends_with_everything_that_it_started(kept, tmp_path):
    kept.start(PROGRAM, {})
    wait_for(lambda: b'up' in kept.output.read_bytes(), timeout_s=20)
    assert kept.folder.stat().st_mode & 0o777 == 0o700
    (session,) = {os.getsid(pid) for pid in _children_of_this_process()}
    assert len(of_session(session)) == 3
    kept.close()
    assert not of_session(session) and not list(tmp_path.iterdir())


def test_a_program_that_ends_by_itself(kept):
    kept.start([sys.executable, '-c', 'print("a reason"); raise SystemExit(3)'], {'PYTHONUNBUFFERED': '1'})
    wait_for(lambda: kept.has_ended, timeout_s=20)
    assert kept.output.read_text() == 'a reason\n'


@pytest.mark.parametrize('keeper_too', [False, True])
def test_ends_when_its_parent_is_killed(keeper_too, tmp_path):
    """With its keeper killed as well, the next start ends what has kept its mark, and removes the folder."""
    script = tmp_path / 'parent.py'
    script.write_text(f"""
import time
from pathlib import Path
from impala_jax.system.keeper import KeptProgram

program = KeptProgram('kept_', Path({str(tmp_path)!r}))
program.start({PROGRAM!r}, {{}})
print(program._process.pid, flush=True)
time.sleep(600)
""")
    process = start(tmp_path, str(script))
    session = int(process.stdout.readline())
    wait_for(lambda: len(of_session(session)) >= 3, process)
    if keeper_too:
        os.kill(session, signal.SIGKILL)
    process.kill()
    finish(process)
    if keeper_too:
        assert of_session(session) and list(tmp_path.glob('kept_*'))
        KeptProgram('kept_', tmp_path).close()
    wait_for(lambda: not of_session(session) and not list(tmp_path.glob('kept_*')), timeout_s=10)


def test_the_last_line_of_a_process_that_ends_with_its_program(tmp_path):
    script = tmp_path / 'parent.py'
    script.write_text(f"""
import os, time
from pathlib import Path
from impala_jax.system.keeper import KeptProgram

program = KeptProgram('kept_', Path({str(tmp_path)!r}), 'the program has ended')
program.start(['true'], {{}})
while not program.has_ended:
    time.sleep(0.01)
os._exit(1)
""")
    assert finish(start(tmp_path, str(script))) == (1, '', 'the program has ended\n')


def _children_of_this_process():
    found = []
    for entry in Path('/proc').glob('[0-9]*'):
        try:
            if int((entry / 'stat').read_text().rpartition(')')[2].split()[1]) == os.getpid():
                if 'keeper.keep' in (entry / 'cmdline').read_text():
                    found.append(int(entry.name))
        except OSError:
            continue
    return found

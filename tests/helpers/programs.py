"""Starting the project's programs as a person does, and finding what they left behind."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
STAND_INS = ROOT / 'tests' / 'stand_ins'


def start(folder, *command, environment=None, prefix=(), stdin=None):
    """`prefix ... python command ...` from the project's root; all of its processes are marked with `folder`."""
    inherited = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'}  # One device, as a person.
    environment = inherited | {'PYTHONPATH': str(ROOT), 'RUN_MARK': str(folder)} | (environment or {})
    return subprocess.Popen(
        [*prefix, sys.executable, *command],
        cwd=ROOT,
        env=environment,
        text=True,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process, timeout_s=240):
    """Exit code, stdout and stderr of a process that ends by itself."""
    stdout, stderr = process.communicate(timeout=timeout_s)
    return process.returncode, stdout, stderr


def marked_processes(folder):
    """The processes, zombies aside, that descend from the program started for `folder`."""
    found = []
    for entry in Path('/proc').glob('[0-9]*'):
        try:
            if f'RUN_MARK={folder}'.encode() in (entry / 'environ').read_bytes().split(b'\0'):
                found.append(entry.name)
        except OSError:
            continue
    return found


def wait_for(condition, process=None, timeout_s=200):
    """Waits for a condition; if `process` is to bring it about, only while that lives."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, 'it never came about'
        time.sleep(0.02)


def children(name='from impala_jax.environments import worker'):
    """The ids of this process's children, zombies aside, whose command line holds `name`: workers of environments."""
    found = []
    for entry in Path('/proc').glob('[0-9]*'):
        try:
            state, parent = (entry / 'stat').read_text().rpartition(')')[2].split()[:2]
            if state != 'Z' and int(parent) == os.getpid() and name in (entry / 'cmdline').read_text():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


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


def alive(pid):
    """Whether there is a process of this id which is not a zombie."""
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except FileNotFoundError:
        return False


def command_line(pid):
    """The words of a process's command line, which zeros divide; empty if it has ended."""
    with contextlib.suppress(OSError):
        return Path(f'/proc/{pid}/cmdline').read_text(errors='replace')
    return ''


def of_session(session, name=''):
    """The processes of a session, zombies aside, by a part of their command line; workers of Ray hide their marks."""
    found = []
    for entry in Path('/proc').glob('[0-9]*'):
        with contextlib.suppress(OSError):
            state, _, _, sid, *_ = (entry / 'stat').read_text().rpartition(')')[2].split()
            if int(sid) == session and state not in 'ZX' and name in command_line(entry.name):
                found.append(int(entry.name))
    return found

"""What differs between the machines, containers and shells that programs are started in."""

from __future__ import annotations

import math
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

START = 'IMPALA_JAX_START'
"""In the environment of all processes of a Launchpad program, and of those that they start: which start it is."""

PARENT = 'IMPALA_JAX_PARENT'
"""In the environment of a process's workers, and of what they start: the parent's `own_folder`."""

_CLEANER = (
    'import sys; sys.path.insert(0, sys.argv[1]); '
    'from impala_jax.system import machine; machine.clean_up_after(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])'
)
_PACKAGES = str(Path(__file__).parents[2])
_own_folders: dict[int, tuple[str, subprocess.Popen]] = {}  # by this process's id, which is another one after a fork
_lock = threading.Lock()

_CGROUPS = Path('/sys/fs/cgroup')
_OWN_CGROUPS = Path('/proc/self/cgroup')


def num_cores() -> int:
    """CPU cores that this process may use, by its affinity and its container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return max(1, min([cores, *map(math.ceil, _quotas())]))


def start_of(process: int) -> str | None:
    """When a process of this machine started, to tell it from a later one of the same id; None once it has ended."""
    try:
        fields = Path(f'/proc/{process}/stat').read_text().rpartition(')')[2].split()
    except OSError:
        return None
    return None if fields[0] in 'ZX' else fields[19]


def kill_marked(variable: str, number: int = signal.SIGKILL) -> bool:
    """Kills the processes with `NAME=value` in their environment, this one aside, whatever their session is.

    The variable is inherited by everything that a process starts. Does nothing where there is no /proc.

    Args:
      variable: the mark.
      number: another signal to send once; 0 only looks.
    Returns:
      Whether there were any.
    """
    mark = os.fsencode(variable)
    any_found = False
    for _ in range(5):  # One may start another meanwhile.
        found = False
        for entry in Path('/proc').glob('[0-9]*'):
            try:
                if int(entry.name) == os.getpid() or mark not in (entry / 'environ').read_bytes().split(b'\0'):
                    continue
                descriptor = os.pidfd_open(int(entry.name))  # From here on the id is that of this process.
            except OSError:
                continue
            try:
                if mark in (entry / 'environ').read_bytes().split(b'\0'):
                    signal.pidfd_send_signal(descriptor, number)
                    found = any_found = True
            except OSError:
                continue
            finally:
                os.close(descriptor)
        if not found or number != signal.SIGKILL:
            break
    return any_found


def own_folder() -> str:
    """A folder for temporary files of this process and its workers, which only this user can enter.

    A process beside this one removes it, and kills workers that are left, when this one has ended, however it ends. No
    thread of a worker could: an engine may keep the interpreter's lock for a minute.
    """
    with _lock:
        own = os.getpid()
        if own not in _own_folders:
            folder = tempfile.mkdtemp(prefix='impala_jax_')
            theirs, _ = os.pipe()  # This end is never closed.
            cleaner = subprocess.Popen(
                [sys.executable, '-S', '-c', _CLEANER, _PACKAGES, str(own), str(theirs), folder],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # Who reads this process's output waits for all that write there.
                pass_fds=(theirs,),
                start_new_session=True,
                env={name: value for name, value in os.environ.items() if name != START},
            )
            os.close(theirs)
            _own_folders[own] = folder, cleaner
        return _own_folders[own][0]


def clean_up() -> None:
    """Does now what would be done after this process: kills its workers, and removes its `own_folder`."""
    folder, cleaner = _own_folders.pop(os.getpid(), (None, None))
    if folder is not None and cleaner is not None:
        kill_marked(f'{PARENT}={folder}')
        shutil.rmtree(folder, ignore_errors=True)
        cleaner.kill()


def clean_up_after(parent: int, lifeline: int, folder: str) -> None:
    """Waits for the end of the parent process, however it ends; kills its workers, and removes its files.

    Args:
      parent: its id.
      lifeline: file descriptor that ends when it does.
      folder: its `own_folder`.
    """
    mark = f'{PARENT}={folder}'
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # A process that the parent has forked may hold the other end open.
    while os.getppid() == parent and not select.select([lifeline], [], [], 1.0)[0]:
        pass
    deadline = time.monotonic() + 3.0
    while kill_marked(mark, 0) and time.monotonic() < deadline:
        time.sleep(0.1)
    kill_marked(mark)
    shutil.rmtree(folder, ignore_errors=True)


def expand_home(path: str) -> Path | None:
    """`path` with `~` replaced; None where the user has no home directory, as in a container started with a bare id."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return None


def connect_without_proxy(*hosts: str) -> None:
    """Lets gRPC connect to this machine, and to `hosts`, without the proxy of the environment."""
    # gRPC reads `no_proxy` only where `no_grpc_proxy` is not set.
    present = os.environ.get('no_grpc_proxy') or os.environ.get('no_proxy') or ''
    names = [name for name in present.split(',') if name]
    local = ['localhost', '127.0.0.1', '::1', socket.gethostname(), *hosts]
    os.environ['no_grpc_proxy'] = ','.join(dict.fromkeys(names + local))


def open_standard_streams() -> None:
    """Makes standard streams that can be written without an error; call it before anything else opens files.

    A file opened while standard error is closed takes its number, and receives what libraries write there. What would
    go to a closed standard error goes to standard output. Characters that the locale cannot encode are escaped.
    """
    closed = [descriptor for descriptor in (0, 1, 2) if not _is_open(descriptor)]
    null = os.open(os.devnull, os.O_RDWR)  # Takes the first of them.
    for descriptor in closed:
        source = 1 if descriptor == 2 and 1 not in closed else null
        if source != descriptor:
            os.dup2(source, descriptor)
        os.set_inheritable(descriptor, True)
    if null not in closed:
        os.close(null)
    if sys.stdout is None:
        sys.stdout = open(1, 'w', closefd=False)
    if sys.stderr is None:
        sys.stderr = open(2, 'w', buffering=1, closefd=False)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):  # Not in a notebook.
            stream.reconfigure(errors='backslashreplace')  # pyright: ignore[reportAttributeAccessIssue]


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _quotas() -> Iterator[float]:
    """CPU quotas, in cores, of this process's control groups and those above them, of both versions."""
    try:
        lines = _OWN_CGROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(':', 2)
        if controllers and 'cpu' not in controllers.split(','):
            continue
        top = _CGROUPS / 'cpu' if controllers else _CGROUPS
        own = top / path.lstrip('/')
        for folder in (own, *own.parents):
            if controllers:
                quota, period = _read(folder / 'cpu.cfs_quota_us'), _read(folder / 'cpu.cfs_period_us')
            else:
                quota, period = [*_read(folder / 'cpu.max').split(), '', ''][:2]
            if quota.isdecimal() and period.isdecimal() and int(period) and int(quota):  # `max` and -1: no limit.
                yield int(quota) / int(period)
            if folder == top:
                break


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ''

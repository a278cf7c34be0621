"""Properties of the machine, container or shell that a program runs in, and cleaning up after child processes."""

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
"""Environment variable that identifies the start of a Launchpad program, set in all of its processes."""

PARENT = 'IMPALA_JAX_PARENT'
"""Environment variable with the parent's `own_folder`, set in a process's workers and inherited by their children."""

_CLEANER = (
    'import sys; sys.path.insert(0, sys.argv[1]); '
    'from impala_jax.system import machine; machine.clean_up_after(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])'
)
_PACKAGES = str(Path(__file__).parents[2])
_own_folders: dict[int, tuple[str, subprocess.Popen]] = {}  # by process id, which changes in a fork
_lock = threading.Lock()

_CGROUPS = Path('/sys/fs/cgroup')
_OWN_CGROUPS = Path('/proc/self/cgroup')


def num_cores() -> int:
    """Returns the number of CPU cores that this process may use, by its affinity and its container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return max(1, min([cores, *map(math.ceil, _quotas())]))


def start_of(process: int) -> str | None:
    """Returns the start time of a process, which distinguishes reused process ids; None if it has ended."""
    try:
        fields = Path(f'/proc/{process}/stat').read_text().rpartition(')')[2].split()
    except OSError:
        return None
    return None if fields[0] in 'ZX' else fields[19]


def kill_marked(variable: str, number: int = signal.SIGKILL) -> bool:
    """Kills all other processes that have a given environment variable, in any session.

    Environment variables are inherited, so this includes all descendants. Without /proc it does nothing.

    Args:
      variable: The variable and its value, as `NAME=value`.
      number: Signal to send; SIGKILL is repeated until no process is left, others are sent once, 0 only checks.

    Returns:
      Whether there were such processes.
    """
    mark = os.fsencode(variable)
    any_found = False
    for _ in range(5):  # The processes may start others in the meantime.
        found = False
        for entry in Path('/proc').glob('[0-9]*'):
            try:
                if int(entry.name) == os.getpid() or mark not in (entry / 'environ').read_bytes().split(b'\0'):
                    continue
                descriptor = os.pidfd_open(int(entry.name))  # From here on the id cannot be reused.
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
    """Returns a folder for temporary files of this process and its workers, accessible only to this user.

    When this process has ended for whatever reason, a separate process removes the folder and kills remaining workers.
    A thread in each worker could not do so, because an engine may hold the interpreter lock for a minute.
    """
    with _lock:
        own = os.getpid()
        if own not in _own_folders:
            folder = tempfile.mkdtemp(prefix='impala_jax_')
            theirs, _ = os.pipe()  # This end is never closed.
            cleaner = subprocess.Popen(
                [sys.executable, '-S', '-c', _CLEANER, _PACKAGES, str(own), str(theirs), folder],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # Otherwise readers of this process's output would wait for the cleaner.
                pass_fds=(theirs,),
                start_new_session=True,
                env={name: value for name, value in os.environ.items() if name != START},
            )
            os.close(theirs)
            _own_folders[own] = folder, cleaner
        return _own_folders[own][0]


def clean_up() -> None:
    """Kills this process's workers and removes its `own_folder`, as would happen after it has ended."""
    folder, cleaner = _own_folders.pop(os.getpid(), (None, None))
    if folder is not None and cleaner is not None:
        kill_marked(f'{PARENT}={folder}')
        shutil.rmtree(folder, ignore_errors=True)
        cleaner.kill()


def clean_up_after(parent: int, lifeline: int, folder: str) -> None:
    """Waits until the parent process has ended, then kills its workers and removes its files.

    Args:
      parent: Id of the parent process.
      lifeline: File descriptor of a pipe that is closed when the parent ends.
      folder: `own_folder` of the parent.
    """
    mark = f'{PARENT}={folder}'
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # The pipe may stay open in a process forked by the parent, so the parent's id is checked as well.
    while os.getppid() == parent and not select.select([lifeline], [], [], 1.0)[0]:
        pass
    deadline = time.monotonic() + 3.0
    while kill_marked(mark, 0) and time.monotonic() < deadline:
        time.sleep(0.1)
    kill_marked(mark)
    shutil.rmtree(folder, ignore_errors=True)


def has_accelerator() -> bool:
    """Whether JAX may use a GPU or TPU: one is visible, and `JAX_PLATFORMS` does not rule it out."""
    if os.environ.get('JAX_PLATFORMS') == 'cpu':
        return False
    devices = Path('/dev')
    return any(any(devices.glob(pattern)) for pattern in ('nvidia[0-9]*', 'kfd', 'accel*', 'vfio/[0-9]*'))


def expand_home(path: str) -> Path | None:
    """Expands `~` in `path`; returns None if the user has no home directory, as with a bare user id in a container."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return None


def connect_without_proxy(*hosts: str) -> None:
    """Makes gRPC connect to this machine and to `hosts` directly, without a configured proxy."""
    # gRPC reads `no_proxy` only if `no_grpc_proxy` is not set.
    present = os.environ.get('no_grpc_proxy') or os.environ.get('no_proxy') or ''
    names = [name for name in present.split(',') if name]
    local = ['localhost', '127.0.0.1', '::1', socket.gethostname(), *hosts]
    os.environ['no_grpc_proxy'] = ','.join(dict.fromkeys(names + local))


def open_standard_streams() -> None:
    """Ensures that the standard streams are open and writable; to be called before anything else opens files.

    Otherwise, a file opened while standard error is closed would get its descriptor, and with it the messages that
    libraries write there. A closed standard error is redirected to standard output. Characters that the locale cannot
    encode are escaped.
    """
    closed = [descriptor for descriptor in (0, 1, 2) if not _is_open(descriptor)]
    null = os.open(os.devnull, os.O_RDWR)  # gets the lowest closed descriptor
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
        if hasattr(stream, 'reconfigure'):  # not in notebooks
            stream.reconfigure(errors='backslashreplace')  # pyright: ignore[reportAttributeAccessIssue]


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _quotas() -> Iterator[float]:
    """Yields the CPU quotas, in cores, of this process's control groups and their ancestors (versions 1 and 2)."""
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

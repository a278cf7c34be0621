"""A process that starts a program in a session of its own, and ends the whole session when its parent has ended.

The parent holds a pipe open, so the kernel reports its end, however it ends. Processes are found by their session,
because a program may overwrite the environment that /proc shows. This module imports the standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from impala_jax.system.machine import START, kill_marked

_LOCK, _OUTPUT, _ENDED = 'lock', 'output.txt', 'ended'  # Files in the program's folder.
_MAIN = (
    'import sys; sys.path.insert(0, sys.argv[1]); '
    'from impala_jax.system import keeper; keeper.keep(int(sys.argv[2]), *sys.argv[3:5], sys.argv[5:])'
)
_NOTICE_S = 3.0  # Longest time that the command takes to notice the end of one of its processes.
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_PACKAGES = str(Path(__file__).parents[2])


class KeptProgram:
    """A program whose processes and folder do not outlive this process.

    Args:
      prefix: Prefix of the folder's name. Folders with this prefix that a killed keeper has left are removed.
      base: Where to create the folder, which is accessible to this user only.
      last_line: Line to write to standard error if the program ends first, and this process with it.
    """

    def __init__(self, prefix: str, base: Path, last_line: str = ''):
        self._last_line = last_line
        for left in base.glob(f'{prefix}*'):
            _remove_left(left)
        self.folder = Path(tempfile.mkdtemp(prefix=prefix, dir=base))
        self.output = self.folder / _OUTPUT
        """File with the program's output."""
        self.closed = False
        self._process: subprocess.Popen[bytes] | None = None
        self._lifeline = -1

    def start(self, command: list[str], environment: dict[str, str]) -> None:
        """Starts the program with some more environment variables."""
        theirs, self._lifeline = os.pipe()
        self.output.touch()
        self._process = subprocess.Popen(
            [sys.executable, '-S', '-c', _MAIN, _PACKAGES, str(theirs), str(self.folder), self._last_line, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(theirs,),
            start_new_session=True,
            env={**os.environ, **environment, START: str(self.folder)},
        )
        os.close(theirs)

    @property
    def has_ended(self) -> bool:
        """Whether the program has ended."""
        ended = (self.folder / _ENDED).exists()
        return self._process is not None and (ended or self._process.poll() is not None)

    def close(self, timeout_s: float = 10.0) -> None:
        """Ends the program, and removes its folder.

        Raises:
          subprocess.TimeoutExpired: If it does not end in time.
        """
        self.closed = True
        if self._process is None:
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        with contextlib.suppress(BrokenPipeError):  # The keeper was killed.
            os.write(self._lifeline, b'.')
        os.close(self._lifeline)
        status = self._process.wait(timeout_s)
        if status < 0:  # The keeper itself was killed.
            _end(self._process.pid, str(self.folder))


def keep(lifeline: int, folder: str, last_line: str, command: list[str]) -> None:
    """Runs a command until it or the parent ends, and ends the rest of this process's session.

    Args:
      lifeline: File descriptor of a pipe that is closed when the parent ends, after one byte if it ends on purpose.
      folder: The program's folder; locked meanwhile, and removed at the end.
      last_line: Line to write to standard error if the command ends first, and the parent with it.
      command: The command.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # A handler, because the command would inherit SIG_IGN.
    _adopt_orphans()
    lock = _lock(Path(folder))
    try:
        with open(Path(folder) / _OUTPUT, 'wb') as output:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        while process.poll() is None and not select.select([lifeline], [], [], 0.2)[0]:
            pass
        if process.poll() is not None:
            (Path(folder) / _ENDED).touch()
            select.select([lifeline], [], [])  # The parent may read the output of a program that has ended.
        on_purpose = bool(os.read(lifeline, 1))
        if last_line and not on_purpose:
            with contextlib.suppress(subprocess.TimeoutExpired, OSError):
                process.wait(_NOTICE_S)
                os.write(2, f'{last_line}\n'.encode())
    finally:
        _end(os.getpid(), folder)
        os.close(lock)


def _adopt_orphans() -> None:
    """Makes this process the parent of orphans among its descendants: in a container, nothing else may reap them."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _end(session: int, folder: str) -> None:
    """Kills all processes of a session and of the program, except this one, and removes the folder."""
    for _ in range(20):  # They may start others in the meantime.
        if not _kill_session(session):
            break
    kill_marked(f'{START}={folder}')  # Some are in sessions of their own.
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    shutil.rmtree(folder, ignore_errors=True)


def _kill_session(session: int) -> bool:
    """Kills the processes of a session, except this one; returns whether there were any."""
    found = False
    for entry in Path('/proc').glob('[0-9]*'):
        process = int(entry.name)
        with contextlib.suppress(OSError):
            state, *fields = (entry / 'stat').read_text().rpartition(')')[2].split()
            if int(fields[2]) == session and process != os.getpid() and state not in 'ZX':
                os.kill(process, signal.SIGKILL)
                found = True
    return found


def _lock(folder: Path) -> int:
    """Makes the lock of a program's folder; returns the descriptor that holds it."""
    descriptor = os.open(made := folder / f'{_LOCK}.new', os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    made.rename(folder / _LOCK)  # Locked already: another start must not take it.
    return descriptor


def _relocked(folder: Path) -> int:
    """Takes the lock of a keeper that has ended; raises BlockingIOError if it has not."""
    descriptor = os.open(folder / _LOCK, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _remove_left(folder: Path) -> None:
    """Removes the folder of a program whose keeper was killed, and kills what is left of the program."""
    with contextlib.suppress(OSError):  # It belongs to another user, or another start removes it.
        if folder.lstat().st_uid == os.getuid() and (folder / _LOCK).exists():
            descriptor = _relocked(folder)
            kill_marked(f'{START}={folder}')
            _kill_users_of(folder)
            shutil.rmtree(folder, ignore_errors=True)
            os.close(descriptor)


def _kill_users_of(folder: Path) -> None:
    """Kills processes, other than this one, that have a file of a folder open.

    Their session is not known any more, and a program may have overwritten their environment.
    """
    for entry in Path('/proc').glob('[0-9]*'):
        if int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if any(os.readlink(file).startswith(f'{folder}/') for file in (entry / 'fd').iterdir()):
                os.kill(int(entry.name), signal.SIGKILL)

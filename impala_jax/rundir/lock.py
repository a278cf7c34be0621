"""A lock on a folder, so that two processes never write the same run.

The lock is an flock on the file `.lock`, which the kernel releases whenever and however the process ends. The file
names the process that holds the lock; a process that is not killed removes it. Network file systems do not always
support flocks between machines, so the holder also touches the file every few seconds.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import logging
import os
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from impala_jax.config import ConfigError
from impala_jax.rundir.files import errors_name
from impala_jax.system.machine import start_of

LOCK = '.lock'
_HEARTBEAT_S = 5.0
_SILENCE_S = 20.0  # A holder on another machine has ended if it has not touched the file for this long.
_UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)

_logger = logging.getLogger(__name__)


class _Holder(NamedTuple):
    """The process that a lock file names."""

    host: str
    pid: int
    since: str
    command: str

    def __str__(self) -> str:
        return f'process {self.pid} on {self.host}, since {self.since}: {self.command}'


@contextlib.contextmanager
def only_process(folder: Path, option: str = '--workdir') -> Iterator[None]:
    """Holds the lock of `folder` in the body of the `with`; makes the folder if it does not exist.

    The lock of a killed process is taken over: at once on the machine where that process ran, on other machines if the
    lock file has not been touched for 20 s.

    Args:
      folder: Folder to lock.
      option: Name of the folder on the command line, for messages.

    Raises:
      ConfigError: If another process holds the lock, or the folder cannot be written.
    """
    path = Path(folder) / LOCK
    is_new = not path.parent.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, has_flock = _open(path)
    except OSError as error:
        raise ConfigError(
            f'cannot write to {option} {folder}: {error.strerror}; give a directory that can be written'
        ) from error
    with os.fdopen(descriptor, 'r+b', buffering=0) as file:
        _require_free(path, has_flock)
        now = datetime.datetime.now().astimezone().isoformat(' ', 'seconds')
        holder = _Holder(socket.gethostname(), os.getpid(), now, f'{sys.argv[0]} {shlex.join(sys.argv[1:])}'[:200])
        with errors_name(path):
            file.truncate()
            file.write(json.dumps(holder._asdict()).encode())
        released = threading.Event()
        heartbeat = threading.Thread(target=_touch, args=(descriptor, released), name='folder lock', daemon=True)
        heartbeat.start()
        try:
            yield
        finally:
            released.set()
            heartbeat.join(_HEARTBEAT_S)  # A file system may hang.
            try:
                if _is_at(path, descriptor):
                    path.unlink()  # While locked: a process that has opened the file then notices that it was removed.
            except OSError as error:  # Not raised, so that it does not hide an error of the body.
                _logger.warning('cannot remove the lock %s: %s', path, error.strerror)
            if is_new:
                with contextlib.suppress(OSError):
                    path.parent.rmdir()  # Succeeds only if it is empty, after a failed start.


def _open(path: Path) -> tuple[int, bool]:
    """Opens and locks the file; returns its descriptor and whether the file system supports flocks.

    Raises:
      ConfigError: If another process holds the flock.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, descriptor):
                return descriptor, True
            os.close(descriptor)  # The previous holder has removed the file in the meantime.
        except BlockingIOError:
            os.close(descriptor)
            raise _refusal(path) from None
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                return descriptor, False
            os.close(descriptor)
            raise


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except (FileNotFoundError, NotADirectoryError):
        return False


def _require_free(path: Path, has_flock: bool) -> None:
    """Raises ConfigError if the process named in the file is alive, although the flock is free."""
    holder = _read(path)
    if holder is None or (holder.host == socket.gethostname() and (has_flock or start_of(holder.pid) is None)):
        return
    _logger.warning(
        '%s names %s; waiting %g s for a sign of life, because locks may not cross machines', path, holder, _SILENCE_S
    )
    first = _last_touched(path)
    deadline = time.monotonic() + _SILENCE_S
    while time.monotonic() < deadline:
        if _last_touched(path) != first:
            raise _refusal(path)
        time.sleep(0.1)


def _refusal(path: Path) -> ConfigError:
    holder = _read(path)
    where = '' if holder is None or holder.host == socket.gethostname() else ' on another machine'
    return ConfigError(
        f'another process{where} trains in {path.parent} ({holder or "it has not written its name yet"}); '
        'wait for its end, or give another folder'
    )


def _read(path: Path) -> _Holder | None:
    """Reads the holder; None if the file is empty, missing or incomplete."""
    try:
        return _Holder(**json.loads(path.read_bytes()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _last_touched(path: Path) -> int:
    """Time of the last touch; opens the file, because network file systems answer `stat` from a cache."""
    with path.open('rb') as file:
        return os.fstat(file.fileno()).st_mtime_ns


def _touch(descriptor: int, released: threading.Event) -> None:
    while not released.wait(_HEARTBEAT_S):
        try:
            os.utime(descriptor)
        except OSError as error:
            _logger.warning('cannot touch the lock; other machines may take it for abandoned: %s', error)

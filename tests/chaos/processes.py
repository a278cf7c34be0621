"""The processes of a case: started, found again by a mark that their descendants inherit, and ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.helpers.programs import ROOT

MARK = 'RUN_MARK'
_WORKER = 'from impala_jax.environments import worker'


class Process(NamedTuple):
    """A process as it was seen."""

    pid: int
    parent: int
    state: str  # a letter: R, S, D, T, ...
    started: int  # clock ticks since the machine's start
    command: str

    def __str__(self) -> str:
        return f'{self.pid} ({self.state}, child of {self.parent}): {self.command[:160]}'


def marked(mark: str) -> list[Process]:
    """The processes, zombies aside, that were started with the mark, the oldest first."""
    found = []
    wanted = f'{MARK}={mark}'.encode()
    for entry in Path('/proc').glob('[0-9]*'):
        with contextlib.suppress(OSError):  # It has ended, or is somebody else's.
            if wanted not in (entry / 'environ').read_bytes().split(b'\0'):
                continue
            fields = (entry / 'stat').read_text().rpartition(')')[2].split()
            command = (entry / 'cmdline').read_bytes().replace(b'\0', b' ').decode(errors='replace').strip()
            if fields[0] != 'Z':
                found.append(Process(int(entry.name), int(fields[1]), fields[0], int(fields[19]), command))
    return sorted(found, key=lambda process: (process.started, process.pid))


def role(process: Process, tree: Sequence[Process], main: int) -> str:
    """`main`, `environment` (a worker of environments, or what that has started) or `node` (any other)."""
    if process.pid == main:
        return 'main'
    by_pid = {other.pid: other for other in tree}
    seen: Process | None = process
    while seen is not None and seen.pid != main:
        if _WORKER in seen.command:
            return 'environment'
        seen = by_pid.get(seen.parent)
    return 'node'


def end_all(mark: str) -> list[Process]:
    """Kills whatever has the mark, until nothing has; returns what had it."""
    killed: dict[int, Process] = {}
    for _ in range(50):
        left = marked(mark)
        if not left:
            break
        for process in left:
            killed[process.pid] = process
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.1)
    return list(killed.values())


class Program:
    """A command of the project's, in a session and a temporary folder of its own; what it writes goes to files."""

    def __init__(self, command: Sequence[str], folder: Path, mark: str, name: str, environment: dict[str, str]):
        self.command, self.mark = command, mark
        self.stdout, self.stderr = folder / f'{name}.stdout', folder / f'{name}.stderr'
        self.temporary = folder / f'{name}.tmp'
        self.temporary.mkdir(parents=True, exist_ok=True)
        inherited = {key: value for key, value in os.environ.items() if key != 'XLA_FLAGS'}  # One device.
        own = {'JAX_PLATFORMS': 'cpu', MARK: mark, 'TMPDIR': str(self.temporary)}
        with open(self.stdout, 'ab') as stdout, open(self.stderr, 'ab') as stderr:
            self._process = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env=inherited | own | environment,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
        self.pid = self._process.pid
        self.started = time.monotonic()

    @property
    def status(self) -> int | None:
        """As `subprocess`: negative for a signal; None while it runs."""
        return self._process.poll()

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def signal_group(self, number: int) -> None:
        """As `timeout` and a terminal do."""
        if self.status is None:
            os.killpg(self.pid, number)

    def words(self) -> tuple[str, str]:
        """What it has written to standard output and standard error."""
        return self.stdout.read_text(errors='replace'), self.stderr.read_text(errors='replace')

    def kill(self) -> None:
        """Ends it with all of its descendants."""
        self._process.kill()
        self._process.wait(60)
        end_all(self.mark)


class Stopped(Exception):
    """The harness itself was asked to stop."""


def wait(condition: Callable[[], bool], bound_s: float, is_stopped: Callable[[], bool], poll_s: float = 0.1) -> bool:
    """Waits for a condition; returns whether it came within the bound. Raises `Stopped`."""
    deadline = time.monotonic() + bound_s
    while not condition():
        if is_stopped():
            raise Stopped
        if time.monotonic() > deadline:
            return False
        time.sleep(poll_s)
    return True

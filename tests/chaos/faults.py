"""What breaks a run: signals, disks, damaged files and connections; each can be taken back."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from . import processes
from .cases import Case
from .processes import Program
from .proxy import Proxy
from .recipes import Recipe

_DISK_MIB = 64


class Struck(NamedTuple):
    """What was broken."""

    role: str  # of a process that was signalled: `main`, `environment`, `node` or `actors`; else ''
    what: str  # for the report
    undo: Callable[[], None]


def _nothing() -> None:
    pass


def missing(case: Case, folder: Path) -> str | None:
    """Why the case cannot be made on this machine, or None."""
    if case.fault == 'disk full' and not _can_mount(folder):
        return 'a full disk needs the right to mount a small file system'
    if case.fault == 'read-only' and os.geteuid() == 0 and not _can_forbid(folder):
        return 'root is refused nothing here: chattr does not work'
    return None


@contextlib.contextmanager
def disk_of(case: Case, run: Path) -> Iterator[None]:
    """The folder of the case's run: on a file system of its own where that will be filled."""
    if case.fault == 'disk full':
        run.mkdir(parents=True)
        with _mounted(run):
            yield
    else:
        yield


def strike(case: Case, recipe: Recipe, program: Program, actors: Program | None, proxy: Proxy | None) -> Struck:
    """Breaks something of a running program."""
    if case.family in ('signal', 'kill', 'stop'):
        return _signal(case, program, actors)
    if case.family == 'disk':
        return _spoil_disk(case.fault, recipe.folder)
    if case.family == 'connection':
        assert proxy is not None
        proxy.mode = case.fault

        def restore() -> None:
            proxy.mode = 'pass'

        return Struck('', f'connections {case.fault} after {proxy.num_bytes} bytes', restore)
    assert case.family == 'damage'
    program.signal_group(signal.SIGKILL)
    return Struck('main', 'SIGKILL to the group; the checkpoints are damaged after it', _nothing)


def _signal(case: Case, program: Program, actors: Program | None) -> Struck:
    number = signal.Signals[case.fault]
    if case.target == 'actors' and actors is not None:
        actors.signal(number)
        undo = (lambda: actors.signal(signal.SIGCONT)) if case.family == 'stop' else _nothing
        return Struck('actors', f'{case.fault} to the actors, {actors.pid}', undo)
    tree = processes.marked(program.mark)
    if case.target == 'group':
        program.signal_group(number)
        return Struck('main', f'{case.fault} to the group {program.pid}', _nothing)
    if case.target == 'all':
        for process in tree:
            _send(process.pid, number)
        return Struck('main', f'{case.fault} to all of {len(tree)} processes', _nothing)
    others = [process for process in tree if process.pid != program.pid]
    if case.target == 'main' or not others:
        program.signal(number)
        pid, role, what = program.pid, 'main', f'{case.fault} to the main process, {program.pid}'
    else:
        process = others[int(case.victim * len(others))]
        _send(process.pid, number)
        pid, role = process.pid, processes.role(process, tree, program.pid)
        what = f'{case.fault} to {process} ({role}; {len(others)} others)'
    undo = (lambda: _send(pid, signal.SIGCONT)) if case.family == 'stop' else _nothing
    return Struck(role, what, undo)


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def damage(case: Case, recipe: Recipe, kept: Path) -> tuple[int, Callable[[], None]]:
    """Damages the newest checkpoint of each run, or all of them.

    Args:
      kept: Where copies of the good ones go.
    Returns:
      How many were damaged, and what puts the good ones back.
    """
    rng = random.Random(case.seed)
    damaged = []
    for index, run in enumerate(recipe.runs):
        steps = sorted(path for path in (run / 'checkpoints').glob('*') if path.name.isdecimal())
        if case.target == 'newest' and len(steps) < 2:
            continue  # There would be nothing to go on from.
        for checkpoint in steps[-1:] if case.target == 'newest' else steps:
            copy = kept / str(index) / checkpoint.name
            shutil.copytree(checkpoint, copy)
            damaged.append((checkpoint, copy))
            files = sorted(path for path in checkpoint.rglob('*') if path.is_file() and path.stat().st_size)
            _damage_file(rng.choice(files), case.fault, rng)

    def restore() -> None:
        for checkpoint, copy in damaged:
            shutil.rmtree(checkpoint, ignore_errors=True)
            shutil.copytree(copy, checkpoint)

    return len(damaged), restore


def _damage_file(path: Path, how: str, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if how == 'missing':
        path.unlink()
        return
    if how == 'truncated':
        content = content[: rng.randrange(len(content))]
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def _spoil_disk(fault: str, run: Path) -> Struck:
    if fault == 'disk full':
        filler = run / 'filler'
        with open(filler, 'wb', buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b'\0' * 4096)
        return Struck('', f'the disk of {run} is full', filler.unlink)
    if fault == 'read-only':
        _forbid(run, True)
        return Struck('', f'nothing can be written in {run}', lambda: _forbid(run, False))
    if fault == 'removed':
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(run, ignore_errors=True)
        return Struck('', f'{run} was removed', _nothing)
    assert fault == 'replaced by a file'
    aside = run.with_name('aside')
    if run.exists():
        run.rename(aside)
    run.write_text('not a folder')

    def restore() -> None:
        if run.is_dir():
            shutil.rmtree(run)
        run.unlink(missing_ok=True)
        if aside.exists():
            aside.rename(run)

    return Struck('', f'{run} was replaced by a file', restore)


def _forbid(run: Path, forbidden: bool) -> None:
    run.mkdir(exist_ok=True)
    if os.geteuid() == 0:
        subprocess.run(['chattr', '-R', '+i' if forbidden else '-i', str(run)], check=False, capture_output=True)
    else:
        subprocess.run(['chmod', '-R', 'a-w' if forbidden else 'u+w', str(run)], check=False, capture_output=True)


def release(folder: Path) -> None:
    """Takes back whatever an experiment that did not come to its end has done to the file system below `folder`."""
    mounts = [line.split()[1] for line in Path('/proc/mounts').read_text().splitlines()]
    for mount in mounts:
        if Path(mount).is_relative_to(folder):
            subprocess.run(['umount', '-l', mount], check=False, capture_output=True)
    if (folder / 'run').is_dir():
        _forbid(folder / 'run', False)


def _can_forbid(folder: Path) -> bool:
    probe = folder / 'probe'
    probe.mkdir(parents=True, exist_ok=True)
    _forbid(probe, True)
    try:
        (probe / 'file').touch()
    except OSError:
        return True
    else:
        return False
    finally:
        _forbid(probe, False)
        shutil.rmtree(probe)


def _can_mount(folder: Path) -> bool:
    probe = folder / 'probe'
    probe.mkdir(parents=True, exist_ok=True)
    try:
        with _mounted(probe):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False
    finally:
        probe.rmdir()


@contextlib.contextmanager
def _mounted(folder: Path) -> Iterator[None]:
    command = ['mount', '-t', 'tmpfs', '-o', f'size={_DISK_MIB}m', 'tmpfs', str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(['umount', '-l', str(folder)], check=False, capture_output=True)

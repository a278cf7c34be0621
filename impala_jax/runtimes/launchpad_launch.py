"""Launching a Launchpad program, as threads or as processes, and ending it."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import launchpad as lp
from launchpad.launch import worker_manager
from launchpad.nodes.python.local_multi_processing import PythonProcess

from impala_jax.config import Config
from impala_jax.runtimes.control import Control, Server
from impala_jax.system import stopping
from impala_jax.system.machine import START, kill_marked, own_folder

_ENDING_S = 5.0  # Time for nodes to end, except for a learner that saves a checkpoint.
_SAVING_S = 30.0  # Time for a learner to save, without replay.

# Wrapper script that starts the Python process of a node and records the signal that killed it.
_SHELL = """#!/bin/sh
trap '' HUP
{python} "$@"
status=$?
[ $status -le 128 ] || echo $((status - 128)) > {folder}/killed-$$
"""


@contextlib.contextmanager
def program_folder(config: Config, control: Control) -> Iterator[tuple[Control | str, Path]]:
    """Provides the access of nodes to `control`, and a temporary folder for them."""
    with tempfile.TemporaryDirectory(dir=own_folder()) as name:
        folder = Path(name)
        if config.launch_type != 'local_mp':
            yield control, folder
            return
        mark = f'{START}={folder}'
        stopping.at_forced_end(lambda: kill_marked(mark))
        server = Server(control, lambda shell: _cause_of_death(shell, folder))
        try:
            yield server.address, folder
        finally:
            server.close()
            kill_marked(mark)


def launch(program: lp.Program, config: Config, folder: Path, control: Control, stop: threading.Event) -> None:
    """Runs the program until all nodes have ended; after a request to stop, for a limited time.

    Args:
      program: The program.
      config: How nodes are launched, and how long the learner may take to save.
      folder: Folder of the program.
      control: Control of the program.
      stop: Event that requests the end.
    """
    # Launchpad's handlers would signal all descendants of this process, even environments, and kill it after a while.
    worker_manager._SIGNAL_HANDLERS = {  # pyright: ignore[reportAttributeAccessIssue]
        number: set() for number in (*stopping.SIGNALS, signal.SIGQUIT, signal.SIGALRM, signal.SIGUSR1)
    }
    in_threads = config.launch_type == 'local_mt'
    if in_threads:
        manager = lp.launch(program, launch_type='local_mt')
    else:
        with _inherited_by_nodes(folder):
            of_all = {START: str(folder)}
            python = _interpreter(folder)
            processes = {
                name: PythonProcess(
                    env=of_all if name == 'learner' else of_all | {'JAX_PLATFORMS': 'cpu'},
                    _absolute_interpreter_path=python,
                )
                for name in program.groups
            }
            manager = lp.launch(program, 'local_mp', terminal='current_terminal', local_resources=processes)
    labels = [
        name if in_threads else f'{name}/{i}' for name, group in program.groups.items() for i in range(len(group))
    ]
    try:
        # The learner ends first; another node that ends before it has died.
        first = _in_thread(lambda: manager.wait(labels, raise_error=False, return_on_first_completed=True))
        while first.is_alive() and not (stop.is_set() or control.stop.is_set()):
            first.join(0.1)
    finally:
        with stopping.critical_section():
            _end(_in_thread(lambda: manager.wait(raise_error=False)), config, folder, control)


def _end(all_ended: threading.Thread, config: Config, folder: Path, control: Control) -> None:
    """Ends all nodes. After their time to end, processes are killed and threads are abandoned."""
    in_threads = config.launch_type == 'local_mt'
    control.stop.set()
    start = time.monotonic()
    # Processes that are still starting cannot receive the request, and have nothing to save.
    deadline = start + (_ENDING_S if control.learns or in_threads else 0.0)
    while all_ended.is_alive() and time.monotonic() < deadline:
        all_ended.join(0.1)
        if control.saves:
            deadline = min(time.monotonic() + _ENDING_S, start + saving_s(config))
    if not in_threads:
        kill_marked(f'{START}={folder}')
        all_ended.join(_ENDING_S)


def saving_s(config: Config) -> float:
    """Time for a learner to save, in seconds; 10,000 trajectories of Atari were saved in 20 s on two cores."""
    return _SAVING_S + (config.replay.capacity / 100 if config.num_replayed else 0)


def _in_thread(target: Any) -> threading.Thread:
    thread = threading.Thread(target=target, name='launchpad', daemon=True)
    thread.start()
    return thread


@contextlib.contextmanager
def _inherited_by_nodes(folder: Path) -> Iterator[None]:
    """Sets what node processes inherit: `folder` for Launchpad's files, and blocked signals.

    The launching process handles signals to the process group, such as Ctrl-C, and stops its nodes.
    """
    tempfile.tempdir, before = str(folder), tempfile.tempdir
    try:
        with stopping.deferred():
            yield
    finally:
        tempfile.tempdir = before


def _interpreter(folder: Path) -> str:
    """Path of a script that runs Python and records the signal that killed it; Python if scripts cannot be run."""
    script = folder / 'python'
    script.write_text(_SHELL.format(python=shlex.quote(sys.executable), folder=shlex.quote(str(folder))))
    script.chmod(0o700)
    return str(script) if os.access(script, os.X_OK) else sys.executable


def _cause_of_death(shell: int, folder: Path) -> str:
    """Returns how the node that the process `shell` started has died, as a predicate: "was killed by ..."."""
    note = folder / f'killed-{shell}'
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError):
            by = signal.Signals(int(note.read_text()))
            more = ', as by the system when memory runs out' if by == signal.SIGKILL else ''
            return f'was killed by signal {by:d} ({by.name}){more}'
        time.sleep(0.05)
    return 'died without a Python error; its last output, if any, is above'

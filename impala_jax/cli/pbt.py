"""`impala pbt`: trains a population."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from impala_jax.cli import command_line
from impala_jax.config import Config
from impala_jax.rundir.files import METRICS
from impala_jax.rundir.rows import read_rows
from impala_jax.rundir.summary import print_summary
from impala_jax.runtimes.run import Interrupted, default_runtime, run
from impala_jax.runtimes.supervisor import end_with
from impala_jax.studies import pbt
from impala_jax.system import program, stop_watch, stopping
from impala_jax.system.stop_watch import StopWatch

_STOP_TIMEOUT_S = 60.0  # How long members may take to write a checkpoint after a signal.


def train() -> None:
    """Parses the command line and trains the population, or one of its members."""
    parser = command_line.Parser(
        description='Trains a population, one process per member; the same command resumes it.',
        epilog='Every field of the configuration can be set, as in --pbt.interval-frames 1000000; '
        f'{program.command("train")} --fields lists them.',
    )
    parser.add_argument('--config', required=True, help=command_line.CONFIG_HELP)
    parser.add_argument(
        '--workdir', required=True, type=Path, help='directory of the population; machines may share it'
    )
    parser.add_argument('--members', type=int, default=4, help='number of members to train (default: %(default)s)')
    parser.add_argument('--member', type=int, help='index of the only member to train; others run on other machines')
    parser.add_argument('--runtime', default=None, help='launchpad, ray, threads or lockstep')
    parser.add_argument('--parent', type=int, help=argparse.SUPPRESS)
    arguments, overrides = parser.parse_known_args()
    if arguments.runtime == 'device':
        parser.error('--runtime device has no population based training; use another runtime')
    if arguments.members < 1:
        parser.error(f'--members must be positive, got {arguments.members}')
    if arguments.member is not None and arguments.member < 0:
        parser.error(f'--member must be 0 or more, got {arguments.member}')
    config = command_line.override(command_line.load_config_file(arguments.config), overrides)
    pbt.join(arguments.workdir, config)
    if arguments.member is None:
        train_members(config, arguments.workdir, arguments.members)
        return
    if arguments.parent is not None:
        end_with(arguments.parent)
    workdir = pbt.member_folder(arguments.workdir, arguments.member)
    runtime = arguments.runtime or default_runtime()
    if arguments.runtime is None and runtime == 'ray':
        runtime = 'threads'  # Members are processes already, and each would start an engine.
    run(pbt.member_config(config, arguments.member), workdir, runtime)
    print_summary(workdir)


def train_members(config: Config, population: Path, count: int) -> None:
    """Trains members as processes on this machine; if one fails, the others continue."""
    folders = [pbt.member_folder(population, index) for index in range(count)]
    processes: list[subprocess.Popen] = []
    stop = threading.Event()
    columns = (BarColumn(), TextColumn('{task.percentage:.0f} %'), TextColumn('{task.description}'))
    progress = Progress(*columns, TimeRemainingColumn(), TextColumn('left'))
    with stopping.StopSignals(stop) as signals, progress:
        task = progress.add_task('', total=count * config.total_updates * config.frames_per_update)
        try:
            for index, folder in enumerate(folders):
                folder.mkdir(exist_ok=True)
                command = [*program.itself(), *sys.argv[1:], '--member', str(index), '--parent', str(os.getpid())]
                with open(folder / 'log.txt', 'ab') as log, stopping.deferred():
                    # Ctrl-C reaches this process only, which passes it on.
                    processes.append(
                        subprocess.Popen(
                            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                        )
                    )
            watches = [StopWatch(process.pid) for process in processes]
            while any(process.poll() is None for process in processes) and not stop.wait(0.5):
                for index, (process, watch) in enumerate(zip(processes, watches, strict=True)):
                    if process.poll() is None and watch.too_long():
                        process.kill()
                        line = f'error: the member was stopped for {stop_watch.STOPPED_S:g} s (SIGSTOP), and was killed'
                        with open(folders[index] / 'log.txt', 'a') as log:
                            log.write(f'{line}\n')
                frames, text = progress_of(folders)
                progress.update(task, completed=frames, description=text)
        finally:
            with stopping.critical_section():
                end(processes)
        frames, text = progress_of(folders)
        progress.update(task, completed=frames, description=text)
    if signals.received is not None and any(process.returncode for process in processes):
        raise Interrupted(signals.received, frames, population)
    print(pbt.summary(population))
    failed = [index for index, process in enumerate(processes) if process.returncode]
    if failed:
        lines = (folders[failed[0]] / 'log.txt').read_text(errors='replace').strip().splitlines() or ['no output']
        others = f', and {len(failed) - 1} more' if len(failed) > 1 else ''
        sys.exit(f'member {failed[0]}{others} failed: {lines[-1]} (the same command resumes)')


def end(processes: list[subprocess.Popen]) -> None:
    """Terminates the processes; those that run after `_STOP_TIMEOUT_S` are killed."""
    try:
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + _STOP_TIMEOUT_S
        for process in processes:
            process.wait(max(deadline - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        print(f'a member did not end within {_STOP_TIMEOUT_S:g} s; it is killed', file=sys.stderr)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def progress_of(folders: list[Path]) -> tuple[int, str]:
    """The sum of all members' frames, and the best return as a phrase."""
    rows = [row for folder in folders for row in read_rows(folder / METRICS, last_bytes=100_000)[-1:]]
    returns = [row['episode_return_last_100'] for row in rows if 'episode_return_last_100' in row]
    return sum(row['frames'] for row in rows), f'best return {max(returns):.2f}' if returns else ''


def main() -> NoReturn:
    """Runs the command and ends the process."""
    command_line.main(train)

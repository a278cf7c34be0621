"""Ablations: a grid of independent runs in several processes, and one tidy table of their results."""

from __future__ import annotations

import concurrent.futures
import contextlib
import csv
import dataclasses
import hashlib
import io
import itertools
import json
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from impala_jax.config import Config, ConfigError, closest, get, replace, to_dict
from impala_jax.environments import suites
from impala_jax.rundir.files import METRICS, write_atomically
from impala_jax.rundir.lock import only_process
from impala_jax.rundir.rows import read_rows
from impala_jax.studies import programs
from impala_jax.studies.programs import Unit
from impala_jax.system import stop_watch, stopping
from impala_jax.system.machine import has_accelerator
from impala_jax.system.quiet import quiet_libraries
from impala_jax.system.stop_watch import StopWatch

if TYPE_CHECKING:  # They would import JAX, which workers import after they have set its environment variables.
    from impala_jax.evaluation.evaluator import Evaluation

RESULTS = 'results.csv'
_CELLS = 'cells'
_DONE = 'done.json'
_ENDING_S = stopping.LIMIT_S - 1.0  # Time for a worker to exit after the sweep has ended, except for checkpoints.
# Metrics that differ between repetitions of a run.
_TIMES = ('wall_time_s', 'frames_per_second', 'learner_wait_fraction')
# The state of a worker process.
_sweep_is_over, _cell_runs = threading.Event(), threading.Event()


class Cell(NamedTuple):
    """One run of a grid."""

    id: str  # hash of the configuration; a cell with a changed configuration is a different cell
    values: dict[str, Any]  # `task`, and the value of each axis
    config: Config


@dataclasses.dataclass(frozen=True)
class Grid:
    """The product of tasks and axes.

    Combinations in which an axis has no effect are left out: truncation levels other than 1 for corrections other than
    V-trace, and replay capacities other than the first one without replay.
    """

    tasks: Mapping[str, Config]
    """Configurations by the name of the task, with all settings that are not axes."""
    axes: Mapping[str, Sequence[Any]]
    """Values by the field of Config that they are for, such as `vtrace.rho_bar`."""

    def cells(self, outside_theory: bool = False) -> list[Cell]:
        """Returns all runs of the grid.

        Args:
          outside_theory: Whether to include runs with c_bar > rho_bar.

        Raises:
          ConfigError: A field does not exist, or a value is invalid.
        """
        cells: dict[str, Cell] = {}
        for (task, config), *values in itertools.product(self.tasks.items(), *self.axes.values()):
            axes = dict(zip(self.axes, values, strict=True))
            if self._without_effect(config, axes) or (not outside_theory and _outside_theory(config, axes)):
                continue
            if outside_theory:
                config = replace(config, {'vtrace.outside_theory': True})
            config = replace(config, axes)
            content = json.dumps(to_dict(config), sort_keys=True).encode()
            cell = Cell(hashlib.sha256(content).hexdigest()[:12], {'task': task, **axes}, config)
            cells.setdefault(cell.id, cell)
        return list(cells.values())

    def num_outside_theory(self) -> int:
        """Returns the number of cells with c_bar > rho_bar."""
        return len(self.cells(outside_theory=True)) - len(self.cells())

    def override(self, change: Callable[[Config], Config]) -> Grid:
        """Returns the grid with a change to every task's configuration.

        Args:
          change: Function from a configuration to the changed one.

        Raises:
          ConfigError: The change sets a field that is an axis, whose values would override it.
        """
        tasks = {task: change(config) for task, config in self.tasks.items()}
        for task, config in tasks.items():
            for axis in self.axes:
                if get(config, axis) != get(self.tasks[task], axis):
                    raise ConfigError(f'{axis} is an axis of the grid and cannot be overridden; edit the grid')
        return dataclasses.replace(self, tasks=tasks)

    def _without_effect(self, config: Config, axes: dict[str, Any]) -> bool:
        def value(name: str) -> Any:
            return axes.get(name, get(config, name))

        if value('vtrace.correction') != 'vtrace':
            return any(value(f'vtrace.{name}') != 1 for name in ('rho_bar', 'c_bar', 'pg_rho_bar'))
        capacities = self.axes.get('replay.capacity')
        return capacities is not None and value('replay.fraction') == 0 and value('replay.capacity') != capacities[0]


def experts(config: Config, seeds: Sequence[int] = (0,), multitask: bool = True) -> Grid:
    """Returns a grid with one expert per task of a suite, and one agent for all tasks (section 5.3.1).

    The experts together train on as many frames as the multi-task agent, divided equally. If the multi-task agent is at
    least as good as the expert on a task, the other tasks have helped: this is positive transfer.

    Args:
      config: Configuration of the multi-task agent; its environment is the suite.
      seeds: Seeds for the runs of every agent.
      multitask: Whether to include the multi-task agent, as a task with the name of the suite.

    Returns:
      The grid.

    Raises:
      ConfigError: The environment is not a suite, or the evaluator, which scores the agents, is disabled.
    """
    tasks = suites.tasks(config.environment)
    if len(tasks) == 1:
        raise ConfigError(
            f'{config.environment.name!r} is not a suite of tasks; {closest(config.environment.name, suites.SUITES)}'
        )
    if not config.evaluator.episodes:
        raise ConfigError('evaluator.episodes is 0, but experts are compared by evaluations; give it a positive number')
    share = dataclasses.replace(config, total_frames=max(1, config.total_frames // len(tasks)))
    grid = {
        task: dataclasses.replace(share, environment=suites.task_config(config.environment, task)) for task in tasks
    }
    return Grid(grid | ({config.environment.name: config} if multitask else {}), {'seed': tuple(seeds)})


def run_sweep(
    cells: Sequence[Cell],
    folder: Path,
    processes: int,
    on_done: Callable[[Cell], None] = lambda cell: None,
    runtime: str = 'lockstep',
) -> Path:
    """Runs the cells that are not finished yet, and writes the table of the finished ones, also when interrupted.

    The results of a cell depend neither on the number of processes nor on interruptions: each cell is a lockstep run on
    one CPU thread that resumes from its last checkpoint, or restarts if its environments cannot be saved. (Other
    runtimes are not reproducible, and use all available devices.)

    Args:
      cells: Cells returned by `Grid.cells`.
      folder: Folder of the sweep, created if necessary.
      processes: Number of cells that run at the same time.
      on_done: Function that is called after each cell.
      runtime: Runtime of each cell. With `device`, cells that differ in inputs of a compiled program only
        (`runtimes.device.population`) are members of one, and `learner.num_devices` devices share them.

    Returns:
      Path of the table, which has a row for each row of metrics of each cell. The columns are `cell`, those of
      `Cell.values`, the metrics, and `final_return`, the mean return of the evaluation after training, which is the
      same in all rows of a cell. A suite also has `final_return/<task>`.

    Raises:
      ConfigError: The folder is not writable, another process runs a sweep in it, or the runtime does not support a
        cell.
      CellFailed: A cell failed. The results of other cells are preserved.
    """
    if runtime == 'device':
        from impala_jax.runtimes.device import require_supported

        for cell in cells:
            require_supported(cell.config)
    with only_process(folder, '--output'):
        for cell in cells:
            if is_finished(cell, folder) and (other := _read_done(cell, folder)['runtime']) != runtime:
                raise ConfigError(
                    f'{folder} has results of --runtime {other}, and the numbers of {runtime} differ; use --runtime '
                    f'{other}, or another --output'
                )
        (folder / _CELLS).mkdir(exist_ok=True)
        return _run_sweep(cells, folder, processes, on_done, runtime)


def _run_sweep(
    cells: Sequence[Cell], folder: Path, processes: int, on_done: Callable[[Cell], None], runtime: str
) -> Path:
    units = programs.divide(cells) if runtime == 'device' else [Unit([cell]) for cell in cells]
    finished = {cell.id for cell in cells if is_finished(cell, folder)}
    todo = [unit for unit in units if not finished.issuperset(cell.id for cell in unit.cells)]
    # Not forked, because JAX is multithreaded.
    context = multiprocessing.get_context('spawn')
    with stopping.deferred():  # The tracker ignores SIGINT and SIGTERM by itself, but not SIGHUP.
        multiprocessing.resource_tracker.ensure_running()
    # Not an Event, whose `set` waits for ever for a process that was killed while it waited.
    stopped, stop = context.Pipe(duplex=False)
    try:
        if todo:
            workers = min(processes, len(todo))
            with concurrent.futures.ProcessPoolExecutor(
                workers, context, _start_worker, (stopped, folder, runtime)
            ) as pool:
                futures: dict[concurrent.futures.Future[None], Unit] = {}
                try:
                    # The start of a worker must not be interrupted, and until the worker has its own session it
                    # receives a terminal's Ctrl-C.
                    with stopping.StopSignals(threading.Event()) as signals, stopping.deferred():
                        for unit in todo:
                            futures[pool.submit(_run_unit, unit, folder, runtime)] = unit
                    if signals.received is not None:
                        raise stopping.Stopped(signals.received)
                    watches: dict[int, StopWatch] = {}
                    waiting = set(futures)
                    while waiting:
                        done, waiting = concurrent.futures.wait(
                            waiting, timeout=1.0, return_when=concurrent.futures.FIRST_COMPLETED
                        )
                        for future in done:
                            future.result(timeout=0)
                            for cell in futures[future].cells:
                                if cell.id not in finished:
                                    on_done(cell)
                        _end_if_stopped(pool, watches)
                except BaseException:
                    stop.close()
                    with stopping.critical_section():  # Workers exit soon, or are writing checkpoints.
                        pool.shutdown(cancel_futures=True)
                    raise
    finally:
        _write_results(cells, folder)
    return folder / RESULTS


def _end_if_stopped(pool: concurrent.futures.ProcessPoolExecutor, watches: dict[int, StopWatch]) -> None:
    """Kills processes of a sweep that have been stopped for too long; raises CellFailed if there is one."""
    stopped = [
        process
        for pid, process in list((pool._processes or {}).items())
        if watches.setdefault(pid, StopWatch(pid)).too_long()
    ]
    for process in stopped:
        process.kill()
    if stopped:
        pids = ', '.join(str(process.pid) for process in stopped)
        raise CellFailed(
            f'error: the sweep waited for its process {pids}, which was stopped for {stop_watch.STOPPED_S:g} s '
            '(SIGSTOP); it was killed, and the same command resumes the sweep'
        )


def is_finished(cell: Cell, folder: Path) -> bool:
    """Whether the sweep in `folder` has results of the cell."""
    return (_workdir(cell, folder) / _DONE).exists()


def _read_done(cell: Cell, folder: Path) -> dict[str, Any]:
    """Returns `runtime` and `final`, the results, of a finished cell."""
    done = json.loads((_workdir(cell, folder) / _DONE).read_text())
    return done if 'final' in done else {'runtime': 'lockstep', 'final': done}  # As version 0.1 wrote it.


class CellFailed(RuntimeError):
    """A cell failed; the message is its traceback."""


def _start_worker(stopped: Connection, folder: Path, runtime: str) -> None:
    """Prepares a worker process before it imports JAX: one thread in lockstep, and an exit when the sweep ends."""
    stopping.begin()  # Under `python -m impala_jax`, it has not been called yet.
    if runtime == 'device' and has_accelerator():
        os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # Several processes may share it.
    elif runtime in ('lockstep', 'device'):
        os.environ |= {
            'JAX_PLATFORMS': 'cpu',
            'NPROC': '1',  # size of XLA's thread pool
            'XLA_FLAGS': f'{os.environ.get("XLA_FLAGS", "")} --xla_cpu_multi_thread_eigen=false',
        }
    os.environ |= {
        # Cells that differ only in their seed are compiled once.
        'JAX_COMPILATION_CACHE_DIR': str((folder / '.compiled').absolute()),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
        'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
    }
    quiet_libraries()
    os.setsid()  # The sweep's process receives signals to its group, and sets `stop`.
    # A signal must not kill an idle worker: the pool would break, and since Python 3.12 wait for the others forever.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stopping.SIGNALS)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def is_orphan() -> bool:
        return bool(multiprocessing.connection.wait([parent.sentinel], timeout=0))

    def watch():
        while not multiprocessing.connection.wait([parent.sentinel, stopped], timeout=1.0):
            pass
        _sweep_is_over.set()
        deadline = time.monotonic() + _ENDING_S
        # An idle worker is ended by its pool, if the pool still exists.
        while stopping.in_critical_section() or (
            time.monotonic() < deadline and (_cell_runs.is_set() or not is_orphan())
        ):
            # Makes a running cell write a checkpoint. Repeated, because the cell may not handle signals yet.
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, name='sweep watcher', daemon=True).start()


def _run_unit(unit: Unit, folder: Path, runtime: str) -> None:
    """Runs cells in a worker process, or resumes the one of a unit that is no program."""
    from impala_jax.runtimes.nodes import final_message
    from impala_jax.runtimes.run import Interrupted

    cell = unit.cells[0]
    name = f'cell {cell.id}' if len(unit.cells) == 1 else f'cell {cell.id} and {len(unit.cells) - 1} others'
    stopped = f'{name} was stopped; the same command resumes it'
    workdir = _workdir(cell, folder)
    _cell_runs.set()
    try:
        if _sweep_is_over.is_set():
            raise CellFailed(stopped)
        workdir.mkdir(exist_ok=True)
        log_file = open(workdir / 'log.txt', 'a', encoding='utf-8', errors='backslashreplace')
        with log_file as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            try:
                if runtime == 'device':
                    _run_program(unit, folder)
                else:
                    _run_cell(cell, folder, runtime)
            except Interrupted:
                raise CellFailed(stopped) from None
            except (OSError, CellFailed):
                raise
            except Exception as error:
                # As text, because exceptions of libraries cannot always be pickled.
                raise CellFailed(f'{name} ({_describe(cell)}):\n{final_message(error)}') from None
    except OSError as error:  # Includes errors from closing the log on a full disk.
        raise CellFailed(f'cell {cell.id}: {error.filename or workdir}: {error.strerror or error}') from None
    finally:
        _cell_runs.clear()


def _run_cell(cell: Cell, folder: Path, runtime: str) -> None:
    from impala_jax.runtimes.run import run

    workdir = _workdir(cell, folder)
    if runtime == 'lockstep':
        _remove_partial_checkpoints(workdir)
    _finish(cell, folder, runtime, run(cell.config, workdir, runtime).evaluation)
    shutil.rmtree(workdir / 'checkpoints')  # The checkpoints of thousands of cells would fill a disk.


def _run_program(unit: Unit, folder: Path) -> None:
    """Runs the cells of a program from start to end; a program that was stopped starts again."""
    from impala_jax.rundir.metrics import as_json
    from impala_jax.rundir.run_config import write_run_config
    from impala_jax.runtimes.run import Interrupted

    for part in programs.parts(unit):
        stop = threading.Event()
        with stopping.StopSignals(stop) as signals:
            results = part.population.train([cell.config for cell in part.cells], stop)
        if results is None:
            raise Interrupted(signals.received or 0, None, folder)
        failed = []
        for cell, result in zip(part.cells, results, strict=True):
            workdir = _workdir(cell, folder)
            write_run_config(workdir, cell.config)
            rows = ''.join(json.dumps(as_json(row), allow_nan=False) + '\n' for row in result.rows)
            write_atomically(workdir / METRICS, rows)
            if result.problem:
                failed.append(f'error: cell {cell.id} ({_describe(cell)}): {result.problem}')
            else:
                _finish(cell, folder, 'device', result.evaluation)
        if failed:  # After the others are finished: the whole program is repeated for a cell that is not.
            raise CellFailed('\n'.join(failed))


def _finish(cell: Cell, folder: Path, runtime: str, evaluation: Evaluation | None) -> None:
    """Writes the file that marks a cell as finished."""
    final: dict[str, float | None] = {'final_return': None}
    if evaluation is not None:
        final['final_return'] = evaluation.mean
        final |= {f'final_return/{task}': scores.mean for task, scores in evaluation.tasks.items()}
    # The numbers of runtimes differ, so a table has those of one only.
    write_atomically(_workdir(cell, folder) / _DONE, json.dumps({'runtime': runtime, 'final': final}))


def _remove_partial_checkpoints(workdir: Path) -> None:
    """Removes checkpoints without environments: resuming with new episodes would change the results."""
    from impala_jax.rundir import checkpoint

    with only_process(workdir):
        folder = workdir / checkpoint.DIRECTORY
        if checkpoint.steps(folder) and not checkpoint.holds(workdir, 'runtime/actors'):
            print('the environments could not be saved with the checkpoint: the cell restarts', flush=True)
            shutil.rmtree(folder)


def _write_results(cells: Sequence[Cell], folder: Path) -> None:
    """Writes the table of the finished cells in the grid's order, which does not depend on the order of execution."""
    rows = []
    for cell in cells:
        workdir = _workdir(cell, folder)
        if is_finished(cell, folder):
            final = _read_done(cell, folder)['final']
            for metrics in read_rows(workdir / METRICS):
                plain = {k: v for k, v in metrics.items() if k not in _TIMES and not isinstance(v, dict)}
                rows.append({'cell': cell.id, **cell.values, **plain, **final})
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval='', lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(folder / RESULTS, text.getvalue())


def _workdir(cell: Cell, folder: Path) -> Path:
    return folder / _CELLS / cell.id


def _describe(cell: Cell) -> str:
    return ', '.join(f'{name}={value}' for name, value in cell.values.items())


def _outside_theory(config: Config, axes: dict[str, Any]) -> bool:
    rho_bar, c_bar = (axes.get(name, get(config, name)) for name in ('vtrace.rho_bar', 'vtrace.c_bar'))
    return c_bar > rho_bar

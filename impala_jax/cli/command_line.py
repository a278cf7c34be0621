"""Parsing of the command line into a configuration: a file of `configs/` with fields overridden by options."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar

import tyro
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from impala_jax.config import Config, ConfigError, closest, to_dict
from impala_jax.kernels import allocator
from impala_jax.system import stopping

if TYPE_CHECKING:
    from impala_jax.studies.ablation import Cell, Grid

_T = TypeVar('_T')

# An installed package contains the configurations; in a checkout they are next to the package.
_INSIDE = Path(__file__).parents[1] / 'configs'
_CONFIGS = _INSIDE if _INSIDE.is_dir() else Path(__file__).parents[2] / 'configs'
CONFIG_HELP = 'a Python file that defines get_config(), or the name of a packaged one, such as catch'


class TrainArguments(NamedTuple):
    """Options of `impala train`."""

    config: Config
    workdir: Path
    runtime: str | None  # None: `default_runtime()`


def train_arguments(argv: Sequence[str] | None = None) -> TrainArguments:
    """Parses `--config FILE --workdir DIR [--runtime R] [--field.name value ...]`.

    Args:
      argv: Arguments of the program; None reads `sys.argv`.

    Raises:
      ConfigError: If a file, field or value is invalid.
    """
    parser = Parser(
        description='Trains an agent on this machine; the same command resumes an interrupted run.',
        epilog='Every field of the configuration can be set, as in --learner.batch-size 64; --fields lists them all.',
    )
    parser.add_argument('--config', required=True, help=CONFIG_HELP)
    parser.add_argument('--workdir', required=True, type=Path, help='directory for the files of the run')
    parser.add_argument('--runtime', default=None, help='launchpad, ray, threads, lockstep or device')
    parser.add_argument('--fields', action='store_true', help='list the fields of the configuration and exit')
    arguments, overrides = parser.parse_known_args(argv)
    config = load_config_file(arguments.config)
    return TrainArguments(
        override(config, ['--help'] if arguments.fields else overrides), arguments.workdir, arguments.runtime
    )


class PodArguments(NamedTuple):
    """Options of `impala pod`; `coordinator`, `num_hosts` and `host_id` are given together or not at all."""

    train: TrainArguments
    of_training: list[str]  # The unparsed options of `train`.
    coordinator: str | None  # host:port of host 0.
    num_hosts: int | None
    host_id: int | None
    simulate_hosts: int | None
    simulate_devices: int
    supervisor: str | None  # Address of the supervisor that started this process; None if this is a supervisor.
    parent: int | None  # Process id; this process ends when that one ends.


def pod_arguments(argv: Sequence[str] | None = None) -> PodArguments:
    """Parses the options of a host, and those of `train_arguments`.

    Args:
      argv: Arguments of the program; None reads `sys.argv`.

    Raises:
      ConfigError: As for `train_arguments`, or if options contradict each other.
    """
    parser = Parser(
        description='Trains an agent on all hosts of a pod; run it on every host. The same commands resume the run.',
        epilog='All options of `impala train` are accepted too: --config, --workdir, --runtime and every field.',
    )
    parser.add_argument('--coordinator', help='HOST:PORT of host 0; found automatically on a TPU pod')
    parser.add_argument('--num-hosts', type=int, help='number of hosts; found automatically on a TPU pod')
    parser.add_argument('--host-id', type=int, help='index of this host, from 0; found automatically on a TPU pod')
    parser.add_argument('--simulate-hosts', type=int, help='simulate this many hosts, as processes on this machine')
    parser.add_argument('--simulate-devices', type=int, default=1, help='number of CPU devices per simulated host')
    parser.add_argument('--supervisor', help=argparse.SUPPRESS)
    parser.add_argument('--parent', type=int, help=argparse.SUPPRESS)
    options, rest = parser.parse_known_args(argv)
    arguments = PodArguments(train_arguments(rest), rest, **vars(options))
    given = [arguments.coordinator, arguments.num_hosts, arguments.host_id]
    if None in given:
        if given != [None, None, None]:
            raise ConfigError('--coordinator HOST:PORT, --num-hosts N and --host-id I go together; give all or none')
    else:
        host, _, port = given[0].rpartition(':')
        if not (host and port.isdecimal()):
            raise ConfigError(f'--coordinator {given[0]} is not HOST:PORT; give the address of host 0 and a free port')
        if not 0 <= given[2] < given[1]:
            raise ConfigError(f'--host-id {given[2]} of --num-hosts {given[1]}: ids go from 0 to N - 1')
        if arguments.simulate_hosts is not None:
            raise ConfigError('--simulate-hosts and --coordinator exclude each other: simulated hosts find each other')
    for name, value in (('hosts', arguments.simulate_hosts), ('devices', arguments.simulate_devices)):
        if value is not None and value < 1:
            raise ConfigError(f'--simulate-{name} must be positive, got {value}')
    if arguments.train.runtime in ('lockstep', 'device'):
        raise ConfigError(f'--runtime {arguments.train.runtime} runs on a single host; use launchpad or threads')
    if arguments.train.config.launch_type == 'local_mp':
        raise ConfigError(
            '--launch-type local_mp is not supported on several hosts, where learner and actors run in one process; '
            'use local_mt (--environment.processes moves environments to processes of their own)'
        )
    return arguments


def load_config_file(path: str) -> Config:
    """Returns the `Config` built by a file's `get_config()`.

    Args:
      path: Path of the file, which ends in `.py`, or the name of a packaged configuration, such as `catch`.

    Raises:
      ConfigError: If the file or the function does not exist, or the function returns something else.
    """
    return _load_file(path, 'get_config', Config, _CONFIGS)


def load_grid_file(path: str) -> Grid:
    """Returns the `Grid` built by a file's `get_grid()`.

    Args:
      path: Path of the file, which ends in `.py`, or the name of a packaged grid of `configs/ablations`.

    Raises:
      ConfigError: As for `load_config_file`.
    """
    from impala_jax.studies.ablation import Grid

    return _load_file(path, 'get_grid', Grid, _CONFIGS / 'ablations')


def _load_file(path: str, function: str, cls: type[_T], packaged: Path) -> _T:
    file = _find(path, packaged)
    spec = importlib.util.spec_from_file_location(f'config_{file.stem}', file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.parent.absolute()))  # The file may import its neighbours, as a script may.
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    if not hasattr(module, function):
        raise ConfigError(f'{path} has no function {function}() -> {cls.__name__}')
    value = getattr(module, function)()
    if not isinstance(value, cls):
        raise ConfigError(f'{path}: {function}() returned {type(value).__name__}, not an impala_jax {cls.__name__}')
    return value


def _find(path: str, packaged: Path) -> Path:
    file, names = Path(path), sorted(other.stem for other in packaged.glob('*.py'))
    if file.name == path and not file.suffix:
        if path not in names:
            near = closest(path, names)
            raise ConfigError(f'the package has no configuration {path!r}; {near} (the path of a file must end in .py)')
        return packaged / f'{path}.py'
    if file.suffix != '.py':
        raise ConfigError(f'{path} is not a Python file; give a path that ends in .py')
    if not file.is_file():
        known = sorted(str(other) for other in file.parent.glob('*.py'))
        near = closest(path, known) if known else closest(file.stem, names)
        raise ConfigError(f'there is no configuration file {path}; {near}')
    return file


# Short options for user code, given as `module:name`.
_SHORT = {'--network': '--network.module', '--loss': '--loss.function', '--optimizer': '--optimizer.name'}


def override(config: Config, arguments: Sequence[str]) -> Config:
    """Returns `config` with fields set as in `--learner.batch-size 64` or `--network module:Class`.

    Raises:
      ConfigError: If a field does not exist or a value is invalid.
    """
    names = [argument.partition('=') for argument in arguments]
    arguments = [_SHORT.get(name, name) + equals + value for name, equals, value in names]
    known = _option_names(to_dict(config))
    for argument in arguments:
        name = argument.split('=')[0].replace('_', '-')
        if name.startswith('--') and name not in known and name != '--help':
            raise ConfigError(f'unknown option {name}; {closest(name, known)}')
    try:
        return tyro.cli(Config, args=arguments, default=config, console_outputs='--help' in arguments)
    except SystemExit as error:
        if error.code:
            raise ConfigError(
                f'cannot read {" ".join(arguments)!r}: see --fields for the type of each field'
            ) from error
        raise


def main(body: Callable[[], None], *, stopped: str = '') -> NoReturn:
    """Runs the body of a command and ends the process.

    The exit status is 0 on success. Otherwise the last output is the reason: one line, or a traceback.

    Args:
      body: Function that does the work.
      stopped: Suffix of the line that is printed when a signal ends the body.
    """
    allocator.configure_allocator()  # Before JAX starts its threads.
    stopping.interruptible()
    status, line = _outcome(body, stopped)
    stopping.end(status, line)


def _outcome(body: Callable[[], None], stopped: str) -> tuple[int, str]:
    """Runs `body`; returns the exit status and the last text to print."""
    try:
        body()
    except SystemExit as end:
        return (1, end.code) if isinstance(end.code, str) else (int(end.code or 0), '')
    except BaseException as error:  # noqa: BLE001 - reported by the caller.
        cause = stopping.cause(error)
        if cause is not None:  # First, because the signal may arrive during the imports below.
            return 128 + cause.signal_number, f'{cause}{stopped}'

        from impala_jax.runtimes import nodes
        from impala_jax.runtimes.run import Interrupted
        from impala_jax.studies.ablation import CellFailed

        if isinstance(error, Interrupted):
            return 128 + error.signal_number, str(error)
        return 1, str(error).rstrip() if isinstance(error, CellFailed) else nodes.final_message(error)
    return 0, ''


def print_cells(cells: Sequence[Cell]) -> None:
    """Prints the id and the values of each cell of a sweep."""
    for cell in cells:
        print(cell.id, *(f'{name}={value}' for name, value in cell.values.items()))


def run_sweep(cells: Sequence[Cell], output: Path, processes: int, runtime: str = 'lockstep') -> None:
    """Runs `ablation.run_sweep` with a progress bar."""
    from impala_jax.studies import ablation

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn('cells'), TimeRemainingColumn(), TextColumn('left'))
    with Progress(*columns) as progress:
        finished = sum(ablation.is_finished(cell, output) for cell in cells)
        task = progress.add_task('', total=len(cells), completed=finished)
        results = ablation.run_sweep(cells, output, processes, lambda cell: progress.advance(task), runtime)
    print(f'Results     {results}')


def sweep_main(body: Callable[[], None]) -> NoReturn:
    """Runs `main` for a command that runs a sweep."""
    main(body, stopped='; the same command resumes the sweep')


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that reports an error in one line."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Prints one line and exits with status 2."""
        self.exit(2, f'error: {message} (see --help)\n')


def _option_names(fields: dict[str, Any], prefix: str = '--') -> list[str]:
    names = []
    for name, value in fields.items():
        name = prefix + name.rstrip('_').replace('_', '-')
        if isinstance(value, dict):
            names += _option_names(value, f'{name}.')
        else:
            names += (
                [name, f'{name.rpartition(".")[0]}.no-{name.rpartition(".")[2]}'] if isinstance(value, bool) else [name]
            )
    return names

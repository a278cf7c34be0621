"""From the command line to a configuration: a file of `configs/`, overridden field by field."""

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

# An installed package has the configurations inside; in a checkout they stand beside it.
_INSIDE = Path(__file__).parents[1] / 'configs'
_CONFIGS = _INSIDE if _INSIDE.is_dir() else Path(__file__).parents[2] / 'configs'
CONFIG_HELP = 'a Python file with get_config(), or the name of one that comes with the package, such as catch'


class TrainArguments(NamedTuple):
    """The options of `impala train`."""

    config: Config
    workdir: Path
    runtime: str | None  # None: `launchpad` where it is installed, else `threads`


def train_arguments(argv: Sequence[str] | None = None) -> TrainArguments:
    """Parses `--config FILE --workdir DIR [--runtime R] [--field.name value ...]`.

    Raises:
      ConfigError: a file, field or value that cannot work.
    """
    parser = Parser(
        description='Trains an agent on this machine; the same command again resumes.',
        epilog='Every field of the configuration can be set, as in --learner.batch-size 64; --fields lists them all.',
    )
    parser.add_argument('--config', required=True, help=CONFIG_HELP)
    parser.add_argument('--workdir', required=True, type=Path, help='holds all of the run')
    parser.add_argument('--runtime', default=None, help='launchpad, threads or lockstep')
    parser.add_argument('--fields', action='store_true', help='list the fields of the configuration and exit')
    arguments, overrides = parser.parse_known_args(argv)
    config = load_config_file(arguments.config)
    return TrainArguments(
        override(config, ['--help'] if arguments.fields else overrides), arguments.workdir, arguments.runtime
    )


class PodArguments(NamedTuple):
    """The options of `impala pod`; a host is given by all of coordinator, number and id, or by none."""

    train: TrainArguments
    of_training: list[str]  # as they were given
    coordinator: str | None  # host:port of the first host
    num_hosts: int | None
    host_id: int | None
    simulate_hosts: int | None
    simulate_devices: int
    supervisor: str | None  # of this process, which is the host's program; None: this process is a supervisor
    parent: int | None  # the process to end with


def pod_arguments(argv: Sequence[str] | None = None) -> PodArguments:
    """Parses the options of a host, and all those of `train_arguments`.

    Raises:
      ConfigError: as `train_arguments`, and options that do not go together.
    """
    parser = Parser(
        description='Trains an agent on all hosts of a pod, each of which runs this command; the same again resumes.',
        epilog='All options of `impala train` can be given too: --config, --workdir, --runtime and every field.',
    )
    parser.add_argument('--coordinator', help='HOST:PORT of host 0, where no TPU tells it')
    parser.add_argument('--num-hosts', type=int, help='how many hosts there are, where no TPU tells it')
    parser.add_argument('--host-id', type=int, help='which of them this is, from 0, where no TPU tells it')
    parser.add_argument('--simulate-hosts', type=int, help='be this many hosts, each a process of this machine')
    parser.add_argument('--simulate-devices', type=int, default=1, help='CPU devices of each of them')
    parser.add_argument('--supervisor', help=argparse.SUPPRESS)
    parser.add_argument('--parent', type=int, help=argparse.SUPPRESS)
    options, rest = parser.parse_known_args(argv)
    arguments = PodArguments(train_arguments(rest), rest, **vars(options))
    given = [arguments.coordinator, arguments.num_hosts, arguments.host_id]
    if None in given:
        if given != [None, None, None]:
            raise ConfigError('--coordinator HOST:PORT, --num-hosts N and --host-id I go together; give all, or none')
    else:
        host, _, port = given[0].rpartition(':')
        if not (host and port.isdecimal()):
            raise ConfigError(f'--coordinator {given[0]} is not HOST:PORT; give the address of host 0 and a free port')
        if not 0 <= given[2] < given[1]:
            raise ConfigError(f'--host-id {given[2]} of --num-hosts {given[1]}: ids go from 0 to the number less one')
        if arguments.simulate_hosts is not None:
            raise ConfigError('--simulate-hosts and --coordinator exclude each other: simulated hosts find each other')
    for name, value in (('hosts', arguments.simulate_hosts), ('devices', arguments.simulate_devices)):
        if value is not None and value < 1:
            raise ConfigError(f'--simulate-{name} must be positive, got {value}')
    if arguments.train.runtime == 'lockstep':
        raise ConfigError('--runtime lockstep is a single thread on a single host; use launchpad or threads')
    if arguments.train.config.launch_type == 'local_mp':
        raise ConfigError(
            '--launch-type local_mp: of several hosts each learner shares its process with the actors; use local_mt '
            '(environments can have processes of their own: --environment.processes)'
        )
    return arguments


def load_config_file(path: str) -> Config:
    """The `Config` that a file's `get_config()` returns.

    Args:
      path: Path of the file, which ends in `.py`, or the bare name of one that comes with the package, as `catch`.

    Raises:
      ConfigError: there is no such file, it has no such function, or that returns something else.
    """
    return _load_file(path, 'get_config', Config, _CONFIGS)


def load_grid_file(path: str) -> Grid:
    """The `Grid` that a file's `get_grid()` returns.

    Args:
      path: as in `load_config_file`, of a file in `configs/ablations`.

    Raises:
      ConfigError: as in `load_config_file`.
    """
    from impala_jax.studies.ablation import Grid

    return _load_file(path, 'get_grid', Grid, _CONFIGS / 'ablations')


def _load_file(path: str, function: str, cls: type[_T], packaged: Path) -> _T:
    file = _find(path, packaged)
    spec = importlib.util.spec_from_file_location(f'config_{file.stem}', file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.parent.absolute()))  # It may import its neighbours, as a script may.
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
            raise ConfigError(f'the package has no configuration {path!r}; {near} (the path of a file ends in .py)')
        return packaged / f'{path}.py'
    if file.suffix != '.py':
        raise ConfigError(f'{path} is not a Python file, whose name ends in .py')
    if not file.is_file():
        known = sorted(str(other) for other in file.parent.glob('*.py'))
        near = closest(path, known) if known else closest(file.stem, names)
        raise ConfigError(f'there is no configuration file {path}; {near}')
    return file


# Code of the user's own by its name, `module:name`.
_SHORT = {'--network': '--network.module', '--loss': '--loss.function', '--optimizer': '--optimizer.name'}


def override(config: Config, arguments: Sequence[str]) -> Config:
    """`config` with fields set as in `--learner.batch-size 64`, or `--network module:Class`.

    Raises:
      ConfigError: a field that does not exist, or a value that cannot work.
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
    """Runs a script's body; ends with status 0, or non-zero with the reason, in one line or as a traceback, last.

    Args:
      body: what the script does.
      stopped: added to the line of a body that a signal ended.
    """
    allocator.configure_allocator()  # Before JAX starts its threads.
    stopping.interruptible()
    status, line = _outcome(body, stopped)
    stopping.end(status, line)


def _outcome(body: Callable[[], None], stopped: str) -> tuple[int, str]:
    """The exit status, and the text to end with."""
    try:
        body()
    except SystemExit as end:
        return (1, end.code) if isinstance(end.code, str) else (int(end.code or 0), '')
    except BaseException as error:  # noqa: BLE001 - said by the caller.
        cause = stopping.cause(error)
        if cause is not None:  # First: it may have come while the modules below were imported.
            return 128 + cause.signal_number, f'{cause}{stopped}'

        from impala_jax.runtimes import nodes
        from impala_jax.runtimes.run import Interrupted
        from impala_jax.studies.ablation import CellFailed

        if isinstance(error, Interrupted):
            return 128 + error.signal_number, str(error)
        return 1, str(error).rstrip() if isinstance(error, CellFailed) else nodes.last_words(error)
    return 0, ''


def run_sweep(cells: Sequence[Cell], output: Path, processes: int, runtime: str = 'lockstep') -> None:
    """`ablation.run_sweep` with a progress bar."""
    from impala_jax.studies import ablation

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn('cells'), TimeRemainingColumn(), TextColumn('left'))
    with Progress(*columns) as progress:
        finished = sum(ablation.is_finished(cell, output) for cell in cells)
        task = progress.add_task('', total=len(cells), completed=finished)
        results = ablation.run_sweep(cells, output, processes, lambda cell: progress.advance(task), runtime)
    print(f'Results     {results}')


def sweep_main(body: Callable[[], None]) -> NoReturn:
    """`main` of a script that runs a sweep."""
    main(body, stopped='; the same command goes on where it was')


class Parser(argparse.ArgumentParser):
    """Its errors are one line."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f'error: {message} (--help tells more)\n')


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

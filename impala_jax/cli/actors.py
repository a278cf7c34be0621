"""`impala actors`: actors for a learner on another machine."""

from __future__ import annotations

import importlib.util
import threading
from pathlib import Path
from typing import NoReturn

from impala_jax.cli import command_line
from impala_jax.config import Config, ConfigError
from impala_jax.kernels import compilation_cache
from impala_jax.runtimes import gate
from impala_jax.system import program, stopping


def act() -> None:
    parser = command_line.Parser(
        description='Acts for a learner that was started with --serve-actors; joins it again whenever it was lost.',
        epilog='What does not change what is learned can be set for this machine, as in --actor.num-envs 32 or '
        '--environment.processes 4. Code of your own is imported only if it is named here: --environment.name '
        'my_module:my_function.',
    )
    parser.add_argument('--learner', required=True, help='its HOST:PORT')
    parser.add_argument('--num-actors', required=True, type=int, help='threads, each with its own environments')
    parser.add_argument(
        '--secret-file',
        type=Path,
        help=f'holds what the learner and its actors share, which only you may read; or set {gate.SECRET_VARIABLE}',
    )
    parser.add_argument(
        '--wait-s',
        type=float,
        default=3600.0,
        help='how long to wait for a learner that is away (default: %(default)g)',
    )
    arguments, overrides = parser.parse_known_args()
    host, _, port = arguments.learner.rpartition(':')
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ConfigError(f'--learner must be HOST:PORT, got {arguments.learner!r}')
    if arguments.num_actors < 1:
        raise ConfigError(f'--num-actors must be positive, got {arguments.num_actors}')
    own = command_line.override(Config(), overrides)  # A typo is refused at once, not when a learner is there.
    secret = gate.actors_secret(arguments.secret_file)
    if importlib.util.find_spec('reverb') is None:
        remedy = f'{program.command("doctor")} tells more (Python 3.10)'
        raise ConfigError(f'actors join over Reverb, which is not installed: {remedy}')
    from impala_jax.runtimes import reverb_actors

    compilation_cache.keep_programs()
    stop = threading.Event()
    with stopping.StopSignals(stop) as signals:
        reverb_actors.run(
            arguments.learner,
            arguments.num_actors,
            stop,
            secret=secret,
            adapt=lambda config: command_line.override(config, overrides),
            imports=reverb_actors.code_of(own).values(),
            wait_s=arguments.wait_s,
        )
    if signals.received is not None:
        raise stopping.Stopped(signals.received)


def main() -> NoReturn:
    command_line.main(act)

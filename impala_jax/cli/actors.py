"""`impala actors`: runs actors for a learner on another machine."""

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
    """Parses the command line and runs actors until the training run ends."""
    parser = command_line.Parser(
        description='Runs actors for a learner started with --serve-actors; reconnects when the connection is lost.',
        epilog='Fields that do not change the result of training can be set for this machine, as in '
        '--actor.num-envs 32 or --environment.processes 4. User code is imported only if it is named here: '
        '--environment.name my_module:my_function.',
    )
    parser.add_argument('--learner', required=True, help="the learner's HOST:PORT")
    parser.add_argument(
        '--num-actors', required=True, type=int, help='number of actor threads, each with its own environments'
    )
    parser.add_argument(
        '--secret-file',
        type=Path,
        help=f"copy of the run's secret, readable by its owner only; or set {gate.SECRET_VARIABLE}",
    )
    parser.add_argument(
        '--wait-s',
        type=float,
        default=3600.0,
        help='longest wait for a learner that cannot be reached, in seconds (default: %(default)g)',
    )
    arguments, overrides = parser.parse_known_args()
    host, _, port = arguments.learner.rpartition(':')
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ConfigError(f'--learner must be HOST:PORT, got {arguments.learner!r}')
    if arguments.num_actors < 1:
        raise ConfigError(f'--num-actors must be positive, got {arguments.num_actors}')
    own = command_line.override(Config(), overrides)  # Reports a typo at once, not after the learner was reached.
    secret = gate.actors_secret(arguments.secret_file)
    if importlib.util.find_spec('reverb') is None:
        remedy = f'{program.command("doctor")} shows how to install it (Python 3.10)'
        raise ConfigError(f'actors join over Reverb, which is not installed: {remedy}')
    from impala_jax.runtimes import reverb_actors

    compilation_cache.enable_cache()
    stop = threading.Event()
    with stopping.StopSignals(stop) as signals:
        reverb_actors.run(
            arguments.learner,
            arguments.num_actors,
            stop,
            secret=secret,
            adapt=lambda config: command_line.override(config, overrides),
            imports=reverb_actors.user_code(own).values(),
            wait_s=arguments.wait_s,
        )
    if signals.received is not None:
        raise stopping.Stopped(signals.received)


def main() -> NoReturn:
    """Runs the command and ends the process."""
    command_line.main(act)

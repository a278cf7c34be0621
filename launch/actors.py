"""Actors for a learner on another machine: python launch/actors.py --learner HOST:PORT --num-actors 8"""

from impala_jax.system import stopping

stopping.begin()

import os  # noqa: E402

os.environ.setdefault('JAX_PLATFORMS', 'cpu')  # Actors act on the CPU; an accelerator here may be somebody else's.

from impala_jax.system.quiet import quiet_libraries  # noqa: E402

quiet_libraries()  # Before they are imported.

import importlib.util  # noqa: E402
import threading  # noqa: E402
from pathlib import Path  # noqa: E402

from impala_jax.cli import command_line  # noqa: E402
from impala_jax.config import Config, ConfigError  # noqa: E402
from impala_jax.kernels import compilation_cache  # noqa: E402
from impala_jax.runtimes import gate  # noqa: E402


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
        raise ConfigError('actors join over Reverb, which is not installed: make doctor tells more (Python 3.10)')
    import rlax  # noqa: F401 - TensorFlow Probability refuses an old TensorFlow that was imported before it.

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
            imports=(own.environment.name, own.network.torso),
            wait_s=arguments.wait_s,
        )
    if signals.received is not None:
        raise stopping.Stopped(signals.received)


if __name__ == '__main__':
    command_line.main(act)

"""Experts and one agent: python launch/experts.py --suite minisuite --config configs/minisuite.py --output runs/x"""

from impala_jax.system import stopping

stopping.begin()

from impala_jax.system.quiet import quiet_libraries  # noqa: E402

quiet_libraries()  # Before they are imported.

from pathlib import Path  # noqa: E402

from impala_jax.cli import command_line  # noqa: E402
from impala_jax.config import replace  # noqa: E402
from impala_jax.studies.ablation import RESULTS, experts  # noqa: E402
from impala_jax.system.machine import num_cores  # noqa: E402


def train() -> None:
    parser = command_line.Parser(
        description="Trains an expert for each task of a suite on its share of the configuration's frames, and one "
        'agent for all tasks on all of them; the same command again goes on where it was.',
        epilog='Every field of the configuration can be set, as in --total-frames 2000000.',
    )
    parser.add_argument('--suite', required=True, help='atari57, dmlab30 or minisuite')
    parser.add_argument('--config', required=True, help='a Python file with get_config(), as in configs/')
    parser.add_argument('--output', required=True, type=Path, help='holds all runs and their table')
    parser.add_argument('--seeds', type=int, default=1, help='runs of each, from seed 0 (default: %(default)s)')
    parser.add_argument('--experts-only', action='store_true', help='train no agent on all tasks')
    parser.add_argument('--processes', type=int, default=num_cores(), help='runs at once')
    parser.add_argument('--runtime', default='lockstep', help='of each run (default: lockstep, on one core)')
    arguments, overrides = parser.parse_known_args()
    for name in ('seeds', 'processes'):
        if getattr(arguments, name) < 1:
            parser.error(f'--{name} must be positive, got {getattr(arguments, name)}')
    config = command_line.override(command_line.load_config_file(arguments.config), overrides)
    config = replace(config, {'environment.name': arguments.suite})
    grid = experts(config, range(arguments.seeds), multitask=not arguments.experts_only)
    command_line.run_sweep(grid.cells(), arguments.output, arguments.processes, arguments.runtime)
    print(f'Figure      python launch/plot.py experts --results {arguments.output / RESULTS} --output experts.png')


if __name__ == '__main__':
    command_line.sweep_main(train)

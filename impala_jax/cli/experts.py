"""`impala experts`: trains one expert per task of a suite, and one agent for all tasks."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from impala_jax.cli import command_line
from impala_jax.config import replace
from impala_jax.studies.ablation import RESULTS, experts
from impala_jax.system import program
from impala_jax.system.machine import num_cores


def train() -> None:
    """Parses the command line and trains the agents."""
    parser = command_line.Parser(
        description='Trains one expert per task of a suite and one agent for all tasks. The frames of the '
        'configuration are the budget of the agent; each expert gets an equal part of them. The same command resumes.',
        epilog='Every field of the configuration can be set, as in --total-frames 2000000.',
    )
    parser.add_argument('--suite', required=True, help='atari57, dmlab30 or minisuite')
    parser.add_argument('--config', required=True, help=command_line.CONFIG_HELP)
    parser.add_argument('--output', required=True, type=Path, help='directory for the runs and their table')
    parser.add_argument('--seeds', type=int, default=1, help='runs per agent, from seed 0 (default: %(default)s)')
    parser.add_argument('--experts-only', action='store_true', help='do not train the agent for all tasks')
    parser.add_argument(
        '--processes', type=int, default=num_cores(), help='number of runs in parallel (default: %(default)s)'
    )
    parser.add_argument(
        '--runtime', default='lockstep', help='launchpad, ray, threads or lockstep (default: lockstep, on one core)'
    )
    parser.add_argument('--list', action='store_true', help='list the runs and exit')
    arguments, overrides = parser.parse_known_args()
    for name in ('seeds', 'processes'):
        if getattr(arguments, name) < 1:
            parser.error(f'--{name} must be positive, got {getattr(arguments, name)}')
    config = command_line.override(command_line.load_config_file(arguments.config), overrides)
    config = replace(config, {'environment.name': arguments.suite})
    grid = experts(config, range(arguments.seeds), multitask=not arguments.experts_only)
    if arguments.list:
        command_line.print_cells(grid.cells())
        return
    command_line.run_sweep(grid.cells(), arguments.output, arguments.processes, arguments.runtime)
    print(f'Figure      {program.command("plot")} experts --results {arguments.output / RESULTS} --output experts.png')


def main() -> NoReturn:
    """Runs the command and ends the process."""
    command_line.sweep_main(train)

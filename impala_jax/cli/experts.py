"""`impala experts`: trains experts, and one agent for all of their tasks."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from impala_jax.cli import command_line
from impala_jax.config import replace
from impala_jax.studies.ablation import RESULTS, experts
from impala_jax.system import program
from impala_jax.system.machine import num_cores


def train() -> None:
    parser = command_line.Parser(
        description="Trains an expert for each task of a suite on its share of the configuration's frames, and one "
        'agent for all tasks on all of them; the same command again goes on where it was.',
        epilog='Every field of the configuration can be set, as in --total-frames 2000000.',
    )
    parser.add_argument('--suite', required=True, help='atari57, dmlab30 or minisuite')
    parser.add_argument('--config', required=True, help=command_line.CONFIG_HELP)
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
    print(f'Figure      {program.command("plot")} experts --results {arguments.output / RESULTS} --output experts.png')


def main() -> NoReturn:
    command_line.sweep_main(train)

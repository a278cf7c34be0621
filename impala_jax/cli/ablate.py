"""`impala ablate`: runs a grid of experiments."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NoReturn

from impala_jax.cli import command_line
from impala_jax.system.machine import has_accelerator, num_cores


def ablate() -> None:
    """Parses the command line and runs the sweep."""
    parser = command_line.Parser(
        description='Runs all cells of a grid, each on one core; the same command resumes an interrupted sweep.',
        epilog='Every field of the configuration that is not an axis of the grid can be set for all cells, as in '
        '--total-frames 20000.',
    )
    parser.add_argument(
        '--grid',
        required=True,
        help='a Python file that defines get_grid(), or the name of a packaged one, such as table2',
    )
    parser.add_argument('--output', required=True, type=Path, help='directory for the files of the sweep')
    parser.add_argument(
        '--processes',
        type=int,
        help='number of cells, or of compiled programs, run in parallel (default: one per core; one program if it runs '
        'on a GPU or TPU)',
    )
    parser.add_argument(
        '--runtime',
        choices=('lockstep', 'device'),
        default='lockstep',
        help='lockstep: each cell on one core (the default). device: up to 32 cells in one compiled program, for tasks '
        'that are written in JAX, or have a twin that is',
    )
    parser.add_argument('--outside-theory', action='store_true', help='also run the cells with c_bar > rho_bar')
    parser.add_argument('--list', action='store_true', help='list the cells and exit')
    arguments, overrides = parser.parse_known_args()
    processes = arguments.processes
    if processes is None:
        processes = 1 if arguments.runtime == 'device' and has_accelerator() else num_cores()
    if processes < 1:
        parser.error(f'--processes must be positive, got {processes}')
    grid = command_line.load_grid_file(arguments.grid)
    grid = grid.override(lambda config: command_line.override(config, overrides))
    if arguments.runtime == 'device':
        from impala_jax.environments.functional.twins import twin

        grid = grid.override(lambda config: dataclasses.replace(config, environment=twin(config.environment)))
    cells = grid.cells(arguments.outside_theory)
    if arguments.list:
        command_line.print_cells(cells)
        return
    left_out = 0 if arguments.outside_theory else grid.num_outside_theory()
    if left_out:
        print(f'skipped {left_out} cells with c_bar > rho_bar, outside the theory; --outside-theory runs them')
    command_line.run_sweep(cells, arguments.output, processes, arguments.runtime)


def main() -> NoReturn:
    """Runs the command and ends the process."""
    command_line.sweep_main(ablate)

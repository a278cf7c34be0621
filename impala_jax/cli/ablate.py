"""`impala ablate`: runs a grid of experiments."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from impala_jax.cli import command_line
from impala_jax.system.machine import num_cores


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
        '--processes', type=int, default=num_cores(), help='number of cells run in parallel (default: %(default)s)'
    )
    parser.add_argument('--outside-theory', action='store_true', help='also run the cells with c_bar > rho_bar')
    parser.add_argument('--list', action='store_true', help='list the cells and exit')
    arguments, overrides = parser.parse_known_args()
    if arguments.processes < 1:
        parser.error(f'--processes must be positive, got {arguments.processes}')
    grid = command_line.load_grid_file(arguments.grid)
    grid = grid.override(lambda config: command_line.override(config, overrides))
    cells = grid.cells(arguments.outside_theory)
    if arguments.list:
        command_line.print_cells(cells)
        return
    left_out = 0 if arguments.outside_theory else grid.num_outside_theory()
    if left_out:
        print(f'skipped {left_out} cells with c_bar > rho_bar, outside the theory; --outside-theory runs them')
    command_line.run_sweep(cells, arguments.output, arguments.processes)


def main() -> NoReturn:
    """Runs the command and ends the process."""
    command_line.sweep_main(ablate)

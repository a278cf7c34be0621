"""The program `impala`, with one command per script of `launch/`.

Modules that are slow to import are loaded only after the command is known.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path
from typing import NamedTuple

import impala_jax
from impala_jax.system import program


class Command(NamedTuple):
    """A command, which `main()` of the module of the same name runs."""

    help: str
    quiet: bool = True  # Silences other libraries; False if the command does so later, or imports none of them.
    environment: tuple[tuple[str, str], ...] = ()  # Defaults of environment variables.


COMMANDS = {
    'train': Command('train an agent on this machine, or resume a run'),
    'evaluate': Command('play full episodes with the newest checkpoint of a run'),
    'plot': Command('draw figures, or print tables, of runs and sweeps'),
    'pbt': Command('train a population of agents that copy and mutate hyperparameters'),
    'ablate': Command('run a grid of experiments'),
    'experts': Command('train one expert per task of a suite, and one agent for all tasks'),
    'pod': Command('train on all hosts of a TPU pod or cluster', quiet=False),
    # Actors compute on the CPU; another program may be using an accelerator of this machine.
    'actors': Command('run actors for a learner on another machine', environment=(('JAX_PLATFORMS', 'cpu'),)),
    'doctor': Command('show what works on this machine, and how to repair the rest', quiet=False),
}


def start(name: str) -> None:
    """Runs a command with the options in `sys.argv` and ends the process; call `stopping.begin` first."""
    command = COMMANDS[name]
    for variable, value in command.environment:
        os.environ.setdefault(variable, value)
    if command.quiet:
        from impala_jax.system.quiet import quiet_libraries

        quiet_libraries()  # Before they are imported.
    from impala_jax.config import ConfigError
    from impala_jax.kernels import variants

    try:
        variants.selected()  # Checked here, because the modules of a command load the kernels when they are imported.
    except ConfigError as error:
        sys.exit(f'error: {error}')
    importlib.import_module(f'impala_jax.cli.{name}').main()


def main() -> None:
    """Runs `impala COMMAND ...`; the command sees its own name in `sys.argv[0]`, as the scripts of `launch/` do."""
    name = program.MODULE if Path(sys.argv[0]).name == '__main__.py' else 'impala'
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog=name,
        usage='%(prog)s [--help] [--version] COMMAND ...',
        description='IMPALA (Espeholt et al., 2018) in JAX.',
        epilog='\n'.join(
            ['commands:']
            + [f'  {other:{width}}  {command.help}' for other, command in COMMANDS.items()]
            + ['', f'{name} COMMAND --help lists the options of a command.']
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--version', action='version', version=f'impala_jax {impala_jax.__version__}')
    parser.add_argument('command', metavar='COMMAND', nargs='?', help=argparse.SUPPRESS)
    arguments, _ = parser.parse_known_args(sys.argv[1:2])
    if arguments.command not in COMMANDS:
        parser.exit(2, f'error: {_problem(sys.argv[1:2])} ({name} --help lists the commands)\n')
    sys.argv[:2] = [f'{name} {arguments.command}']
    start(arguments.command)


def _problem(given: list[str]) -> str:
    if not given:
        return 'a command is missing'
    from impala_jax.config import closest

    return f'unknown command {given[0]!r}; {closest(given[0], COMMANDS)}'

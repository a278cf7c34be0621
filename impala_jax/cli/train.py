"""`impala train`: trains on this machine, or resumes a run."""

from __future__ import annotations

import os
import socket
from typing import NoReturn

from impala_jax.cli import command_line
from impala_jax.rundir.summary import print_summary
from impala_jax.runtimes.gate import SECRET_FILE, SECRET_VARIABLE
from impala_jax.runtimes.run import default_runtime, run
from impala_jax.system import program


def train() -> None:
    """Parses the command line and trains, with hints on runtime and remote actors."""
    config, workdir, runtime = command_line.train_arguments()
    if runtime is None:
        runtime = default_runtime()
        reason = 'installed'
        if runtime != 'launchpad':
            missing = 'Launchpad is' if runtime == 'ray' else 'Launchpad and Ray are'
            reason = f'{missing} not installed: {program.command("doctor")}'
        print(f'runtime: {runtime} ({reason})', flush=True)
    if config.serve_actors is not None:
        join = f'{program.command("actors")} --learner {socket.gethostname()}:{config.serve_actors} --num-actors 8'
        if SECRET_VARIABLE in os.environ:
            print(f'actors on other machines join, with the same {SECRET_VARIABLE}, by: {join}', flush=True)
        else:
            print(
                f'actors on other machines join, with a copy of {workdir / SECRET_FILE}, by: {join} --secret-file '
                f'{SECRET_FILE}',
                flush=True,
            )
    result = run(config, workdir, runtime)
    print_summary(result.workdir)


def main() -> NoReturn:
    """Runs the command and ends the process."""
    command_line.main(train)

"""Trains on this machine, or resumes: python launch/local.py --config configs/catch.py --workdir runs/catch"""

from impala_jax.system import stopping

stopping.begin()

from impala_jax.system.quiet import quiet_libraries  # noqa: E402

quiet_libraries()  # Before they are imported.

import os  # noqa: E402
import socket  # noqa: E402

from impala_jax.cli import command_line  # noqa: E402
from impala_jax.rundir.summary import print_summary  # noqa: E402
from impala_jax.runtimes.gate import SECRET_FILE, SECRET_VARIABLE  # noqa: E402
from impala_jax.runtimes.run import default_runtime, run  # noqa: E402


def train() -> None:
    config, workdir, runtime = command_line.train_arguments()
    if runtime is None:
        runtime = default_runtime()
        reason = 'installed' if runtime == 'launchpad' else 'Launchpad is not installed: make doctor'
        print(f'runtime: {runtime} ({reason})', flush=True)
    if config.serve_actors is not None:
        join = f'python launch/actors.py --learner {socket.gethostname()}:{config.serve_actors} --num-actors 8'
        if SECRET_VARIABLE in os.environ:
            print(f'actors of other machines join, with the same {SECRET_VARIABLE}, by: {join}', flush=True)
        else:
            print(
                f'actors of other machines join, with a copy of {workdir / SECRET_FILE}, by: {join} --secret-file '
                f'{SECRET_FILE}',
                flush=True,
            )
    result = run(config, workdir, runtime)
    print_summary(result.workdir)


if __name__ == '__main__':
    command_line.main(train)

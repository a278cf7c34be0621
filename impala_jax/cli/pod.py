"""`impala pod`: trains on all hosts of a pod; every host runs this command."""

from __future__ import annotations

import sys

from impala_jax.cli import command_line
from impala_jax.cli.command_line import PodArguments
from impala_jax.config import ConfigError
from impala_jax.runtimes import supervisor
from impala_jax.runtimes.channel import Channel
from impala_jax.system import program


def main() -> None:
    """Runs the supervisor of one host, or of several simulated ones; a supervisor starts the training process."""
    try:
        arguments = command_line.pod_arguments()
    except ConfigError as error:
        sys.exit(f'error: {error}')
    if arguments.simulate_hosts is not None:
        command = [*program.itself(), *arguments.of_training]
        sys.exit(supervisor.simulate(arguments.simulate_hosts, arguments.simulate_devices, command))
    if arguments.supervisor is None:
        sys.exit(supervisor.supervise([*program.itself(), *sys.argv[1:]], arguments.parent, arguments.coordinator))

    from impala_jax.system.quiet import quiet_libraries

    quiet_libraries()  # Before they are imported.

    channel = Channel(arguments.supervisor)
    command_line.main(lambda: train(arguments, channel))


def train(arguments: PodArguments, channel: Channel) -> None:
    """Trains on this host, as the process that its supervisor started."""
    from impala_jax.rundir.summary import print_summary
    from impala_jax.runtimes import pod
    from impala_jax.runtimes.run import default_runtime, run

    config, workdir, runtime = arguments.train
    runtime = runtime or default_runtime()
    with pod.failures_reported(channel):
        pod.join(arguments.coordinator, arguments.num_hosts, arguments.host_id, config.timeout_s)
        preflight = pod.preflight(config, channel, arguments.coordinator)
        own_workdir = pod.workdir_of_host(workdir)
        is_first = own_workdir == workdir
        if is_first:
            print('\n'.join([*preflight, f'Runtime     {runtime}']), flush=True)
        run(config, own_workdir, runtime)
    if is_first:
        print_summary(workdir)

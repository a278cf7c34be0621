"""The function `run`, which trains and evaluates an experiment in one of the runtimes."""

from __future__ import annotations

import functools
import importlib.util
import os
import threading
from pathlib import Path
from typing import NamedTuple

import jax

from impala_jax import environments
from impala_jax.agent import Agent
from impala_jax.build import make_agent, make_loss, make_optimizer_factory, unused_options
from impala_jax.config import Config, ConfigError, closest
from impala_jax.environments import suites
from impala_jax.evaluation.evaluator import Evaluation
from impala_jax.kernels import allocator, compilation_cache, cpu
from impala_jax.rundir.checkpoint import check_config, require_utf8, restore
from impala_jax.rundir.files import EVALUATIONS
from impala_jax.rundir.lock import only_process
from impala_jax.rundir.rows import read_rows
from impala_jax.runtimes import device, lockstep, nodes, threads
from impala_jax.runtimes.host_share import host, host_share, resolved
from impala_jax.runtimes.nodes import NodeFailure
from impala_jax.system import stopping
from impala_jax.types import Closed

__all__ = ['Interrupted', 'NodeFailure', 'RunResult', 'default_runtime', 'run']

PARTIAL = 'evaluations.partial.jsonl'  # File in the workdir: finished tasks of a suite's last evaluation.
RUNTIMES = ('launchpad', 'ray', 'threads', 'lockstep', 'device')
_NEEDS = {'launchpad': ('launchpad', 'reverb'), 'ray': ('ray',)}  # Packages of a runtime, by preference.


class RunResult(NamedTuple):
    """Result of a finished run."""

    workdir: Path
    frames: int
    learner_steps: int
    # Evaluation of the last parameters; None without an evaluator, and on hosts other than host 0.
    evaluation: Evaluation | None


class Interrupted(Exception):
    """A signal stopped the run, which the same command resumes from its checkpoint.

    Args:
      signal_number: Number of the signal; 0 if another host was stopped.
      frames: Environment frames at the checkpoint; None if the run could not save one.
      workdir: Folder of the run.
    """

    def __init__(self, signal_number: int, frames: int | None, workdir: Path):
        if frames is None:
            text = f'stopped by signal {signal_number} before it could save; the same command resumes from {workdir}'
        elif signal_number:
            text = f'stopped by signal {signal_number} at {frames:,} frames; the same command resumes from {workdir}'
        else:
            text = f'stopped with another host at {frames:,} frames; the same command on every host resumes'
        super().__init__(text)
        self.signal_number = signal_number


def default_runtime() -> str:
    """Returns `launchpad` if it is installed, else `ray` if that is, else `threads`."""
    return next((runtime for runtime in _NEEDS if not _missing(runtime)), 'threads')


def _missing(runtime: str) -> list[str]:
    """Returns the packages that a runtime needs, and that are not installed."""
    return [name for name in _NEEDS.get(runtime, ()) if importlib.util.find_spec(name) is None]


def run(
    config: Config, workdir: str | Path, runtime: str | None = None, *, configure_process: bool = True
) -> RunResult:
    """Trains, or resumes, the experiment in `workdir`, and evaluates the result.

    During training, SIGTERM, SIGINT and SIGHUP stop the run; their previous handlers are restored afterwards.

    Args:
      config: Configuration of the experiment.
      workdir: Folder for the files of the run; created if it is missing.
      runtime: 'launchpad', 'ray', 'threads', 'lockstep' or 'device'; None for `default_runtime()`.
      configure_process: Whether to change two settings of this process permanently: the C library's allocator no longer
        returns large blocks to the system, and JAX stores compiled programs in a cache on disk
        (`impala_jax.kernels.allocator` and `compilation_cache`). Both affect speed only.

    Raises:
      ConfigError: If the configuration is invalid, or another process trains in `workdir`; raised before any long work,
        and before anything in `workdir` is changed.
      Interrupted: If SIGTERM, SIGINT or SIGHUP stopped the run; the checkpoint has been written.
      Exception: If a node of the run failed; the exception is that of the node.
    """
    if configure_process:
        allocator.configure_allocator()
    runtime = default_runtime() if runtime is None else runtime
    _check_runtime(runtime, config)
    workdir = Path(workdir).absolute()
    require_utf8(workdir)
    config = device.one_actor(config) if runtime == 'device' else resolved(config)
    share = host_share(config)
    if share.num_actors:
        suites.assign(share.environment, share.num_actors, share.actor.num_envs)  # Raises errors before any work.
    # Imports the user's modules before Launchpad: on Python 3.10, TensorFlow Probability, which rlax imports, does not
    # load after Launchpad's TensorFlow.
    make_loss(config.loss, config.vtrace)
    make_optimizer_factory(config.optimizer)
    agent = make_agent(config.network, environments.spec(config.environment, config.timeout_s), config.popart.enabled)
    if host()[0] == 0:
        slower = [f'convolutions on the CPU use XLA: the kernels are {cpu.REASON}'] if cpu.REASON else []
        steps = [f'the program steps {config.num_fresh} environments'] if runtime == 'device' else []
        print('\n'.join([f'the network reads {agent.reads}', *steps, *slower, *unused_options(config)]), flush=True)
    with only_process(workdir):
        check_config(workdir, config)
        if configure_process:
            compilation_cache.enable_cache()

        stop = threading.Event()
        with stopping.StopSignals(stop) as signals:
            num_updates = _train(runtime, config, agent, workdir, stop)
            if jax.distributed.is_initialized():
                jax.distributed.shutdown()  # Waits for all hosts; host 0 then evaluates alone.
            if num_updates is None:
                raise Interrupted(signals.received or 0, None, workdir)
            frames = num_updates * config.frames_per_update
            if num_updates < config.total_updates:
                raise Interrupted(signals.received or 0, frames, workdir)
            try:
                evaluation = _evaluate_last(config, agent, workdir, stop) if share.evaluates else None
            except Closed:
                raise Interrupted(signals.received or 0, frames, workdir) from None
        return RunResult(workdir, frames, num_updates, evaluation)


def _check_runtime(runtime: str, config: Config) -> None:
    """Raises ConfigError if the runtime does not support the configuration."""
    if runtime not in RUNTIMES:
        raise ConfigError(f'unknown runtime {runtime!r}; {closest(runtime, RUNTIMES)}')
    if config.serve_actors is not None and runtime != 'launchpad':
        raise ConfigError(
            f'serve_actors {config.serve_actors}: the runtime {runtime!r} has no server that actors on other machines '
            'could join; use --runtime launchpad (Python 3.10)'
        )
    if config.ray_address is not None and runtime != 'ray':
        raise ConfigError(
            f'ray_address {config.ray_address!r}: the runtime {runtime!r} joins no cluster; use --runtime ray'
        )
    if config.ray_address is not None and config.actor.num_actors is None and host()[1] > 1:
        raise ConfigError(
            f'actor.num_actors auto: each of the {host()[1]} hosts would take all CPUs of the cluster '
            f'{config.ray_address!r}; set it to the number of actors per host'
        )
    if runtime == 'device':
        device.require_supported(config)
    if config.policy_lag and runtime not in ('lockstep', 'device'):
        raise ConfigError(
            f'policy_lag {config.policy_lag}: the runtime {runtime!r} cannot set the lag; use --runtime lockstep, or '
            'leave it at 0'
        )
    local_mp = runtime == 'launchpad' and config.launch_type == 'local_mp'
    if config.actor.inference == 'accelerator' and (local_mp or runtime in ('lockstep', 'device', 'ray')):
        raise ConfigError(
            "actor.inference 'accelerator' requires actors that are threads of the learner's process; use --runtime "
            'threads, or --runtime launchpad --launch-type local_mt'
        )
    if config.vtrace.implementation == 'rlax' and local_mp:
        raise ConfigError(
            "vtrace.implementation 'rlax': rlax does not load in the processes of local_mp, after Launchpad's "
            'TensorFlow; use --launch-type local_mt, or another runtime'
        )
    if missing := _missing(runtime):
        raise ConfigError(
            f'runtime {runtime!r}: {" and ".join(missing)} cannot be imported; install the extra {runtime!r}, or use '
            f'--runtime {default_runtime()}'
        )


def _train(runtime: str, config: Config, agent: Agent, workdir: Path, stop: threading.Event) -> int | None:
    """Trains; returns the total number of updates, or None if the run was stopped before it could save."""
    try:
        if runtime == 'launchpad':
            from impala_jax.runtimes import launchpad

            return launchpad.run(config, agent, workdir, stop)
        if runtime == 'ray':
            # Read by Ray when it is imported: the output of actors is shown as it is.
            os.environ.setdefault('RAY_DEDUP_LOGS', '0')
            os.environ.setdefault('RAY_COLOR_PREFIX', '0')
            from impala_jax.runtimes import ray_runtime

            return ray_runtime.run(config, agent, workdir, stop)
        in_this_process = {'threads': threads.run, 'lockstep': lockstep.run, 'device': device.run}
        return in_this_process[runtime](config, agent, workdir, stop)
    except Closed:
        return None


def _evaluate_last(config: Config, agent: Agent, workdir: Path, stop: threading.Event) -> Evaluation:
    checkpoint = restore(workdir, {'learner': {'params': None}})
    evaluator = nodes.make_evaluator(config, agent, stop)
    try:
        params = checkpoint.state['learner']['params']
        report = functools.partial(print, flush=True)
        evaluation = evaluator.play(checkpoint.step, params, partial=workdir / PARTIAL, report=report)
    finally:
        evaluator.close()
    # A run that was complete before repeats its last evaluation for the caller, without another row.
    recorded = {(row.get('learner_steps'), row.get('episodes')) for row in read_rows(workdir / EVALUATIONS)}
    if (checkpoint.step, len(evaluation.returns)) not in recorded:
        nodes.record_evaluation(config, workdir, checkpoint.step, evaluation)
    (workdir / PARTIAL).unlink(missing_ok=True)
    return evaluation

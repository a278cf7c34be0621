"""Running an experiment from its configuration to its summary."""

from __future__ import annotations

import functools
import importlib.util
import threading
from pathlib import Path
from typing import NamedTuple

import jax

from impala_jax import environments
from impala_jax.agent import Agent
from impala_jax.build import make_agent
from impala_jax.config import Config, ConfigError, closest
from impala_jax.environments import suites
from impala_jax.evaluation.evaluator import Evaluation
from impala_jax.kernels import allocator, compilation_cache
from impala_jax.rundir.checkpoint import check_config, require_utf8, restore
from impala_jax.rundir.files import EVALUATIONS
from impala_jax.rundir.lock import only_process
from impala_jax.rundir.rows import read_rows
from impala_jax.runtimes import lockstep, nodes, threads
from impala_jax.runtimes.nodes import NodeFailure
from impala_jax.system import stopping
from impala_jax.types import Closed

__all__ = ['Interrupted', 'NodeFailure', 'RunResult', 'default_runtime', 'run']

PARTIAL = 'evaluations.partial.jsonl'  # in the workdir: of a suite's last evaluation, what has been played
RUNTIMES = ('launchpad', 'threads', 'lockstep')


class RunResult(NamedTuple):
    """What a finished run leaves behind."""

    workdir: Path
    frames: int
    learner_steps: int
    # Of the last parameters; None without an evaluator, and on other hosts than the first.
    evaluation: Evaluation | None


class Interrupted(Exception):
    """The run was stopped by a signal, here or (0) on another host; its checkpoint is written, and the same command
    resumes it."""

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
    """`launchpad` where it is installed, else `threads`."""
    installed = all(importlib.util.find_spec(name) for name in ('launchpad', 'reverb'))
    return 'launchpad' if installed else 'threads'


def run(config: Config, workdir: str | Path, runtime: str | None = None) -> RunResult:
    """Trains, or resumes, the experiment in `workdir`, and evaluates the result.

    Args:
      config: the experiment.
      workdir: holds all of the run; made when missing.
      runtime: 'launchpad', 'threads' or 'lockstep'; None: `default_runtime()`.

    Raises:
      ConfigError: something in the configuration cannot work, or another process trains in `workdir`; raised before
        any long work, and before anything in `workdir` is changed.
      Interrupted: SIGTERM, SIGINT or SIGHUP; the checkpoint is written.
      Exception: whatever ended a node of the run.
    """
    allocator.configure_allocator()
    runtime = default_runtime() if runtime is None else runtime
    if runtime not in RUNTIMES:
        raise ConfigError(f'unknown runtime {runtime!r}; {closest(runtime, RUNTIMES)}')
    if config.serve_actors is not None and runtime != 'launchpad':
        raise ConfigError(
            f'serve_actors {config.serve_actors}: the runtime {runtime!r} has no server that actors of other machines '
            'could join; use --runtime launchpad (Python 3.10)'
        )
    own_processes = runtime == 'launchpad' and config.launch_type == 'local_mp'
    if config.actor.inference == 'accelerator' and (own_processes or runtime == 'lockstep'):
        raise ConfigError(
            "actor.inference 'accelerator' is for actors that are threads beside the learner's; use --runtime threads, "
            'or --runtime launchpad --launch-type local_mt'
        )
    workdir = Path(workdir).absolute()
    require_utf8(workdir)
    if config.actor.num_actors:
        suites.assign(config.environment, config.actor.num_actors, config.actor.num_envs)  # Refused before any work.
    share = nodes.share(config)
    agent = make_agent(config.network, environments.spec(config.environment, config.timeout_s), config.popart.enabled)
    if nodes.host()[0] == 0:
        print(f'the network reads {agent.reads}', flush=True)
    with only_process(workdir):
        check_config(workdir, config)
        compilation_cache.enable_cache()

        stop = threading.Event()
        with stopping.StopSignals(stop) as signals:
            try:
                num_updates = _train(runtime, config, agent, workdir, stop)
            except Closed:
                num_updates = None
            if jax.distributed.is_initialized():
                jax.distributed.shutdown()  # Waits for the others, who meet no more: the first evaluates for all.
            if num_updates is None:
                raise Interrupted(signals.received or 0, None, workdir)
            frames = num_updates * config.frames_per_update
            if num_updates < config.total_updates:
                raise Interrupted(signals.received or 0, frames, workdir)
            try:
                evaluation = _evaluate_last(config, agent, workdir, stop) if share.evaluator.episodes else None
            except Closed:
                raise Interrupted(signals.received or 0, frames, workdir) from None
        return RunResult(workdir, frames, num_updates, evaluation)


def _train(runtime: str, config: Config, agent: Agent, workdir: Path, stop: threading.Event) -> int | None:
    if runtime == 'launchpad':
        from impala_jax.runtimes import launchpad

        return launchpad.run(config, agent, workdir, stop)
    return (threads.run if runtime == 'threads' else lockstep.run)(config, agent, workdir, stop)


def _evaluate_last(config: Config, agent: Agent, workdir: Path, stop: threading.Event) -> Evaluation:
    checkpoint = restore(workdir, {'learner': {'params': None}})
    evaluator = nodes.make_evaluator(config, agent, stop)
    try:
        params = checkpoint.state['learner']['params']
        report = functools.partial(print, flush=True)
        evaluation = evaluator.play(checkpoint.step, params, partial=workdir / PARTIAL, report=report)
    finally:
        evaluator.close()
    # A run that had ended before repeats its last evaluation for the caller.
    recorded = {(row.get('learner_steps'), row.get('episodes')) for row in read_rows(workdir / EVALUATIONS)}
    if (checkpoint.step, len(evaluation.returns)) not in recorded:
        nodes.record_evaluation(config, workdir, checkpoint.step, evaluation)
    (workdir / PARTIAL).unlink(missing_ok=True)
    return evaluation

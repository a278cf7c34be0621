"""What every runtime is made of: the constructors of its nodes, and how they end."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from impala_jax import build, environments, seeds
from impala_jax.actor import Actor, run_actor
from impala_jax.agent import Agent, AgentStep
from impala_jax.build import Training
from impala_jax.config import Config, ConfigError
from impala_jax.environments import EnvironmentFailure, suites
from impala_jax.evaluation.evaluator import Evaluation, Evaluator
from impala_jax.inference import InferenceServer
from impala_jax.learner import HostLost
from impala_jax.parameter_store import ParameterStore
from impala_jax.rundir.checkpoint import Checkpointer, CheckpointError
from impala_jax.rundir.files import EVALUATIONS
from impala_jax.rundir.rows import append_row
from impala_jax.trajectory_queue import Replay, TrajectoryQueue
from impala_jax.types import Closed, PyTree, TimeStep

REPLAY = 'replay'  # in the workdir

_logger = logging.getLogger(__name__)

Infer = Callable[[TimeStep, PyTree], AgentStep] | None  # None: each actor by itself.


class NodeFailure(RuntimeError):
    """A node in another thread or process raised; the message is its traceback."""


def last_words(error: BaseException) -> str:
    """What is said of an error that ends a program; its last line is the reason.

    Errors that are about what a person has given, or about the world outside, are said without a traceback of ours.
    """
    if isinstance(error, NodeFailure):
        return str(error).rstrip()
    if isinstance(error, OSError) and error.filename is not None:
        return f'error: {error.filename}: {error.strerror}'
    if isinstance(error, (ConfigError, CheckpointError, HostLost, EnvironmentFailure, TimeoutError)):
        # Behind an environment's own traceback, where there is one.
        *above, reason = str(error).splitlines() or [type(error).__name__]
        return '\n'.join([*above, f'error: {reason}'])
    return ''.join(traceback.format_exception(error)).rstrip()


def host() -> tuple[int, int]:
    """This host's place among those that train together (`impala_jax.runtimes.pod`), and their number."""
    # Asked of a process that is not the learner's, JAX would take the accelerator into use there.
    return (jax.process_index(), jax.process_count()) if jax.distributed.is_initialized() else (0, 1)


def share(config: Config) -> Config:
    """The part of an experiment that this host's actors, queue and replay have; all of it on a single host.

    The learner, and whatever counts updates or frames, takes the whole experiment.

    Raises:
      ConfigError: a batch that the hosts do not divide.
    """
    index, count = host()
    if count == 1:
        return config
    for what, number in (('new', config.num_fresh), ('replayed', config.num_replayed)):
        if number % count:
            raise ConfigError(
                f'learner.batch_size {config.learner.batch_size}: its {number} {what} trajectories do not divide over '
                f'{count} hosts; choose a multiple'
            )
    return dataclasses.replace(
        config,
        seed=config.seed if index == 0 else node_seed(config, 3, index),
        learner=dataclasses.replace(config.learner, batch_size=config.learner.batch_size // count),
        replay=dataclasses.replace(config.replay, capacity=-(-config.replay.capacity // count)),
        evaluator=config.evaluator if index == 0 else dataclasses.replace(config.evaluator, episodes=0),
    )


def node_seed(config: Config, *path: int) -> int:
    """An independent seed in [0, 2**31) for the node at `path` (role, index, ...)."""
    return seeds.derived_seed(config.seed, *path)


def make_actor(
    config: Config,
    agent: Agent,
    index: int,
    version: int = 0,
    infer: Infer = None,
    closed: Callable[[], bool] = lambda: False,
) -> Actor:
    """Actor `index`; `version` is the learner's when the run starts, so that a resumed run sees new episodes."""
    seed = node_seed(config, 0, index, version)
    task_ids = suites.assign(config.environment, config.actor.num_actors, config.actor.num_envs)[index]
    return build_actor(config, agent, seed, task_ids, infer, closed)


def build_actor(
    config: Config,
    agent: Agent,
    seed: int,
    task_ids: np.ndarray,
    infer: Infer = None,
    closed: Callable[[], bool] = lambda: False,
) -> Actor:
    """An actor with environments of the tasks `task_ids`, [num_envs] int32.

    Once `closed()`, a wait for an environment ends with `Closed`.
    """
    environment = environments.make(
        config.environment, config.actor.num_envs, seed, timeout_s=config.timeout_s, task_ids=task_ids, closed=closed
    )
    played, known = environment.spec, agent.spec
    if (played.observation, played.num_actions) != (known.observation, known.num_actions):
        environment.close()
        raise ConfigError(
            f"the environments of {config.environment.name!r} differ: an actor's have {played}, the agent knows {known}"
        )
    return Actor(agent, environment, config.learner.unroll_length, seed, task_ids=task_ids, infer=infer)


def make_replay(config: Config, version: int = 0) -> Replay:
    """In-process replay; one of no samples where the configuration has none."""
    return Replay(config.replay.capacity, config.num_replayed, node_seed(config, 2, version))


def make_training(config: Config, agent: Agent, workdir: Path, store: ParameterStore) -> Training:
    """The training loop, of a member of a population with what that needs; see `build.make_training`."""
    attach = []
    if config.pbt.member is not None:
        from impala_jax.studies.pbt import Evolution

        attach.append(functools.partial(Evolution, config, workdir, agent.spec.tasks))
    return build.make_training(config, agent, workdir, store, attach=attach)


def restored_replay(config: Config, workdir: Path, training: Training) -> dict[str, Any]:
    """The replay of the run that `training` resumes, for `Replay.restore`; {} if there is none. Reads only.

    Whatever of it is not that of the checkpoint is said.
    """
    num_updates, restored = training.loop.num_updates, training.checkpoints.restored_runtime_state
    if not config.num_replayed or not num_updates:
        return {}
    if 'replay' in restored:  # In lockstep every checkpoint has it.
        return restored['replay']
    again = 'replay starts again with new trajectories'
    try:
        saved = Checkpointer(workdir / REPLAY, config, keep=1).restore_latest({'runtime': None})
    except CheckpointError as error:
        _logger.warning('%s: %s', again, error)
        return {}
    if saved is None or saved.step > num_updates:
        _logger.warning('%s: it is saved when a run stops, and this one was killed', again)
        return {}
    if saved.step < num_updates:
        _logger.warning(
            'replay goes on from update %d of %d: it is saved when a run stops, and this one was killed since',
            saved.step,
            num_updates,
        )
    return saved.state['runtime'] or {}


def save_replay(config: Config, workdir: Path, num_updates: int, state: dict[str, Any]) -> None:
    """Saves this host's replay after so many updates, `Replay.state` or `to_arrays`, in place of the one before.

    Apart from the checkpoints, of which there are several: 10,000 trajectories of Atari are 1.8 GB.
    """
    Checkpointer(workdir / REPLAY, config, keep=1).save(num_updates, {'runtime': state}, {})


def make_inference(config: Config, agent: Agent) -> InferenceServer | None:
    """What the actors of this process ask to act; None if each acts by itself."""
    if config.actor.inference == 'actor' or not config.actor.num_actors:
        return None
    return InferenceServer(config, agent, config.actor.num_actors, node_seed(config, 4))


def act(
    config: Config,
    agent: Agent,
    index: int,
    queue: TrajectoryQueue,
    store: ParameterStore,
    stop: threading.Event,
    inference: InferenceServer | None = None,
) -> None:
    """The life of actor `index`: until queue or store is closed, or `stop` is set."""
    source = store if inference is None else inference
    with contextlib.suppress(Closed):
        version, _ = source.latest()
        actor = make_actor(config, agent, index, version, inference and inference.step, stop.is_set)
        run_actor(actor, queue, source)


def evaluate_beside(config: Config, agent: Agent, store: ParameterStore, workdir: Path, stop: threading.Event) -> None:
    """The life of the evaluator: plays with the newest parameters every so often, until `stop`."""
    if stop.wait(config.evaluator.interval_s):
        return
    with contextlib.suppress(Closed), contextlib.closing(make_evaluator(config, agent, stop)) as evaluator:
        while True:
            version, params = store.latest()
            record_evaluation(config, workdir, version, evaluator.play(version, params))
            if stop.wait(config.evaluator.interval_s):
                return


def make_evaluator(config: Config, agent: Agent, stop: threading.Event) -> Evaluator:
    """The evaluator, as configured; raises `Closed` once `stop` is set."""
    return Evaluator(
        agent,
        config.environment,
        episodes=config.evaluator.episodes,
        num_envs=config.evaluator.num_envs,
        seed=node_seed(config, 1),
        greedy=config.evaluator.greedy,
        max_episode_steps=config.evaluator.max_episode_steps,
        timeout_s=config.timeout_s,
        closed=stop.is_set,
    )


def record_evaluation(config: Config, workdir: Path, version: int, evaluation: Evaluation) -> None:
    """Appends a row to `evaluations.jsonl`."""
    row = {
        'frames': version * config.frames_per_update,
        'learner_steps': version,
        'episodes': len(evaluation.returns),
        'mean_return': evaluation.mean,
        'median_return': evaluation.median,
        'stderr': evaluation.stderr,
        'truncated_episodes': evaluation.num_truncated,
        **{f'mean_return/{task}': scores.mean for task, scores in evaluation.tasks.items()},
    }
    append_row(workdir / EVALUATIONS, row)

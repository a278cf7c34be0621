"""Functions that build and run the nodes of every runtime, and report how they end."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from impala_jax import build, environments
from impala_jax.actor import Actor, run_actor
from impala_jax.agent import Agent
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
from impala_jax.runtimes.host_share import HostShare, host_share
from impala_jax.seeds import derived_seed
from impala_jax.trajectory_queue import Replay, TrajectoryQueue
from impala_jax.types import Closed, PyTree

REPLAY = 'replay'  # Folder in the workdir.

_logger = logging.getLogger(__name__)


class NodeFailure(RuntimeError):
    """A node in another thread or process failed; the message is its traceback."""


def final_message(error: BaseException) -> str:
    """Returns the final message of a program that ends by an error; its last line is the reason.

    Errors in the user's input or the environment of the program have no traceback of this package.
    """
    if isinstance(error, NodeFailure):
        return str(error).rstrip()
    if isinstance(error, OSError) and error.filename is not None:
        return f'error: {error.filename}: {error.strerror}'
    if isinstance(error, (ConfigError, CheckpointError, HostLost, EnvironmentFailure, TimeoutError)):
        # The text may begin with the traceback of an environment.
        *above, reason = str(error).splitlines() or [type(error).__name__]
        return '\n'.join([*above, f'error: {reason}'])
    text = ''.join(traceback.format_exception(error)).rstrip()
    # JAX adds lines about its tracebacks after the reason.
    reason = f'{type(error).__name__}: {error}'.rstrip().splitlines()
    return text if text.splitlines()[-1].endswith(reason[-1]) else f'{text}\nerror: {reason[0]}'


def make_actor(
    share: HostShare, agent: Agent, index: int, version: int = 0, closed: Callable[[], bool] = lambda: False
) -> Actor:
    """Builds an actor of this host.

    Args:
      share: This host's share of the experiment.
      agent: Agent that acts.
      index: Index of the actor.
      version: Number of learner updates at the start, which makes the episodes of a resumed run new ones.
      closed: Function that returns whether waits for an environment have to end, with `Closed`.
    """
    seed = share.node_seed(0, index, version)
    task_ids = suites.assign(share.environment, share.num_actors, share.actor.num_envs)[index]
    return build_actor(share, agent, seed, task_ids, closed)


def build_actor(
    share: HostShare,
    agent: Agent,
    seed: int,
    task_ids: np.ndarray,
    closed: Callable[[], bool] = lambda: False,
) -> Actor:
    """Builds an actor with a given seed and given tasks.

    Args:
      share: This host's share of the experiment.
      agent: Agent that acts.
      seed: Seed for environments and action sampling.
      task_ids: Tasks of the environments, [num_envs] int32.
      closed: Function that returns whether waits for an environment have to end, with `Closed`.

    Raises:
      ConfigError: If the environments differ from those that the agent was built for.
    """
    environment = environments.make(
        share.environment, share.actor.num_envs, seed, timeout_s=share.timeout_s, task_ids=task_ids, closed=closed
    )
    played, known = environment.spec, agent.spec
    if (played.observation, played.num_actions) != (known.observation, known.num_actions):
        environment.close()
        raise ConfigError(
            f"the environments of {share.environment.name!r} differ: an actor's have {played}, the agent knows {known}"
        )
    return Actor(agent, environment, share.unroll_length, seed, task_ids=task_ids)


def make_replay(share: HostShare, version: int = 0) -> Replay:
    """Builds in-process replay; without replay in the configuration, it stores and samples nothing."""
    return Replay(share.replay_capacity, share.num_replayed, share.node_seed(2, version))


def make_training(config: Config, agent: Agent, workdir: Path, publish: Callable[[int, PyTree], None]) -> Training:
    """Builds the training loop, for a member of a population with its hook; see `build.make_training`."""
    attach = []
    if config.pbt.member is not None:
        from impala_jax.studies.pbt import Evolution

        attach.append(functools.partial(Evolution, config, workdir, agent.spec.tasks))
    return build.make_training(config, agent, workdir, publish, attach=attach)


def restored_replay(config: Config, workdir: Path, training: Training) -> dict[str, Any]:
    """Reads the replay of the run that `training` resumes, for `Replay.restore`; {} if there is none.

    Logs a warning if the replay is missing, or older than the checkpoint.
    """
    num_updates, restored = training.loop.num_updates, training.checkpoints.restored_runtime_state
    if not config.num_replayed or not num_updates:
        return {}
    if 'replay' in restored:  # In lockstep, checkpoints contain the replay.
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
            'replay continues from update %d of %d: it is saved when a run stops, and this one was killed since',
            saved.step,
            num_updates,
        )
    return saved.state['runtime'] or {}


def make_restored_replay(config: Config, agent: Agent, workdir: Path, training: Training) -> Replay:
    """Builds the in-process replay of the run that `training` resumes, and logs its size if there is any."""
    replay = make_replay(host_share(config))
    replay.restore(restored_replay(config, workdir, training), agent.trajectory_structure())
    if config.num_replayed:
        training.metrics.log_with(lambda: {'replay_size': len(replay)})
    return replay


def save_replay(config: Config, workdir: Path, num_updates: int, state: dict[str, Any]) -> None:
    """Saves this host's replay, and removes the one saved before.

    It is not part of the checkpoints, of which there are several: 10,000 trajectories of Atari are 1.8 GB.

    Args:
      config: Configuration of the experiment.
      workdir: Folder of the run.
      num_updates: Number of updates.
      state: Result of `Replay.state` or `to_arrays`.
    """
    Checkpointer(workdir / REPLAY, config, keep=1).save(num_updates, {'runtime': state}, {})


def make_inference(config: Config, agent: Agent) -> InferenceServer | None:
    """Builds the inference server for the actors of this process; None if actors use the CPU."""
    share = host_share(config)
    if share.actor.inference == 'actor' or not share.num_actors:
        return None
    devices = jax.local_devices()[: config.learner.num_devices]
    return InferenceServer(agent, share.num_actors, share.actor, devices, share.node_seed(4), share.timeout_s)


def publisher(store: ParameterStore, inference: InferenceServer | None) -> Callable[[int, PyTree], None]:
    """Function that publishes parameters to the store, and to the inference server if there is one."""

    def publish(version: int, params: PyTree) -> None:
        store.publish(version, params)
        if inference is not None:
            inference.publish(version, params)

    return publish


def act(
    share: HostShare,
    agent: Agent,
    index: int,
    queue: TrajectoryQueue,
    store: ParameterStore,
    stop: threading.Event,
    inference: InferenceServer | None = None,
) -> None:
    """Runs actor `index` until the queue or the store is closed, or `stop` is set."""
    with contextlib.suppress(Closed):
        version = store.latest()[0] if inference is None else inference.policy().version
        actor = make_actor(share, agent, index, version, stop.is_set)
        run_actor(actor, queue, inference.policy if inference else lambda: actor.policy(*store.latest()))


class PeriodicEvaluator(Protocol):
    """What `evaluate_periodically` needs of an `Evaluator`, here or in another process."""

    def play(self, version: int, params: PyTree) -> Evaluation:
        """See `Evaluator.play`."""
        ...

    def close(self) -> None:
        """See `Evaluator.close`."""
        ...


def evaluate_periodically(
    config: Config,
    evaluator: PeriodicEvaluator,
    latest: Callable[[], tuple[int, PyTree]],
    workdir: Path,
    stop: threading.Event,
) -> None:
    """Evaluates at intervals, with the newest version and parameters, until `stop` is set; closes the evaluator."""
    with contextlib.suppress(Closed), contextlib.closing(evaluator):
        while not stop.wait(config.evaluator.interval_s):
            version, params = latest()
            record_evaluation(config, workdir, version, evaluator.play(version, params))


def make_evaluator(config: Config, agent: Agent, stop: threading.Event) -> Evaluator:
    """Builds the evaluator; its waits end with `Closed` when `stop` is set."""
    return Evaluator(
        agent,
        config.environment,
        episodes=config.evaluator.episodes,
        num_envs=config.evaluator.num_envs,
        seed=derived_seed(config.seed, 1),
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

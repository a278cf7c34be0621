"""An evaluator that plays whole games with the unroll code of the training, and scores them."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from impala_jax import environments
from impala_jax.actor import Actor
from impala_jax.agent import Agent
from impala_jax.config import Config, ConfigError, EnvironmentConfig, EvaluatorConfig
from impala_jax.environments import EnvironmentFailure, VectorEnvironment, suites
from impala_jax.evaluation.partial_scores import PartialScores
from impala_jax.evaluation.scores import human_normalised
from impala_jax.evaluation.video import Recording
from impala_jax.types import FIRST, Closed, PyTree, StepInfo, TimeStep

_logger = logging.getLogger(__name__)
_UNROLL_LENGTH = 20  # Number of steps between two checks whether enough games have ended.


class Evaluation(NamedTuple):
    """Scores of whole games. Those of a suite combine the games of all its tasks, the same number for each."""

    returns: list[float]  # undiscounted and unclipped
    tasks: Mapping[str, Evaluation] = types.MappingProxyType({})  # by name; empty for a single environment
    num_truncated: int = 0  # games that a step limit ended, either the evaluator's or the environment's own

    @property
    def mean(self) -> float:
        """Mean return."""
        return float(np.mean(self.returns))

    @property
    def median(self) -> float:
        """Median return."""
        return float(np.median(self.returns))

    @property
    def stderr(self) -> float:
        """Standard error of the mean return; 0 for a single game.

        For a suite it is stratified by task: the tasks are fixed, so differences between them do not count as error.
        """
        n = len(self.returns)
        if self.tasks:
            return math.sqrt(sum((len(task.returns) / n * task.stderr) ** 2 for task in self.tasks.values()))
        return float(np.std(self.returns, ddof=1) / math.sqrt(n)) if n > 1 else 0.0


class TaskFailed(EnvironmentFailure):
    """A task of a suite cannot be played; the message names the task."""


class Evaluator:
    """Plays whole games.

    The tasks of a suite are played one after the other, so only the environments of one task exist at any time.

    Args:
      agent: Agent to evaluate.
      config: Task or suite to play; evaluation always plays whole games, not lives.
      episodes: Number of games of each task per call of `play`.
      num_envs: Number of games played at the same time; at most `episodes`.
      seed: Seed for environments and actions.
      greedy: Whether to take the most likely action instead of sampling.
      record: Whether to record the first game of environment 0 in `recording`; for a suite, that of its first task.
      max_episode_steps: Number of agent steps after which a game is truncated.
      timeout_s: Longest wait for an environment, in seconds.
      closed: Callable that returns True when the evaluator should stop; `play` then raises `Closed`.
    """

    def __init__(
        self,
        agent: Agent,
        config: EnvironmentConfig,
        *,
        episodes: int,
        num_envs: int,
        seed: int,
        greedy: bool = False,
        record: bool = False,
        max_episode_steps: int = EvaluatorConfig().max_episode_steps,
        timeout_s: float = Config().timeout_s,
        closed: Callable[[], bool] = lambda: False,
    ):
        num_envs = min(num_envs, episodes)
        # Each environment plays a fixed number of games: counting the first N games to end would favour short ones.
        self._quota = np.full([num_envs], episodes // num_envs) + (np.arange(num_envs) < episodes % num_envs)
        self._config = config
        self._configs = {task: suites.task_config(config, task) for task in suites.tasks(config)}
        self._first = next(iter(self._configs))
        self._task: str | None = None  # the task whose environments exist
        self._max_episode_steps = max_episode_steps
        self._timeout_s = timeout_s
        self._closed = closed
        self.recording: Recording | None = None
        self._record = record
        self._agent = agent
        self._actor: Actor | None = None
        self._seed = seed
        self._greedy = greedy

    def play(
        self,
        version: int,
        params: PyTree,
        *,
        partial: Path | None = None,
        report: Callable[[str], None] = lambda _: None,
    ) -> Evaluation:
        """Plays `episodes` games of each task from the start.

        Args:
          version: Version of the parameters.
          params: Parameters of the agent.
          partial: File for the scores of a suite's tasks as they are played. Tasks in the file that were played with
            the same parameters, seed and settings are skipped. If a task fails, the others are played nevertheless. The
            caller removes the file once the scores are saved.
          report: Function that is called with a line of text after each task of a suite.

        Returns:
          The scores.

        Raises:
          Closed: The evaluator was closed.
          TaskFailed: A task of a suite cannot be played.
          EnvironmentFailure: The environment failed too often.
          TimeoutError: The environment did not answer in time.
          ConfigError: The environment cannot be built.
        """
        identity = {} if partial is None else self._identity(version, params)
        self._seed += 1
        if len(self._configs) == 1:
            return self._play_task(self._first, version, params)
        saved = None if partial is None else PartialScores(partial, identity, self._quota.sum())
        before = {} if saved is None else {task: _from_row(row) for task, row in saved.rows.items()}
        if self._record:
            before.pop(self._first, None)  # It is played again, because its recording was not saved.
        tasks: dict[str, Evaluation] = {}
        failures: dict[str, Exception] = {}
        for i, task in enumerate(self._configs):
            try:
                tasks[task] = before[task] if task in before else self._play_task(task, version, params)
            except (EnvironmentFailure, TimeoutError, ConfigError) as error:
                if saved is None:
                    raise _task_failed({task: error}) from error
                failures[task] = error
                _logger.warning('%s cannot be played, skipping it: %s', task, str(error).splitlines()[-1])
                continue
            if saved is not None and task not in before:
                saved.add(task, _to_row(task, tasks[task]))
            remark = ' (played before)' if task in before else ''
            report(f'{i + 1}/{len(self._configs)} {_task_text(task, tasks[task])}{remark}')
        if failures:
            raise _task_failed(failures, f'; {len(tasks)} other tasks are saved in {partial}')
        return Evaluation(
            [value for scores in tasks.values() for value in scores.returns],
            tasks,
            sum(scores.num_truncated for scores in tasks.values()),
        )

    def _identity(self, version: int, params: PyTree) -> dict[str, Any]:
        """Returns everything that determines the scores of a suite."""
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves(params):
            digest.update(np.asarray(leaf).tobytes())
        return {
            'checkpoint_step': version,
            'suite': self._config.name,
            'tasks': list(self._configs),
            'episodes': int(self._quota.sum()),
            'num_envs': len(self._quota),
            'seed': self._seed,
            'greedy': self._greedy,
            'max_episode_steps': self._max_episode_steps,
            'parameters': digest.hexdigest()[:16],
            'environment': dataclasses.asdict(self._config),
        }

    def _actor_for(self, task: str) -> Actor:
        """Returns the actor with the environments of `task`; the environments of another task are closed."""
        if self._actor is not None and task == self._task:
            return self._actor
        self.close()
        environment = environments.make(
            self._configs[task],
            len(self._quota),
            self._seed,
            evaluation=True,
            timeout_s=self._timeout_s,
            max_episode_steps=self._max_episode_steps,
            closed=self._closed,
        )
        if self._record and self.recording is None and task == self._first:
            repeat = self._config.frames_per_step
            self.recording = Recording(environment.spec.render_fps or (60 / repeat if repeat > 1 else 5))
            environment = _Recorder(environment, self.recording)
        if self._actor is None:
            self._actor = Actor(self._agent, environment, _UNROLL_LENGTH, self._seed, greedy=self._greedy)
        else:
            self._actor.environment = environment  # The same actor, because its compiled step fits all tasks.
        self._task = task
        return self._actor

    def _play_task(self, task: str, version: int, params: PyTree) -> Evaluation:
        if self._closed():
            raise Closed
        actor = self._actor_for(task)
        # A reset discards games that were begun with older parameters.
        actor.reset(self._seed)
        returns: list[list[float]] = [[] for _ in self._quota]
        num_truncated = num_at_limit = 0
        num_steps = np.zeros(len(self._quota), np.int64)  # of each environment's current game
        while any(len(r) < quota for r, quota in zip(returns, self._quota, strict=True)):
            if self._closed():
                raise Closed
            trajectory = actor.unroll(version, params)
            first = trajectory.timesteps.step_type[1:] == FIRST
            discount, info = trajectory.timesteps.discount[1:], trajectory.info
            for t, ended in enumerate(info.episode_ended):
                num_steps = np.where(first[t], 0, num_steps + 1)
                for i in np.flatnonzero(ended):
                    if len(returns[i]) < self._quota[i]:
                        returns[i].append(float(info.episode_return[t, i]))
                        num_truncated += bool(discount[t, i] > 0)
                        num_at_limit += bool(num_steps[i] >= self._max_episode_steps)
        if num_at_limit:
            _logger.warning(
                '%d of %d games of %s were truncated after %d steps (evaluator.max_episode_steps); their returns count',
                num_at_limit,
                sum(self._quota),
                task,
                self._max_episode_steps,
            )
        return Evaluation([value for r in returns for value in r], num_truncated=num_truncated)

    def close(self) -> None:
        """Closes the environments."""
        if self._actor is not None and self._task is not None:
            self._task = None
            self._actor.environment.close()


def _task_failed(failures: Mapping[str, Exception], remark: str = '') -> TaskFailed:
    """Combines the errors of all failed tasks; the message is the first one's, after its traceback if it has one."""
    (task, error), *others = failures.items()
    *traceback, reason = str(error).splitlines() or [type(error).__name__]
    also = f' (as do {", ".join(name for name, _ in others)})' if others else ''
    return TaskFailed('\n'.join([*traceback, f'task {task} fails{also}: {reason}{remark}']))


def _task_text(task: str, scores: Evaluation) -> str:
    """Formats the scores of a task as one line."""
    normalised = human_normalised(task, scores.mean)
    text = f'{task}: mean return {scores.mean:.2f}, standard error {scores.stderr:.2f}'
    return text if normalised is None else f'{text}, human-normalised {normalised:.1f} %'


def _to_row(task: str, scores: Evaluation) -> dict[str, Any]:
    """Converts the scores of a task to a row of `PartialScores`."""
    return {
        'episodes': len(scores.returns),
        'mean_return': scores.mean,
        'stderr': scores.stderr,
        'human_normalised': human_normalised(task, scores.mean),
        'truncated_episodes': scores.num_truncated,
        'returns': scores.returns,
    }


def _from_row(row: Mapping[str, Any]) -> Evaluation:
    return Evaluation(row['returns'], num_truncated=row['truncated_episodes'])


class _Recorder:
    """A `VectorEnvironment` that also records environment 0 until its first game ends."""

    def __init__(self, environment: VectorEnvironment, recording: Recording):
        self._environment = environment
        self._recording = recording
        self._over = False
        self.num_envs = environment.num_envs
        self.spec = environment.spec

    def reset(self) -> TimeStep:
        """Resets the environments and starts the recording."""
        timestep = self._environment.reset()
        self._recording.add(self._environment.render)
        return timestep

    def step(self, actions: np.ndarray) -> tuple[TimeStep, StepInfo]:
        """Steps the environments and records the new frame."""
        timestep, info = self._environment.step(actions)
        if not self._over:
            self._recording.add(self._environment.render)
            self._over = bool(info.episode_ended[0])
        return timestep, info

    def get_state(self) -> bytes:
        """See `VectorEnvironment.get_state`."""
        return self._environment.get_state()

    def set_state(self, state: bytes) -> None:
        """See `VectorEnvironment.set_state`."""
        self._environment.set_state(state)

    def render(self) -> np.ndarray:
        """See `VectorEnvironment.render`."""
        return self._environment.render()

    def close(self) -> None:
        """See `VectorEnvironment.close`."""
        self._environment.close()

"""Playing whole games with the training's own unroll code, and scoring them."""

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
_UNROLL_LENGTH = 20  # Steps between two looks at whether enough games have ended.


class Evaluation(NamedTuple):
    """Scores of whole games; a suite's are those of all its tasks, with as many games of each."""

    returns: list[float]  # undiscounted, raw
    tasks: Mapping[str, Evaluation] = types.MappingProxyType({})  # by name; empty for a single environment
    num_truncated: int = 0  # games that a limit of steps ended, the evaluator's or the environment's own

    @property
    def mean(self) -> float:
        return float(np.mean(self.returns))

    @property
    def median(self) -> float:
        return float(np.median(self.returns))

    @property
    def stderr(self) -> float:
        """Standard error of the mean; 0 for a single game.

        A suite's is stratified: its tasks are fixed, so what differs between them is no error of their mean.
        """
        n = len(self.returns)
        if self.tasks:
            return math.sqrt(sum((len(task.returns) / n * task.stderr) ** 2 for task in self.tasks.values()))
        return float(np.std(self.returns, ddof=1) / math.sqrt(n)) if n > 1 else 0.0


class TaskFailed(EnvironmentFailure):
    """A task of a suite cannot be played; the message names it."""


class Evaluator:
    """Plays games; the tasks of a suite one after the other, so that no more environments live than those of one.

    Args:
      agent: the agent.
      config: the task or suite; evaluation always plays whole games, not lives.
      episodes: games of each task a call of `play`.
      num_envs: games played at the same time, at most `episodes`.
      seed: of environments and actions.
      greedy: play the most likely action instead of sampling.
      record: keep pictures of the first game of environment 0, in `recording`; of a suite, of its first task.
      max_episode_steps: Agent steps after which a game is truncated.
      timeout_s: Longest wait for an environment.
      closed: once it is true, whatever goes on ends with `Closed`.
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
        # A fixed number of games each: the first N to end over all environments would favour short games.
        self._quota = np.full([num_envs], episodes // num_envs) + (np.arange(num_envs) < episodes % num_envs)
        self._config = config
        self._configs = {task: suites.task_config(config, task) for task in suites.tasks(config)}
        self._first = next(iter(self._configs))
        self._task: str | None = None  # The one that there are environments of
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
        """Plays `episodes` games of each task from their start.

        Args:
          version: Of the parameters.
          params: The agent's.
          partial: A file for the tasks of a suite that have been played. Those that are there, of the same parameters,
            seed and settings, are not played again. Where a task fails, the others are played nevertheless. The caller
            removes the file when the scores are where they belong.
          report: Called with a line of text for each task of a suite when it has been played.

        Raises:
          Closed: the evaluator was closed.
          TaskFailed: A task of a suite cannot be played.
          EnvironmentFailure, TimeoutError, ConfigError: The environment cannot be played.
        """
        identity = {} if partial is None else self._identity(version, params)
        self._seed += 1
        if len(self._configs) == 1:
            return self._play_task(self._first, version, params)
        saved = None if partial is None else PartialScores(partial, identity, self._quota.sum())
        before = {} if saved is None else {task: _from_row(row) for task, row in saved.rows.items()}
        if self._record:
            before.pop(self._first, None)  # Its pictures are gone.
        tasks: dict[str, Evaluation] = {}
        failures: dict[str, Exception] = {}
        for i, task in enumerate(self._configs):
            try:
                tasks[task] = before[task] if task in before else self._play_task(task, version, params)
            except (EnvironmentFailure, TimeoutError, ConfigError) as error:
                if saved is None:
                    raise _task_failed({task: error}) from error
                failures[task] = error
                _logger.warning('%s cannot be played, the other tasks are: %s', task, str(error).splitlines()[-1])
                continue
            if saved is not None and task not in before:
                saved.add(task, _to_row(task, tasks[task]))
            remark = ' (played before)' if task in before else ''
            report(f'{i + 1}/{len(self._configs)} {_task_text(task, tasks[task])}{remark}')
        if failures:
            raise _task_failed(failures, f'; {len(tasks)} other tasks are in {partial}, and not played again')
        return Evaluation(
            [value for scores in tasks.values() for value in scores.returns],
            tasks,
            sum(scores.num_truncated for scores in tasks.values()),
        )

    def _identity(self, version: int, params: PyTree) -> dict[str, Any]:
        """What decides the scores of a suite."""
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

    def _enter(self, task: str) -> Actor:
        """An actor at the environments of `task`, in place of those of another."""
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
            self._actor.environment = environment  # Into the same actor, whose compiled step fits all tasks.
        self._task = task
        return self._actor

    def _play_task(self, task: str, version: int, params: PyTree) -> Evaluation:
        if self._closed():
            raise Closed
        actor = self._enter(task)
        # From a reset, so that no game half played with older parameters is counted.
        actor.reset(self._seed)
        returns: list[list[float]] = [[] for _ in self._quota]
        num_truncated = num_at_limit = 0
        num_steps = np.zeros(len(self._quota), np.int64)  # in each environment's game
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
                '%d of %d games of %s were cut after %d steps (evaluator.max_episode_steps), and count as they stood',
                num_at_limit,
                sum(self._quota),
                task,
                self._max_episode_steps,
            )
        return Evaluation([value for r in returns for value in r], num_truncated=num_truncated)

    def close(self) -> None:
        """Ends the environments."""
        if self._actor is not None and self._task is not None:
            self._task = None
            self._actor.environment.close()


def _task_failed(failures: Mapping[str, Exception], remark: str = '') -> TaskFailed:
    """One error of all tasks that failed, with what the first one says, and behind its traceback where it has one."""
    (task, error), *others = failures.items()
    *traceback, reason = str(error).splitlines() or [type(error).__name__]
    also = f' (as do {", ".join(name for name, _ in others)})' if others else ''
    return TaskFailed('\n'.join([*traceback, f'task {task} fails{also}: {reason}{remark}']))


def _task_text(task: str, scores: Evaluation) -> str:
    """Scores of a task as one line."""
    normalised = human_normalised(task, scores.mean)
    text = f'{task}: mean return {scores.mean:.2f}, standard error {scores.stderr:.2f}'
    return text if normalised is None else f'{text}, human-normalised {normalised:.1f} %'


def _to_row(task: str, scores: Evaluation) -> dict[str, Any]:
    """For `PartialScores`."""
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
    """A `VectorEnvironment` that also takes pictures of environment 0 until its first game ends."""

    def __init__(self, environment: VectorEnvironment, recording: Recording):
        self._environment = environment
        self._recording = recording
        self._over = False
        self.num_envs = environment.num_envs
        self.spec = environment.spec

    def reset(self) -> TimeStep:
        timestep = self._environment.reset()
        self._recording.add(self._environment.render)
        return timestep

    def step(self, actions: np.ndarray) -> tuple[TimeStep, StepInfo]:
        timestep, info = self._environment.step(actions)
        if not self._over:
            self._recording.add(self._environment.render)
            self._over = bool(info.episode_ended[0])
        return timestep, info

    def get_state(self) -> bytes:
        return self._environment.get_state()

    def set_state(self, state: bytes) -> None:
        self._environment.set_state(state)

    def render(self) -> np.ndarray:
        return self._environment.render()

    def close(self) -> None:
        self._environment.close()

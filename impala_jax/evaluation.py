"""Playing whole games with the training's own unroll code, and scoring them."""

from __future__ import annotations

import dataclasses
import logging
import math
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from impala_jax import allocator, checkpoint, compilation_cache, environments
from impala_jax.actor import Actor
from impala_jax.agent import Agent
from impala_jax.config import Config, ConfigError, EnvironmentConfig, EvaluatorConfig, closest
from impala_jax.environments import VectorEnvironment, suites
from impala_jax.scores import Estimate, suite_scores
from impala_jax.types import FIRST, Closed, PyTree, StepInfo, TimeStep
from impala_jax.video import Recording, VideoError, check_video

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
        self._configs = {task: suites.task_config(config, task) for task in suites.tasks(config)}
        self._task = next(iter(self._configs))  # The one that there are environments of
        self._max_episode_steps = max_episode_steps
        self._timeout_s = timeout_s
        self._closed = closed
        environment = self._make(self._task, seed)
        self.recording: Recording | None = None
        if record:
            repeat = config.frames_per_step
            self.recording = Recording(environment.spec.render_fps or (60 / repeat if repeat > 1 else 5))
            environment = _Recorder(environment, self.recording)
        self._actor = Actor(agent, environment, _UNROLL_LENGTH, seed, greedy=greedy)
        self._seed = seed

    def play(self, version: int, params: PyTree) -> Evaluation:
        """Plays `episodes` games of each task from their start.

        Raises:
          Closed: the evaluator was closed.
        """
        self._seed += 1
        scores = {task: self._play_task(task, version, params) for task in self._configs}
        if len(scores) == 1:
            return scores[self._task]
        return Evaluation(
            [value for score in scores.values() for value in score.returns],
            scores,
            sum(score.num_truncated for score in scores.values()),
        )

    def _make(self, task: str, seed: int) -> VectorEnvironment:
        return environments.make(
            self._configs[task],
            len(self._quota),
            seed,
            evaluation=True,
            timeout_s=self._timeout_s,
            max_episode_steps=self._max_episode_steps,
            closed=self._closed,
        )

    def _play_task(self, task: str, version: int, params: PyTree) -> Evaluation:
        if task != self._task:
            self._actor.environment.close()
            # Into the same actor, whose compiled step fits all tasks.
            self._actor.environment = self._make(task, self._seed)
            self._task = task
        # From a reset, so that no game half played with older parameters is counted.
        self._actor.reset(self._seed)
        returns: list[list[float]] = [[] for _ in self._quota]
        num_truncated = num_at_limit = 0
        num_steps = np.zeros(len(self._quota), np.int64)  # in each environment's game
        while any(len(r) < quota for r, quota in zip(returns, self._quota, strict=True)):
            if self._closed():
                raise Closed
            trajectory = self._actor.unroll(version, params)
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
        self._actor.environment.close()


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


def evaluate(
    workdir: str | Path,
    *,
    suite: str | None = None,
    episodes: int = 100,
    num_envs: int = 16,
    greedy: bool = False,
    seed: int = 1_000_003,
    video: str | Path | None = None,
    max_episode_steps: int | None = None,
    timeout_s: float | None = None,
) -> dict[str, Any]:
    """Plays whole games with the newest checkpoint of a run.

    Args:
      workdir: of the run.
      suite: `atari57`, `dmlab30` or `minisuite`: play each of its tasks, whatever the run was trained on; None: that.
      episodes: games to play, of each task of a suite.
      num_envs: games played together.
      greedy: play the most likely action instead of sampling.
      seed: of games and actions.
      video: an mp4 or gif file for one game.
      max_episode_steps: Agent steps after which a game is truncated; None for the run's `evaluator.max_episode_steps`.
      timeout_s: Longest wait for an environment, s; None for the run's own.

    Returns:
      What `launch/evaluate.py --json` writes: `episodes`, `mean_return`, `median_return`, `stderr`, `min_return`,
      `max_return`, `human_normalised` (percent) and its `human_normalised_interval` (95 %, bootstrap), both None where
      unknown; `truncated_episodes`, those that a limit of steps ended; `checkpoint_step`, `frames`, `environment`,
      `greedy`, `seed`. Of a suite also `tasks`, by name the first eight of these, and `aggregates`, by name as in
      `impala_jax.scores` a `value` and an `interval`.

    Raises:
      ConfigError: a video that cannot be written, an unknown suite, or one that the run's agent cannot play.
      CheckpointError: the run has no checkpoint, or one whose parameters do not fit the environment as it is now.
      VideoError: the games were played, but there is no video; the error has the scores.
    """
    if video is not None:
        check_video(Path(video))
    scores, recording = play(
        workdir,
        suite=suite,
        episodes=episodes,
        num_envs=num_envs,
        greedy=greedy,
        seed=seed,
        record=video is not None,
        max_episode_steps=max_episode_steps,
        timeout_s=timeout_s,
    )
    if video is not None and recording is not None:
        try:
            recording.write(Path(video))
        except VideoError as error:
            error.scores = scores
            raise
    return scores


def play(
    workdir: str | Path,
    *,
    suite: str | None,
    episodes: int,
    num_envs: int,
    greedy: bool,
    seed: int,
    record: bool,
    max_episode_steps: int | None,
    timeout_s: float | None,
) -> tuple[dict[str, Any], Recording | None]:
    """As `evaluate`: the scores, and the pictures of one game if wanted."""
    config = checkpoint.load_config(Path(workdir))
    allocator.keep_memory()
    compilation_cache.keep_programs()
    timeout_s = config.timeout_s if timeout_s is None else timeout_s
    agent = Agent(config.network, environments.spec(config.environment, timeout_s), config.popart.enabled)
    params = jax.eval_shape(lambda: agent.init(jax.random.PRNGKey(0)))
    saved = checkpoint.restore(Path(workdir), {'learner': {'params': params}})
    environment = config.environment
    if suite is not None and suite != environment.name:
        environment = _suite(suite, environment, agent, timeout_s)
    evaluator = Evaluator(
        agent,
        environment,
        episodes=episodes,
        num_envs=num_envs,
        seed=seed,
        greedy=greedy,
        record=record,
        max_episode_steps=max_episode_steps or config.evaluator.max_episode_steps,
        timeout_s=timeout_s,
    )
    try:
        evaluation = evaluator.play(saved.step, saved.state['learner']['params'])
    finally:
        evaluator.close()
    tasks = evaluation.tasks or {environment.name: evaluation}
    scored = suite_scores({task: scores.returns for task, scores in tasks.items()})
    of_suite = {}
    if evaluation.tasks:
        of_suite['tasks'] = {task: _scores(scores, scored.tasks[task]) for task, scores in tasks.items()}
        of_suite['aggregates'] = {name: estimate._asdict() for name, estimate in scored.aggregates.items()}
    scores = {
        **_scores(evaluation, scored.tasks.get(environment.name)),
        **of_suite,
        'truncated_episodes': evaluation.num_truncated,
        'checkpoint_step': saved.step,
        'frames': saved.step * config.frames_per_update,
        'environment': environment.name,
        'greedy': greedy,
        'seed': seed,
    }
    return scores, evaluator.recording


def _suite(suite: str, environment: EnvironmentConfig, agent: Agent, timeout_s: float) -> EnvironmentConfig:
    """The suite in place of the environment that the agent was trained on, if it can play it."""
    if suite not in suites.SUITES:
        raise ConfigError(f'unknown suite {suite!r}; {closest(suite, suites.SUITES)}')
    config = dataclasses.replace(environment, name=suite)
    suites.common_spec(suite, {environment.name: agent.spec, suite: environments.spec(config, timeout_s)})
    return config


def _scores(evaluation: Evaluation, normalised: Estimate | None) -> dict[str, Any]:
    return {
        'episodes': len(evaluation.returns),
        'mean_return': evaluation.mean,
        'median_return': evaluation.median,
        'stderr': evaluation.stderr,
        'min_return': min(evaluation.returns),
        'max_return': max(evaluation.returns),
        'human_normalised': None if normalised is None else normalised.value,
        'human_normalised_interval': None if normalised is None else normalised.interval,
    }

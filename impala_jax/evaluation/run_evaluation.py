"""Evaluation of the newest checkpoint of a run, on its own task or on a suite."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from impala_jax import environments
from impala_jax.agent import Agent
from impala_jax.build import make_agent
from impala_jax.config import ConfigError, EnvironmentConfig, closest
from impala_jax.environments import suites
from impala_jax.evaluation.evaluator import Evaluation, Evaluator
from impala_jax.evaluation.scores import Estimate, suite_scores
from impala_jax.evaluation.video import Recording, VideoError, check_video
from impala_jax.kernels import allocator, compilation_cache
from impala_jax.rundir import checkpoint


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
    partial: str | Path | None = None,
    configure_process: bool = True,
) -> dict[str, Any]:
    """Plays whole games with the newest checkpoint of a run.

    Args:
      workdir: Folder of the run.
      suite: Suite to play, `atari57`, `dmlab30` or `minisuite`; None for the environment that the run was trained on.
      episodes: Number of games to play; for a suite, of each task.
      num_envs: Number of games played at the same time.
      greedy: Whether to take the most likely action instead of sampling.
      seed: Seed for games and actions.
      video: An mp4 or gif file for a video of one game.
      max_episode_steps: Number of agent steps after which a game is truncated; None for the run's
        `evaluator.max_episode_steps`.
      timeout_s: Longest wait for an environment, in seconds; None for the run's own setting.
      partial: File for the scores of a suite's tasks as they are played, see `Evaluator.play`. The same call resumes
        from it. The file is removed at the end.
      configure_process: Whether to change the allocator and the compilation cache of this process; see `run`.

    Returns:
      The scores that `launch/evaluate.py --json` writes: `episodes`, `mean_return`, `median_return`, `stderr`,
      `min_return`, `max_return`, `human_normalised` (percent) and its `human_normalised_interval` (95 %, bootstrap),
      both None if unknown; `truncated_episodes`, which a step limit ended; `checkpoint_step`, `frames`, `environment`,
      `greedy` and `seed`. For a suite also `tasks`, with the first eight of these by task, and `aggregates`, with a
      `value` and an `interval` by the names in `impala_jax.evaluation.scores`.

    Raises:
      ConfigError: The video cannot be written, the suite is unknown, or the run's agent cannot play it.
      CheckpointError: The run has no checkpoint, or its parameters do not fit the environment in its current form.
      TaskFailed: A task of a suite cannot be played; with `partial` the other tasks have been played and saved.
      VideoError: The games were played, but the video could not be written; the error has the scores.
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
        partial=None if partial is None else Path(partial),
        configure_process=configure_process,
    )
    if partial is not None:
        Path(partial).unlink(missing_ok=True)
    if video is not None and recording is not None:
        _write_video(recording, Path(video), scores)
    return scores


def _write_video(recording: Recording, path: Path, scores: dict[str, Any]) -> None:
    """Writes the video; a VideoError carries the scores, so that the games need not be played again."""
    try:
        recording.write(path)
    except VideoError as error:
        error.scores = scores
        raise


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
    partial: Path | None = None,
    configure_process: bool = True,
    report: Callable[[str], None] = lambda _: None,
) -> tuple[dict[str, Any], Recording | None]:
    """Plays as `evaluate` does, and returns the scores and the recording; the caller removes `partial`."""
    config = checkpoint.load_config(Path(workdir))
    if configure_process:
        allocator.configure_allocator()
        compilation_cache.enable_cache()
    timeout_s = config.timeout_s if timeout_s is None else timeout_s
    agent = make_agent(config.network, environments.spec(config.environment, timeout_s), config.popart.enabled)
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
        evaluation = evaluator.play(saved.step, saved.state['learner']['params'], partial=partial, report=report)
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
    """Returns the configuration of a suite after checking that the agent can play it."""
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

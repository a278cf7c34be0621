"""Comparison of agents by their scores over runs and tasks of a suite (Agarwal et al., 2021)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from impala_jax.config import ConfigError
from impala_jax.evaluation.scores import estimate_text
from impala_jax.studies.plotting.bars import require_suite
from impala_jax.studies.plotting.figures import add_caption, add_legend, finish_axes, new_figure, palette
from impala_jax.studies.plotting.labels import escape, label_of
from impala_jax.studies.plotting.tables import few_seeds_text
from impala_jax.studies.plotting.text_tables import aligned
from impala_jax.studies.statistics import (
    interquartile_mean,
    optimality_gap,
    performance_profile,
    probability_of_improvement,
    stratified_interval,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NUM_RESAMPLES = 2_000
_THRESHOLDS = 300  # largest number of thresholds of a profile


class _Suite(NamedTuple):
    environment: str
    tasks: list[str]
    human: bool  # whether the scores are human-normalised, in percent; otherwise they are mean returns
    scores: dict[str, np.ndarray]  # [runs, tasks], by agent


def profile(agents: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Draws performance profiles: the fraction of runs and tasks with a higher score than each threshold, by agent.

    Bands are 95 % stratified bootstrap intervals over runs. An agent with a single run has no band. Scores are
    human-normalised if human scores are known for all tasks, and otherwise mean returns.

    Args:
      agents: Results of `impala_jax.evaluate` on a suite, or the content of their JSON files, one per run, by the name
        of the agent.

    Returns:
      The figure.

    Raises:
      ConfigError: A result is not from a suite, or the results are not of the same suite and tasks.
    """
    suite = _read(agents)
    everything = np.concatenate([scores.ravel() for scores in suite.scores.values()])
    thresholds = np.unique(everything)
    if len(thresholds) > _THRESHOLDS:
        thresholds = np.quantile(thresholds, np.linspace(0, 1, _THRESHOLDS))
    # The first threshold is below all scores, where each profile is 1.
    margin = 1.0 if suite.human else 0.02 * (np.ptp(everything) or 1.0)
    thresholds = np.concatenate([[everything.min() - margin], thresholds])

    figure, (axes,) = new_figure(1)
    styles = dict(zip(suite.scores, palette(len(suite.scores)), strict=True))
    for name, scores in suite.scores.items():
        low, high = _interval(lambda drawn: performance_profile(drawn, thresholds), scores)
        # A profile is constant between scores.
        axes.step(thresholds, performance_profile(scores, thresholds), where='post', label=name, **styles[name])
        axes.fill_between(thresholds, low, high, step='post', color=styles[name]['color'], alpha=0.2, linewidth=0)
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=escape(name), **style) for name, style in styles.items()]
    if suite.human:
        handles.append(axes.axvline(100, color='0.3', linewidth=1.0, linestyle='--', label='human'))
        if everything.max() > 1000:
            axes.set_xscale('symlog', linthresh=100)
    axes.set_ylim(-0.02, 1.02)
    score = 'human-normalised score (%)' if suite.human else label_of('episode_return')
    title = f'{suite.environment}, {len(suite.tasks)} tasks'
    finish_axes(axes, score, 'fraction of runs and tasks above', escape(title))
    add_legend(figure, handles)
    add_caption(figure, few_seeds_text([len(scores) for scores in suite.scores.values()]))
    return figure


def profile_table(agents: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Formats aggregates over runs and tasks, with 95 % stratified bootstrap intervals over runs, one row per agent.

    The columns are the interquartile mean; the median and the mean over tasks of the mean over runs; the optimality gap
    at 100 %, if scores are human-normalised; and the probability of improvement over the first agent.

    Args:
      agents: As for `profile`.

    Returns:
      The table.

    Raises:
      ConfigError: As for `profile`.
    """
    suite = _read(agents)
    aggregates: dict[str, Callable[..., Any]] = {
        'interquartile mean': interquartile_mean,
        'median': lambda scores: np.median(scores.mean(axis=0)),
        'mean': np.mean,
    }
    if suite.human:
        aggregates['optimality gap'] = lambda scores: optimality_gap(scores, target=100.0)
    first, *others = suite.scores
    header = ['agent', 'runs', *aggregates, *([f'P(better than {first})'] if others else [])]
    body = []
    for name, scores in suite.scores.items():
        row = [name, str(len(scores))]
        row += [_text(function, scores, decimals=1 if suite.human else 2) for function in aggregates.values()]
        if others:
            better = _text(probability_of_improvement, scores, suite.scores[first], decimals=2)
            row.append('' if name == first else better)
        body.append(row)
    unit = 'human-normalised scores in percent' if suite.human else 'mean returns'
    caption = f'{suite.environment}, {len(suite.tasks)} tasks, {unit} [95 % bootstrap interval over runs]'
    few = few_seeds_text([len(scores) for scores in suite.scores.values()])
    return f'{aligned([header], body, markdown=False)}\n\n{"; ".join(filter(None, [caption, few]))}\n'


def _text(function: Callable[..., Any], *scores: np.ndarray, decimals: int) -> str:
    low, high = _interval(function, *scores)
    return estimate_text(float(function(*scores)), None if np.isnan(low) else (float(low), float(high)), decimals)


def _interval(function: Callable[..., Any], *scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return stratified_interval(function, *scores, num_resamples=_NUM_RESAMPLES)


def _read(agents: Mapping[str, Sequence[Mapping[str, Any]]]) -> _Suite:
    first = None
    for name, results in agents.items():
        for result in results:
            require_suite(result)
            first = first or result
            if result['environment'] != first['environment'] or result['tasks'].keys() != first['tasks'].keys():
                raise ConfigError(
                    f'{name} was scored on {len(result["tasks"])} tasks of {result["environment"]}, and another run on '
                    f'{len(first["tasks"])} of {first["environment"]}; compare scores on the same tasks'
                )
    if first is None or not all(agents.values()):
        raise ConfigError('there are no scores to compare: give each agent the files of its runs')
    tasks = list(first['tasks'])
    human = all(scores['human_normalised'] is not None for scores in first['tasks'].values())
    key = 'human_normalised' if human else 'mean_return'
    scores = {
        name: np.array([[result['tasks'][task][key] for task in tasks] for result in results], np.float64)
        for name, results in agents.items()
    }
    return _Suite(first['environment'], tasks, human, scores)

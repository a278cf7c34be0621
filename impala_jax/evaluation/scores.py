"""Scores of suites as the paper gives them: human-normalised, aggregated over tasks, with bootstrap intervals.

A score s is normalised as 100 (s - random) / (human - random), in percent. The paper's headlines are the median over
Atari-57's games (section 5.3.3), and over DMLab-30's test levels the mean of scores that are capped at 100 (section
5.3.1). The reference scores, and where they are from, are in `impala_jax.data`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.markup import escape
from rich.table import Table

from impala_jax import data

AGGREGATES = {'median': 'median', 'capped_mean': 'mean capped at 100', 'mean': 'mean'}
"""What is computed of the human-normalised scores of a suite's tasks -> how tables and figures call it."""


class Reference(NamedTuple):
    """Scores to normalise with."""

    random: float
    human: float


class Estimate(NamedTuple):
    """A number, and its bootstrap interval; None for a single episode, which tells nothing of its spread."""

    value: float
    interval: tuple[float, float] | None


class SuiteScores(NamedTuple):
    """Human-normalised scores, in percent."""

    tasks: dict[str, Estimate | None]  # None where no human score is known
    aggregates: dict[
        str, Estimate
    ]  # those of AGGREGATES; without human scores `mean_return`, of the tasks' mean returns


class PaperAgent(NamedTuple):
    """An agent of the paper's tables C.1 and B.1."""

    label: str
    scores: dict[str, float]  # human-normalised; by a task's `_key`

    def score(self, task: str) -> float:
        """Its human-normalised score on a task of the suite, in percent."""
        return self.scores[_key(task)]


_ATARI57 = {
    'impala_deep_multitask': 'deep multi-task (paper)',
    'impala_deep_expert': 'deep experts (paper)',
    'impala_shallow_expert': 'shallow experts (paper)',
}
_DMLAB30 = {
    'impala_deep_pbt': 'deep multi-task, PBT (paper)',
    'impala_experts': 'deep experts (paper)',
}


def reference(task: str) -> Reference | None:
    """The reference scores of a game (`atari/space_invaders`) or a level (`dmlab/rooms_watermaze`), or None.

    A level that is held out for tests has those of its training level.
    """
    return _references().get(_key(task))


def human_normalised(task: str, score: float) -> float | None:
    """100 (score - random) / (human - random), in percent; None where no human score is known."""
    known = reference(task)
    return None if known is None else float(_normalise(known, score))


def aggregate(normalised: Any) -> dict[str, Any]:
    """AGGREGATES of human-normalised scores [..., tasks], each [...]."""
    normalised = np.asarray(normalised, np.float64)
    return {
        'median': np.median(normalised, axis=-1),
        'capped_mean': np.minimum(normalised, 100.0).mean(axis=-1),
        'mean': normalised.mean(axis=-1),
    }


def suite_scores(
    returns: Mapping[str, Sequence[float]], *, confidence: float = 0.95, num_resamples: int = 2_000, seed: int = 0
) -> SuiteScores:
    """Scores the episodes of a suite, or of a part of it.

    Intervals are percentile bootstrap intervals (Efron, 1979), stratified: each resample draws as many episodes of each
    task as it has. They say how well these parameters are known, not how other seeds would have trained.

    Args:
      returns: of each task, the raw returns of its episodes.
      confidence: the share of the resamples between the limits.
      num_resamples: how often episodes are drawn.
      seed: the same seed draws the same.
    Raises:
      ValueError: no tasks, or a task without episodes.
    """
    if not returns:
        raise ValueError('there are no tasks to score')
    rng = np.random.default_rng(seed)
    resamples = np.stack([resampled_means(values, num_resamples, rng) for values in returns.values()], -1)  # [R, tasks]
    means = np.array([np.mean(values) for values in returns.values()])  # [tasks]
    spread = np.array([len(values) > 1 for values in returns.values()])  # Does a task's interval mean anything?
    known = [reference(task) for task in returns]

    def estimate(value: Any, resampled: np.ndarray, meaningful: Any) -> Estimate:
        low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
        return Estimate(float(value), (float(low), float(high)) if meaningful else None)

    tasks: dict[str, Estimate | None] = dict.fromkeys(returns)
    for i, (task, scores) in enumerate(zip(returns, known, strict=True)):
        if scores is not None:
            means[i], resamples[:, i] = _normalise(scores, means[i]), _normalise(scores, resamples[:, i])
            tasks[task] = estimate(means[i], resamples[:, i], spread[i])
    if None not in known:
        values, resampled = aggregate(means), aggregate(resamples)
    elif any(known):
        return SuiteScores(tasks, {})  # Raw and normalised scores have no mean.
    else:
        values, resampled = {'mean_return': means.mean()}, {'mean_return': resamples.mean(axis=-1)}
    return SuiteScores(tasks, {name: estimate(values[name], resampled[name], spread.all()) for name in values})


def resampled_means(
    values: Any, num_resamples: int, rng: np.random.Generator, strata: Sequence[Any] | None = None
) -> np.ndarray:
    """Means of N values drawn with replacement: [N, ...] -> [num_resamples, ...]; the same draws for all other axes.

    Args:
      values: [N, ...].
      num_resamples: how often N values are drawn.
      rng: what draws.
      strata: [N], of which each value is: as many values are drawn of each stratum as it has. None: a single one.
    Raises:
      ValueError: no values.
    """
    values = np.asarray(values, np.float64)
    if values.ndim == 0 or len(values) == 0:
        raise ValueError(f'values must be an array [N, ...] with N > 0, got shape {values.shape}')
    members: dict[Any, list[int]] = {}
    for i, stratum in enumerate([None] * len(values) if strata is None else strata):
        members.setdefault(stratum, []).append(i)
    # How often each value was drawn is all that a resample's mean depends on.
    counts = np.zeros([num_resamples, len(values)])
    for own in members.values():
        counts[:, own] = rng.multinomial(len(own), [1 / len(own)] * len(own), num_resamples)
    return np.tensordot(counts / len(values), values, axes=1)


@functools.cache
def paper_agents(suite: str) -> tuple[PaperAgent, ...]:
    """The paper's agents on `atari57` (table C.1) and `dmlab30` (table B.1, test levels); () for other suites."""
    if suite == 'atari57':
        rows = data.rows('impala_table_c1.csv')
        names, labels = ['atari/' + row['game'] for row in rows], _ATARI57
    elif suite == 'dmlab30':
        rows, levels = data.rows('dmlab30_table_b1.csv'), data.rows('dmlab30_scores.csv')
        # By their order: as printed, the table exchanges some of lasertag's names, as its human scores show.
        names, labels = ['dmlab/' + level['level_train'] for level in levels], _DMLAB30
    else:
        return ()
    references = [_references()[_key(name)] for name in names]
    return tuple(
        PaperAgent(
            label,
            {
                _key(name): float(_normalise(known, float(row[column])))
                for name, known, row in zip(names, references, rows, strict=True)
            },
        )
        for column, label in labels.items()
    )


def table(result: Mapping[str, Any]) -> Table:
    """A table for the terminal: a row a task, the aggregates below, and the paper's multi-task agent beside them.

    Args:
      result: of `impala_jax.evaluate` on a suite, or what its JSON file holds.
    """
    tasks, suite = result['tasks'], result['environment']
    agents = paper_agents(suite)[:1]
    normalised = any(scores['human_normalised'] is not None for scores in tasks.values())
    text = Table(title=f'{suite}, {result["episodes"]:,} episodes at {result["frames"]:,} frames', title_justify='left')
    text.add_column('task', overflow='fold')
    text.add_column('mean return', justify='right')
    if normalised:
        text.add_column('human-normalised %\n[95 % interval]', justify='right')
    for agent in agents:
        text.add_column(escape(agent.label), justify='right', max_width=16)
    for task, scores in tasks.items():
        cells = [f'{scores["mean_return"]:.2f}' + ('' if normalised else f' ± {scores["stderr"]:.2f}')]
        if normalised:
            cells.append(escape(estimate_text(scores['human_normalised'], scores['human_normalised_interval'])))
        text.add_row(escape(task_label(task)), *cells, *(f'{agent.score(task):.1f}' for agent in agents))
    text.add_section()
    of_agents = [aggregate([agent.score(task) for task in tasks]) for agent in agents]
    for name, scores in result['aggregates'].items():
        value = escape(estimate_text(scores['value'], scores['interval'], decimals=1 if normalised else 2))
        cells = ['', value] if normalised else [value]
        text.add_row(AGGREGATES.get(name, 'mean'), *cells, *(f'{values[name]:.1f}' for values in of_agents))
    return text


def estimate_text(value: float | None, interval: Sequence[float] | None, decimals: int = 1) -> str:
    """`46.5 [45.1, 47.9]`, without an interval `46.5`, and `-` for what is not known."""
    if value is None:
        return '-'
    numbers = [f'{round(number, decimals) + 0.0:.{decimals}f}' for number in (value, *(interval or ()))]  # no -0.0
    return numbers[0] if interval is None else f'{numbers[0]} [{numbers[1]}, {numbers[2]}]'


def task_label(task: str) -> str:
    """A task's name within its suite; of a level that is held out for tests the one that evaluation plays."""
    name = task.partition('/')[2]
    return data.dmlab30_levels().get(name, name) if task.startswith('dmlab/') else name


def _normalise(known: Reference, score: Any) -> Any:
    return 100 * (np.asarray(score, np.float64) - known.random) / (known.human - known.random)


@functools.cache
def _references() -> dict[str, Reference]:
    """By a task's `_key`."""
    found = {}
    for row in data.rows('atari57_scores.csv'):
        found[_key('atari/' + row['game'])] = Reference(float(row['random']), float(row['human']))
    for row in data.rows('dmlab30_scores.csv'):
        for level in (row['level_train'], row['level_test']):
            found[_key('dmlab/' + level)] = Reference(float(row['random']), float(row['human']))
    return found


def _key(task: str) -> str:
    """A task's name without what writers differ in: case, and underscores."""
    return re.sub('[^a-z0-9/]', '', task.lower())

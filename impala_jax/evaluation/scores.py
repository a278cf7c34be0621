"""Human-normalised scores of suites as in the paper, aggregated over tasks, with bootstrap intervals.

A score s is normalised as 100 (s - random) / (human - random), in percent. The paper's headline figures are the median
over the Atari-57 games (section 5.3.3), and the mean over the DMLab-30 test levels of scores capped at 100 (section
5.3.1). `impala_jax.data` has the reference scores and their sources.
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
"""Statistics of the human-normalised scores of a suite's tasks, and their names in tables and figures."""


class Reference(NamedTuple):
    """Scores for normalisation."""

    random: float
    human: float


class Estimate(NamedTuple):
    """A number and its bootstrap interval, which is None for a single episode."""

    value: float
    interval: tuple[float, float] | None


class SuiteScores(NamedTuple):
    """Human-normalised scores, in percent."""

    tasks: dict[str, Estimate | None]  # None if no human score is known
    # By the names in AGGREGATES; without human scores, `mean_return` is the mean of the tasks' mean returns.
    aggregates: dict[str, Estimate]


class PaperAgent(NamedTuple):
    """An agent from the paper's tables C.1 and B.1."""

    label: str
    scores: dict[str, float]  # human-normalised, in percent; by a task's `_key`

    def score(self, task: str) -> float:
        """Returns the agent's human-normalised score on a task of the suite, in percent."""
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
    """Returns the reference scores of a game (`atari/space_invaders`) or a level (`dmlab/rooms_watermaze`).

    A held-out test level has the scores of its training level. The result is None for other tasks.
    """
    return _references().get(_key(task))


def human_normalised(task: str, score: float) -> float | None:
    """Returns 100 (score - random) / (human - random), in percent; None if no human score is known."""
    known = reference(task)
    return None if known is None else float(_normalise(known, score))


def aggregate(normalised: Any) -> dict[str, Any]:
    """Computes the AGGREGATES of human-normalised scores, [..., tasks]; each has shape [...]."""
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

    The intervals are percentile bootstrap intervals (Efron, 1979), stratified by task: each resample has as many
    episodes of each task as the data. They measure the uncertainty of these parameters' scores, not the variation
    between training runs with different seeds.

    Args:
      returns: Unclipped returns of the episodes of each task.
      confidence: Confidence level of the intervals, in (0, 1).
      num_resamples: Number of bootstrap resamples.
      seed: Seed for the resampling.

    Returns:
      Estimates for the tasks and the aggregates.

    Raises:
      ValueError: There are no tasks, or a task has no episodes.
    """
    if not returns:
        raise ValueError('there are no tasks to score')
    rng = np.random.default_rng(seed)
    resamples = np.stack([resampled_means(values, num_resamples, rng) for values in returns.values()], -1)  # [R, tasks]
    means = np.array([np.mean(values) for values in returns.values()])  # [tasks]
    spread = np.array([len(values) > 1 for values in returns.values()])  # whether a task's interval is meaningful
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
        return SuiteScores(tasks, {})  # Raw and normalised scores cannot be averaged together.
    else:
        values, resampled = {'mean_return': means.mean()}, {'mean_return': resamples.mean(axis=-1)}
    return SuiteScores(tasks, {name: estimate(values[name], resampled[name], spread.all()) for name in values})


def resampled_means(
    values: Any, num_resamples: int, rng: np.random.Generator, strata: Sequence[Any] | None = None
) -> np.ndarray:
    """Computes means of N values drawn with replacement, with the same draws for all trailing axes.

    Args:
      values: Values to draw from, [N, ...].
      num_resamples: Number of resamples.
      rng: Random generator.
      strata: Stratum of each value, [N]; each resample has as many values of a stratum as the data. None for a single
        stratum.

    Returns:
      Means of the resamples, [num_resamples, ...].

    Raises:
      ValueError: There are no values.
    """
    # The mean of a resample depends only on how often each value was drawn.
    counts = resample_counts(values, num_resamples, rng, strata)
    return np.tensordot(counts / len(values), np.asarray(values, np.float64), axes=1)


def resample_counts(
    values: Any, num_resamples: int, rng: np.random.Generator, strata: Sequence[Any] | None = None
) -> np.ndarray:
    """Draws N of N values with replacement; the arguments are those of `resampled_means`.

    Returns:
      How often each value was drawn, [num_resamples, N] int64.

    Raises:
      ValueError: There are no values.
    """
    shape = np.shape(values)
    if not shape or not shape[0]:
        raise ValueError(f'values must be an array [N, ...] with N > 0, got shape {shape}')
    members: dict[Any, list[int]] = {}
    for i, stratum in enumerate([None] * shape[0] if strata is None else strata):
        members.setdefault(stratum, []).append(i)
    counts = np.zeros([num_resamples, shape[0]], np.int64)
    for own in members.values():
        counts[:, own] = rng.multinomial(len(own), [1 / len(own)] * len(own), num_resamples)
    return counts


@functools.cache
def paper_agents(suite: str) -> tuple[PaperAgent, ...]:
    """Returns the paper's agents on `atari57` (table C.1) and `dmlab30` (table B.1, test levels); else ()."""
    if suite == 'atari57':
        rows = data.rows('impala_table_c1.csv')
        names, labels = ['atari/' + row['game'] for row in rows], _ATARI57
    elif suite == 'dmlab30':
        rows, levels = data.rows('dmlab30_table_b1.csv'), data.rows('dmlab30_scores.csv')
        # Matched by row, not by name: as its human scores show, the printed table swaps some of lasertag's names.
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
    """Formats the scores of a suite as a table for the terminal.

    There is one row per task, followed by the aggregates, and a column for the paper's multi-task agent.

    Args:
      result: Result of `impala_jax.evaluate` on a suite, or the content of its JSON file.
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
    """Formats an estimate as `46.5 [45.1, 47.9]`, as `46.5` without an interval, and as `-` if it is None."""
    if value is None:
        return '-'
    numbers = [f'{round(number, decimals) + 0.0:.{decimals}f}' for number in (value, *(interval or ()))]  # avoids -0.0
    return numbers[0] if interval is None else f'{numbers[0]} [{numbers[1]}, {numbers[2]}]'


def task_label(task: str) -> str:
    """Returns a task's name within its suite; for a level of DMLab-30, the name of the level that evaluation plays."""
    name = task.partition('/')[2]
    return data.dmlab30_levels().get(name, name) if task.startswith('dmlab/') else name


def _normalise(known: Reference, score: Any) -> Any:
    return 100 * (np.asarray(score, np.float64) - known.random) / (known.human - known.random)


@functools.cache
def _references() -> dict[str, Reference]:
    """Returns the reference scores by a task's `_key`."""
    found = {}
    for row in data.rows('atari57_scores.csv'):
        found[_key('atari/' + row['game'])] = Reference(float(row['random']), float(row['human']))
    for row in data.rows('dmlab30_scores.csv'):
        for level in (row['level_train'], row['level_test']):
            found[_key('dmlab/' + level)] = Reference(float(row['random']), float(row['human']))
    return found


def _key(task: str) -> str:
    """Returns a task's name without underscores and in lower case, because spellings vary."""
    return re.sub('[^a-z0-9/]', '', task.lower())

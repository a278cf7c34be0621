"""Statistics of scores over runs and tasks, with confidence intervals (Agarwal et al., 2021).

Few runs per task are the rule in deep reinforcement learning. These statistics and intervals are those that "Deep
Reinforcement Learning at the Edge of the Statistical Precipice" recommends for them, and equal those of its library
rliable, except that a single run has no interval.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from impala_jax.evaluation.scores import resample_counts, resampled_means

__all__ = [
    'bootstrap_interval',
    'interquartile_mean',
    'optimality_gap',
    'performance_profile',
    'probability_of_improvement',
    'stratified_interval',
]

_CHUNK = 4_000_000  # largest number of resampled values that are in memory at once


def interquartile_mean(values: Any, axis: int | tuple[int, ...] | None = None) -> Any:
    """Computes the mean of the values without the lowest and the highest quarter (Agarwal et al., 2021, section 4.3).

    Of N values, floor(N / 4) are cut at each end, as by `scipy.stats.trim_mean`. With fewer than four values it is the
    mean.

    Args:
      values: Values, of any shape, such as scores [runs, tasks].
      axis: Axes to aggregate over; None for all, as for an aggregate over runs and tasks.

    Returns:
      The shape of `values` without `axis`, float64.

    Raises:
      ValueError: There are no values, or one is NaN.
    """
    values = _known(values)
    kept = np.sort(_flatten(values, axis), axis=-1)
    cut = kept.shape[-1] // 4
    return kept[..., cut : kept.shape[-1] - cut].mean(axis=-1)


def optimality_gap(values: Any, target: float = 1.0, axis: int | tuple[int, ...] | None = None) -> Any:
    """Computes the mean amount by which values fall short of a target (Agarwal et al., 2021, section 4.3).

    Args:
      values: Values, of any shape, such as scores [runs, tasks]; lower than `target` is worse.
      target: Score beyond which an improvement does not count: 1.0 for human-normalised scores, and 100.0 if they are
        in percent.
      axis: Axes to aggregate over; None for all.

    Returns:
      The shape of `values` without `axis`, float64, in [0, inf); lower is better.

    Raises:
      ValueError: There are no values, or one is NaN.
    """
    return target - np.minimum(_known(values), target).mean(axis=axis)


def performance_profile(values: Any, thresholds: Any, axis: int | tuple[int, ...] | None = None) -> np.ndarray:
    """Computes the fraction of values above each threshold (Agarwal et al., 2021, section 4.2, "run-score").

    Args:
      values: Values, of any shape, such as scores [runs, tasks].
      thresholds: Thresholds, [P].
      axis: Axes to aggregate over; None for all.

    Returns:
      The shape of `values` without `axis`, then [P], float64.

    Raises:
      ValueError: There are no values, or one is NaN.
    """
    ordered = np.sort(_flatten(_known(values), axis), axis=-1)
    rows = ordered.reshape(-1, ordered.shape[-1])
    not_above = np.stack([np.searchsorted(row, np.asarray(thresholds, np.float64), side='right') for row in rows])
    return (1 - not_above / ordered.shape[-1]).reshape(*ordered.shape[:-1], -1)


def probability_of_improvement(scores: Any, others: Any) -> float:
    """Computes the probability that a run has a higher score than another agent's run (Agarwal et al., 2021, A.4).

    It is the fraction of pairs of runs on a task in which `scores` is higher, with ties counted half, averaged over
    the tasks. For one task this is the Mann-Whitney U statistic divided by the number of pairs.

    Args:
      scores: Scores of an agent, [runs, tasks].
      others: Scores of the other agent, [other_runs, tasks], with the same tasks.

    Returns:
      The probability, in [0, 1]; 0.5 if the agents are equal.

    Raises:
      ValueError: The shapes do not match, there are no scores, or one is NaN.
    """
    scores, others = _known(scores), _known(others)
    if scores.ndim != 2 or others.ndim != 2 or scores.shape[1] != others.shape[1]:
        raise ValueError(
            f'scores must be [runs, tasks] with the same tasks for both agents, got {scores.shape} and {others.shape}'
        )
    higher = scores[:, None] > others  # [runs, other_runs, tasks]
    return float((higher + 0.5 * (scores[:, None] == others)).mean())


def bootstrap_interval(
    values: Any,
    confidence: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
    strata: Sequence[Any] | None = None,
    statistic: Callable[..., Any] = np.mean,
) -> tuple[np.ndarray, np.ndarray]:
    """Computes the percentile bootstrap interval of a statistic over the first axis (Efron, 1979).

    With few values the interval is too narrow: with five normally distributed values, a 95 % interval of the mean
    contains the true mean in 84 % of cases.

    Args:
      values: Values, [N, ...]; all trailing axes are resampled together.
      confidence: Confidence level of the interval, in (0, 1).
      num_resamples: Number of bootstrap resamples.
      seed: Seed for the resampling.
      strata: Stratum of each value, [N], such as its task, for properties that were chosen and not sampled. Each
        resample has as many values of a stratum as the data, so differences between strata do not count as noise. None
        for a single stratum.
      statistic: Function `statistic(resamples, axis=1)` from [R, N, ...] to [R, ...], such as `interquartile_mean` or
        `numpy.median`. It must not depend on the order of the N values.

    Returns:
      (low, high), each [...] float64; NaN if a stratum has a single value, whose spread is unknown.

    Raises:
      ValueError: There are no values, or `confidence` or `num_resamples` is out of range.
    """
    _check(confidence, num_resamples)
    rng = np.random.default_rng(seed)
    if statistic is np.mean:
        resampled = resampled_means(values, num_resamples, rng, strata)  # needs no copies of the values
    else:
        values = np.asarray(values, np.float64)
        drawn = _drawn(resample_counts(values, num_resamples, rng, strata))
        chunk = max(1, _CHUNK // values.size)
        chunks = [statistic(values[drawn[i : i + chunk]], axis=1) for i in range(0, num_resamples, chunk)]
        resampled = np.concatenate(chunks)
    if min(collections.Counter(strata or [None] * len(values)).values()) == 1:
        return np.full(resampled.shape[1:], np.nan), np.full(resampled.shape[1:], np.nan)
    return _percentiles(resampled, confidence)


def stratified_interval(
    statistic: Callable[..., Any],
    *scores: Any,
    confidence: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Computes the bootstrap interval of a statistic of runs on several tasks (Agarwal et al., 2021, section 4.1).

    It is the stratified percentile bootstrap: the runs of each task and of each agent are resampled separately. The
    draws are those of `bootstrap_interval` with the tasks as strata.

    Args:
      statistic: Function of one array per agent, each [runs, tasks], such as `interquartile_mean` (one agent) or
        `probability_of_improvement` (two agents). It may return an array [...]. It must not depend on the order of the
        runs.
      *scores: Scores of each agent, [runs, tasks].
      confidence: Confidence level of the interval, in (0, 1).
      num_resamples: Number of bootstrap resamples.
      seed: Seed for the resampling.

    Returns:
      (low, high), each [...] float64; NaN if an agent has a single run, whose spread is unknown.

    Raises:
      ValueError: Scores are missing or are not [runs, tasks], or `confidence` or `num_resamples` is out of range.
    """
    _check(confidence, num_resamples)
    rng = np.random.default_rng(seed)
    arrays = [np.asarray(array, np.float64) for array in scores]
    if not arrays or any(array.ndim != 2 or array.size == 0 for array in arrays):
        raise ValueError(f'scores must be [runs, tasks] and not empty, got {[array.shape for array in arrays]}')
    resamples = []  # per agent, [R, runs, tasks]
    for array in arrays:
        runs, tasks = array.shape
        flat = array.T.ravel()
        drawn = _drawn(resample_counts(flat, num_resamples, rng, np.repeat(np.arange(tasks), runs).tolist()))
        resamples.append(flat[drawn].reshape(num_resamples, tasks, runs).swapaxes(1, 2))
    resampled = np.array([statistic(*drawn) for drawn in zip(*resamples, strict=True)])
    if min(len(array) for array in arrays) == 1:
        return np.full(resampled.shape[1:], np.nan), np.full(resampled.shape[1:], np.nan)
    return _percentiles(resampled, confidence)


def _check(confidence: float, num_resamples: int) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f'confidence must lie in (0, 1), got {confidence}')
    if num_resamples < 1:
        raise ValueError(f'num_resamples must be positive, got {num_resamples}')


def _drawn(counts: np.ndarray) -> np.ndarray:
    """Returns the indices of resamples, [R, N] in ascending order, from how often each value was drawn, [R, N]."""
    return np.repeat(np.tile(np.arange(counts.shape[1]), len(counts)), counts.ravel()).reshape(counts.shape)


def _percentiles(resampled: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return low, high


def _known(values: Any) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.size == 0 or np.isnan(values).any():
        raise ValueError(f'values must be numbers and not empty, got shape {values.shape} with NaN or no values')
    return values


def _flatten(values: np.ndarray, axis: int | tuple[int, ...] | None) -> np.ndarray:
    """Moves `axis` to the end and merges them, [..., N]."""
    if axis is None:
        return values.reshape(-1)
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    moved = np.moveaxis(values, axes, range(-len(axes), 0))
    return moved.reshape(*moved.shape[: moved.ndim - len(axes)], -1)

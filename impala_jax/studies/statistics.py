"""Confidence intervals of what a study measures."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np

from impala_jax.evaluation.scores import resampled_means


def bootstrap_interval(
    values: Any,
    confidence: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
    strata: Sequence[Any] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The percentile bootstrap interval of the mean over the first axis (Efron, 1979).

    With few values it is too narrow: of five normal ones, it holds the true mean in 84 % of cases, not in 95 %.

    Args:
      values: [N, ...]; the same N are drawn, with replacement, for all that the other axes hold.
      confidence: the share of the resamples' means between the limits.
      num_resamples: how often N values are drawn.
      seed: the same seed draws the same.
      strata: [N], what of each value was chosen and not sampled, such as its task: as many values are drawn of each
        stratum as it has, so that differences between strata do not count as noise. None: a single one.
    Returns:
      (low, high), each float64 [...]; NaN where a stratum has one value, which tells nothing about its spread.
    Raises:
      ValueError: no values, or a confidence or a number of resamples that cannot be.
    """
    if not 0 < confidence < 1:
        raise ValueError(f'confidence must lie in (0, 1), got {confidence}')
    if num_resamples < 1:
        raise ValueError(f'num_resamples must be positive, got {num_resamples}')
    means = resampled_means(values, num_resamples, np.random.default_rng(seed), strata)
    if min(collections.Counter(strata or [None] * len(values)).values()) == 1:
        return np.full(means.shape[1:], np.nan), np.full(means.shape[1:], np.nan)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return low, high

"""Bootstrap intervals."""

import numpy as np
import pytest

from impala_jax.studies import plotting


def test_bootstrap_of_two_values_is_known():
    """Resamples' means are 0, 1/2 and 1 with probabilities 1/4, 1/2 and 1/4."""
    assert plotting.bootstrap_interval([0.0, 1.0], confidence=0.95) == (0.0, 1.0)
    assert plotting.bootstrap_interval([0.0, 1.0], confidence=0.4) == (0.5, 0.5)
    low, high = plotting.bootstrap_interval([0.0, 1.0], confidence=0.6)
    assert (low, high) == (0.0, 1.0)


def test_bootstrap_is_the_normal_interval_for_many_values():
    values = np.random.RandomState(0).exponential(size=500)
    half = 1.96 * values.std() / np.sqrt(len(values))
    low, high = plotting.bootstrap_interval(values)
    assert low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.05 * half)


def test_bootstrap_takes_any_shape_and_repeats_by_seed():
    values = np.random.RandomState(0).randn(5, 4, 3)
    low, high = plotting.bootstrap_interval(values, num_resamples=500)
    assert low.shape == high.shape == (4, 3) and (low < high).all()
    again = plotting.bootstrap_interval(values[:, 1, 2], num_resamples=500)
    np.testing.assert_allclose(again, (low[1, 2], high[1, 2]))
    other = plotting.bootstrap_interval(values, num_resamples=500, seed=1)
    assert not np.array_equal(other[0], low)


def test_bootstrap_of_one_value_is_no_interval():
    assert np.isnan(plotting.bootstrap_interval([3.0])).all()
    assert np.isnan(plotting.bootstrap_interval([3.0, 1.0, 2.0], strata=['a', 'b', 'b'])).all()


def test_bootstrap_draws_within_strata():
    assert plotting.bootstrap_interval([0.0, 1.0, 0.0, 1.0], strata=list('abab')) == (0.5, 0.5)
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(0, 1, 300), rng.normal(90, 3, 100)])
    half = 1.96 * np.hypot(0.75 * values[:300].std() / np.sqrt(300), 0.25 * values[300:].std() / np.sqrt(100))
    low, high = plotting.bootstrap_interval(values, strata=[0] * 300 + [1] * 100)
    np.testing.assert_allclose([low, high], [values.mean() - half, values.mean() + half], atol=0.05 * half)


@pytest.mark.parametrize(
    'kwargs', [{'values': []}, {'values': 1.0}, {'confidence': 1.0}, {'confidence': 0}, {'num_resamples': 0}]
)
def test_bootstrap_refuses_bad_values(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        plotting.bootstrap_interval(**({'values': [1.0, 2.0]} | kwargs))

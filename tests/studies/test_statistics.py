"""Statistics of runs and tasks, and their bootstrap intervals."""

import json

import numpy as np
import pytest

from impala_jax.studies import plotting, statistics
from impala_jax.studies.statistics import (
    interquartile_mean,
    optimality_gap,
    performance_profile,
    probability_of_improvement,
)
from tests.helpers import rliable_reference


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


def test_the_interval_of_another_statistic_has_the_same_draws():
    values = np.random.RandomState(0).randn(6, 3)
    strata = list('aabbbb')
    settings = {'strata': strata, 'num_resamples': 300}
    mean = statistics.bootstrap_interval(values, **settings)
    same = statistics.bootstrap_interval(values, statistic=lambda drawn, axis: drawn.mean(axis), **settings)
    np.testing.assert_allclose(same, mean, rtol=1e-12)
    iqm = statistics.bootstrap_interval(values, statistic=interquartile_mean, **settings)
    assert not np.allclose(iqm, mean)


def test_intervals_do_not_depend_on_the_chunks(monkeypatch):
    values = np.random.RandomState(0).randn(6, 3)
    one = statistics.bootstrap_interval(values, num_resamples=100, statistic=np.median)
    monkeypatch.setattr(statistics, '_CHUNK', 7 * values.size)
    np.testing.assert_array_equal(statistics.bootstrap_interval(values, num_resamples=100, statistic=np.median), one)


# Statistics of runs and tasks.


def test_a_quarter_is_cut_at_each_end():
    assert interquartile_mean([100.0, 1, 2, -50]) == 1.5
    assert interquartile_mean([5.0, 4, 3, 2, 1, 99, -9]) == 3.0  # floor(7 / 4) = 1 at each end
    assert interquartile_mean([1.0, 2, 6]) == 3.0
    values = np.random.RandomState(0).randn(8, 3)
    np.testing.assert_allclose(interquartile_mean(values, axis=0), np.sort(values, 0)[2:6].mean(0))
    np.testing.assert_allclose(interquartile_mean(values[None], axis=(1, 2)), [interquartile_mean(values)])


def test_what_exceeds_the_target_does_not_fill_the_gap():
    assert optimality_gap([[0.0, 3.0], [1.0, 0.5]]) == 0.375
    assert optimality_gap([50.0, 400.0], target=100.0) == 25.0


def test_a_profile_is_the_fraction_above():
    np.testing.assert_allclose(
        performance_profile([[1.0, 2.0], [2.0, 3.0]], [0, 1, 2, 2.5, 3]), [1, 0.75, 0.25, 0.25, 0]
    )
    values = np.random.RandomState(0).randn(4, 5, 3)
    expected = [[(part > tau).mean() for tau in (-1, 0.5)] for part in values]
    np.testing.assert_allclose(performance_profile(values, [-1, 0.5], axis=(1, 2)), expected)


def test_ties_are_half_an_improvement():
    assert probability_of_improvement([[1.0], [3.0]], [[1.0], [2.0]]) == (0.5 + 0 + 1 + 1) / 4
    # The mean over tasks, not over pairs of all tasks.
    assert probability_of_improvement([[1.0, 0.0]], [[0.0, 0.0], [0.0, 5.0]]) == (1 + 0.25) / 2
    scores = np.random.RandomState(0).randn(5, 3)
    assert probability_of_improvement(scores, scores) == 0.5


def test_the_stratified_interval_is_the_bootstrap_with_tasks_as_strata():
    scores = np.random.RandomState(0).randn(5, 3) + [0, 10, 100]
    tasks = np.repeat(np.arange(3), 5).tolist()
    for statistic in (np.mean, interquartile_mean):
        np.testing.assert_allclose(
            statistics.stratified_interval(statistic, scores, num_resamples=200),
            statistics.bootstrap_interval(scores.T.ravel(), strata=tasks, num_resamples=200, statistic=statistic),
            rtol=1e-12,
        )
    assert np.isnan(statistics.stratified_interval(probability_of_improvement, scores, scores[:1])).all()


def test_statistics_refuse_bad_scores():
    for call, word in (
        (lambda: interquartile_mean([]), 'empty'),
        (lambda: interquartile_mean([1.0, np.nan]), 'NaN'),
        (lambda: performance_profile([np.nan], [0.0]), 'NaN'),
        (lambda: probability_of_improvement([1.0], [2.0]), r'runs, tasks.*\(1,\)'),
        (lambda: probability_of_improvement(np.ones([2, 3]), np.ones([2, 1])), r'\(2, 3\) and \(2, 1\)'),
        (lambda: statistics.stratified_interval(np.mean), 'scores'),
        (lambda: statistics.stratified_interval(np.mean, [1.0]), r'runs, tasks.*\(1,\)'),
        (lambda: statistics.stratified_interval(np.mean, np.ones([2, 2]), confidence=1.0), 'confidence'),
    ):
        with pytest.raises(ValueError, match=word) as error:
            call()
        assert '\n' not in str(error.value)


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, numbers in expected.items():
        for key, value in numbers.items():
            np.testing.assert_allclose(found[name][key], value, rtol=0, atol=1e-9, err_msg=f'{key} of {name}')


def test_statistics_equal_the_recorded_ones_of_rliable():
    """On the draws in the file, which are ours; `python -m tests.helpers.rliable_reference` has written it."""
    recorded = json.loads(rliable_reference.PATH.read_text())
    agent, other = np.array(recorded['agent']), np.array(recorded['other'])
    np.testing.assert_array_equal(rliable_reference.draws(agent)[0], recorded['draws_of_one'])
    for drawn, expected in zip(rliable_reference.draws(agent, other), recorded['draws_of_two'], strict=True):
        np.testing.assert_array_equal(drawn, expected)
    assert_equal(rliable_reference.computed(agent, other), recorded['rliable'])


@pytest.mark.parametrize('seed', range(3))
def test_statistics_equal_those_of_rliable(seed):
    pytest.importorskip('rliable', reason='needs rliable')
    agent, other = rliable_reference.scores(seed)
    assert_equal(rliable_reference.computed(agent, other), rliable_reference.reference(agent, other))

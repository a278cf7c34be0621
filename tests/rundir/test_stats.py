"""What is counted between two rows: returns, lags, histograms, by task."""

import numpy as np

from impala_jax.rundir.stats import Histogram, LearnerStats
from tests.helpers.metrics import info


def test_each_row_counts_what_ended_since_the_last():
    stats = LearnerStats()
    stats.add_batch(info(3.0, -1.0, restarts=1), np.array([5, 5, 5]), 3)
    stats.add_batch(info(4.0), np.array([5, 5, 8]), 3)
    row = stats.row()
    assert (row['episodes'], row['episode_return'], row['policy_lag_max']) == (3, 2.0, 8)
    stats.add_batch(info(restarts=2), np.array([1, 1, 1]), 3)
    row = stats.row()
    assert 'episode_return' not in row
    assert (row['episodes'], row['episode_return_last_100'], row['policy_lag_max']) == (3, 2.0, 1)
    assert row['environment_restarts'] == 3
    assert not {'policy_lag_mean', 'policy_lag_min', 'policy_lag_max'} & set(stats.row())


def test_returns_of_older_parameters_do_not_count():
    """Games of those that were replaced go on, and wait in the queue."""
    stats = LearnerStats(('a', 'b'))
    task = np.array([0, 1, 1], np.int32)
    began = np.full([4, 3], 6, np.int32)
    stats.add_batch(info(3.0, -1.0), np.zeros(3), 3, task, began)
    stats.forget_returns(7)
    assert stats.row()['episodes'] == 2
    resumed = LearnerStats(('a', 'b'))
    resumed.restore(stats.state())
    for counts in (stats, resumed):
        counts.add_batch(info(8.0, 9.0, 10.0), np.zeros(3), 3, task, began)
        assert not {'episode_return', 'episode_return_last_100', 'episode_return/b'} & set(counts.row())
        began[0] = [6, 7, 8]
        counts.add_batch(info(8.0, 9.0, 10.0), np.zeros(3), 3, task, began)
        row = counts.row()
        assert (row['episodes'], row['episode_return'], row['episode_return/b']) == (8, 9.5, 9.5)
        assert 'episode_return/a' not in row
        began[0] = 6


def test_running_mean_is_of_the_last_100():
    stats = LearnerStats()
    stats.add_batch(info(*[1000.0] * 50, *range(100), shape=(20, 10)), np.zeros(10), 10)
    assert stats.row()['episode_return_last_100'] == np.mean(range(100))


def test_what_is_replayed_counts_once():
    """Its episodes and restarts were counted when it was new; its lag has a metric of its own."""
    stats = LearnerStats()
    stats.add_batch(info(1.0, 2.0, 4.0, restarts=1, shape=(2, 3)), np.array([0, 3, 900]), 2)
    row = stats.row()
    assert (row['episodes'], row['episode_return'], row['environment_restarts']) == (2, 1.5, 1)
    assert (row['policy_lag_min'], row['policy_lag_mean'], row['policy_lag_max']) == (0, 1.5, 3)
    assert row['replay_lag_mean'] == 900
    histogram = row['policy_lag_histogram']
    assert isinstance(histogram, Histogram)
    assert histogram.edges == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
    assert histogram.counts == [1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1]


def test_stats_go_on_from_a_checkpoint():
    stats = LearnerStats()
    stats.add_batch(info(3.0, -1.0, restarts=1), np.array([5, 5, 5]), 3)
    stats.row()
    stats.add_batch(info(7.0), np.array([1, 2, 3]), 3)
    other = LearnerStats()
    other.restore(stats.state())
    for each in (stats, other):
        each.add_batch(info(1.0), np.array([4, 4, 4]), 3)
    ours, theirs = stats.row(), other.row()
    for row in (ours, theirs):
        del row['learner_wait_fraction']
    assert ours == theirs


def test_a_suites_tasks_are_counted_apart():
    """A row's returns are those that ended since the last row; what is replayed does not count again."""
    stats = LearnerStats(('a', 'b', 'c'))
    batch = info(1.0, 2.0, 4.0, 8.0, shape=(1, 4))
    stats.add_batch(batch, np.zeros(4), 3, np.array([0, 2, 0, 2], np.int32))
    row = stats.row()
    assert (row['episode_return'], row['episode_return/a'], row['episode_return/c']) == (7 / 3, 2.5, 2.0)
    assert row['episode_return_last_100/a'] == 2.5
    assert not {'episode_return/b', 'episode_return_last_100/b', 'suite_return_last_100'} & set(row)
    stats.add_batch(info(6.0, shape=(1, 1)), np.zeros(1), 1, np.array([1], np.int32))
    row = stats.row()
    assert row['episode_return/b'] == 6 and 'episode_return/a' not in row
    # Each task counts once, however many episodes it has.
    assert row['suite_return_last_100'] == (2.5 + 6 + 2) / 3
    stats.add_batch(info(*range(200), shape=(200, 1)), np.zeros(1), 1, np.array([1], np.int32))
    assert stats.row()['episode_return_last_100/b'] == np.mean(range(100, 200))


def test_the_counts_of_tasks_go_on_from_a_checkpoint():
    stats, other = LearnerStats(('a', 'b', 'c')), LearnerStats(('a', 'b', 'c'))
    stats.add_batch(info(1.0, 2.0, shape=(1, 2)), np.zeros(2), 2, np.array([0, 1], np.int32))
    stats.row()
    stats.add_batch(info(3.0, shape=(1, 2)), np.zeros(2), 2, np.array([1, 0], np.int32))
    other.restore(stats.state())
    rows = []
    for each in (stats, other):
        each.add_batch(info(5.0, shape=(1, 1)), np.zeros(1), 1, np.array([2], np.int32))
        rows.append(each.row())
        del rows[-1]['learner_wait_fraction']
    assert rows[0] == rows[1]
    assert rows[0]['episode_return/b'] == 3 and rows[0]['suite_return_last_100'] == (1 + 2.5 + 5) / 3


def test_a_single_environment_has_no_rows_of_tasks():
    stats = LearnerStats()
    stats.add_batch(info(1.0, shape=(1, 2)), np.zeros(2), 2, np.zeros(2, np.int32))
    assert not [name for name in stats.row() if '/' in name or name.startswith('suite')]
    assert 'tasks' not in stats.state()

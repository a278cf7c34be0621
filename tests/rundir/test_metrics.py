"""Rows of metrics: whole across kills, and what they hold."""

import math

import numpy as np

from impala_jax.rundir.files import EVALUATIONS, METRICS
from impala_jax.rundir.metrics import MetricsLogger
from impala_jax.rundir.rows import read_rows
from impala_jax.rundir.stats import Histogram, LearnerStats
from tests.helpers.metrics import FRAMES, events, info, learner_row, rows, silent

REQUIRED = {
    'frames',
    'learner_steps',
    'wall_time_s',
    'frames_per_second',
    'episodes',
    'episode_return',
    'policy_lag_mean',
    'policy_lag_min',
    'policy_lag_max',
    'loss',
    'policy_loss',
    'baseline_loss',
    'entropy',
    'grad_norm',
    'learning_rate',
    'learner_wait_fraction',
}


def test_a_row_holds_all_that_is_promised(tmp_path):
    stats = LearnerStats()
    stats.add_batch(info(3.0, -1.0), np.array([0, 2, 1]), 3)
    stats.add_wait(0.1)
    with MetricsLogger(tmp_path, FRAMES, console=silent()) as logger:
        logger.write(learner_row(640) | stats.row())
    (row,) = rows(tmp_path)
    assert set(row) >= REQUIRED
    assert row['frames'] == 640 and row['episodes'] == 2 and row['episode_return'] == 1.0
    assert (row['policy_lag_min'], row['policy_lag_mean'], row['policy_lag_max']) == (0, 1.0, 2)
    assert 0 <= row['learner_wait_fraction'] <= 1


def test_histograms_reach_the_file_and_tensorboard(tmp_path):
    histogram = Histogram([0.0, 1.0, 4.0], [5, 7])
    with MetricsLogger(tmp_path, FRAMES, console=silent()) as logger:
        logger.write({'frames': 640, 'log_rho_histogram': histogram})
    (row,) = rows(tmp_path)
    assert row['log_rho_histogram'] == {'edges': [0.0, 1.0, 4.0], 'counts': [5, 7]}
    (found,) = [
        value.histo for event in events(tmp_path) for value in event.summary.value if value.tag == 'log_rho_histogram'
    ]
    assert (list(found.bucket_limit), list(found.bucket), found.num) == ([1.0, 4.0], [5.0, 7.0], 12.0)


def test_what_is_not_finite_is_left_out(tmp_path):
    with MetricsLogger(tmp_path, FRAMES, console=silent()) as logger:
        logger.write(
            {'frames': np.int64(640), 'loss': np.float32('nan'), 'grad_norm': math.inf, 'entropy': np.float32(0.5)}
        )
    (row,) = rows(tmp_path)
    assert set(row) == {'frames', 'entropy', 'wall_time_s', 'frames_per_second'}
    assert row['frames'] == 640 and row['entropy'] == 0.5
    assert '640,' in (tmp_path / METRICS).read_text(), 'integers stay integers'


def test_rows_reach_the_file_at_once(tmp_path):
    logger = MetricsLogger(tmp_path, FRAMES, console=silent())
    for count in (1, 2, 3):
        logger.write(learner_row(640 * count))
        assert len(rows(tmp_path)) == count
    logger.close()
    logger.close()


def test_resuming_drops_what_will_be_written_again(tmp_path):
    path = tmp_path / METRICS
    with MetricsLogger(tmp_path, FRAMES, console=silent()) as logger:
        logger.resume(0)
        for frames in (640, 1280, 1920):
            logger.write(learner_row(frames))
    with path.open('a') as file:
        file.write('{"frames": 2560, "lo')
    (tmp_path / EVALUATIONS).write_text('{"frames": 640}\n{"frames": 1300}\n')
    with MetricsLogger(tmp_path, FRAMES, console=silent()) as logger:
        logger.resume(1280, wall_time_s=100.0)
        assert [row['frames'] for row in rows(tmp_path)] == [640, 1280]
        logger.write(learner_row(1920))
    assert [row['frames'] for row in rows(tmp_path)] == [640, 1280, 1920]
    assert 100 <= rows(tmp_path)[-1]['wall_time_s'] < 160
    assert rows(tmp_path)[-1]['frames_per_second'] > 0
    assert read_rows(tmp_path / EVALUATIONS) == [{'frames': 640}]
    assert sorted(path.name for path in tmp_path.iterdir()) == ['evaluations.jsonl', 'metrics.jsonl', 'tensorboard']


def test_wall_time_goes_on_from_the_last_row(tmp_path):
    (tmp_path / METRICS).write_text('{"frames": 640, "wall_time_s": 50.0}\n{"frames": 900, "wall_time_s": 70.0}\n')
    logger = MetricsLogger(tmp_path, FRAMES, console=silent())
    logger.resume(700)
    assert 50 <= logger.wall_time_s < 65


def test_a_fresh_start_keeps_nothing(tmp_path):
    (tmp_path / METRICS).write_text('{"frames": 640, "wall_time_s": 50.0}\n')
    logger = MetricsLogger(tmp_path, FRAMES, console=silent())
    logger.resume(0)
    assert rows(tmp_path) == [] and logger.wall_time_s < 15

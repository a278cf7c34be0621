"""Metrics in TensorBoard."""

from impala_jax.rundir.files import TENSORBOARD
from impala_jax.rundir.metrics import MetricsLogger
from tests.helpers.metrics import FRAMES, events, learner_row, rows, silent


def test_tensorboard_counts_frames(tmp_path):
    logger = MetricsLogger(tmp_path, FRAMES, console=silent())
    logger.resume(640)
    logger.write(learner_row(1280))
    written = events(tmp_path)  # before close: a kill loses nothing
    logger.close()
    scalars = {value.tag: (event.step, value.simple_value) for event in written for value in event.summary.value}
    assert scalars['loss'] == (1280, 1.5)
    assert {'frames_per_second', 'learner_steps'} <= set(scalars)
    assert [event.step for event in written if event.HasField('session_log')] == [641]


def test_a_run_goes_on_without_tensorboard(tmp_path, caplog):
    (tmp_path / TENSORBOARD).write_text('in the way')
    with MetricsLogger(tmp_path, FRAMES, console=silent()) as logger:
        logger.write(learner_row(640))
        logger.write(learner_row(1280))
    assert len(rows(tmp_path)) == 2
    assert len([record for record in caplog.records if 'TensorBoard' in record.getMessage()]) == 1

"""What a run writes of itself stays whole across kills, and what a person sees stays readable."""

import io
import json
import logging
import math
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from impala_jax import config as config_lib
from impala_jax.config import Config, ConfigError
from impala_jax.rundir import progress
from impala_jax.rundir.files import EVALUATIONS, METRICS, TENSORBOARD, errors_name
from impala_jax.rundir.metrics import MetricsLogger
from impala_jax.rundir.progress import format_duration, format_number
from impala_jax.rundir.rows import append_row, read_rows
from impala_jax.rundir.run_config import write_run_config
from impala_jax.rundir.stats import Histogram, LearnerStats
from impala_jax.rundir.summary import print_summary, summary
from impala_jax.types import StepInfo
from tests.helpers.programs import ROOT

CONFIG = Config(total_frames=64_000)
FRAMES = CONFIG.total_frames
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


def info(*returns: float, restarts: int = 0, shape: tuple[int, int] = (4, 3)) -> StepInfo:
    episode_return, episode_ended = np.zeros(shape, np.float32), np.zeros(shape, bool)
    episode_return.reshape(-1)[: len(returns)] = returns
    episode_ended.reshape(-1)[: len(returns)] = True
    counts = np.zeros(shape, np.int32)
    counts[0, 0] = restarts
    return StepInfo(episode_return, episode_ended, counts)


def learner_row(frames: int) -> dict:
    losses = {name: 1.5 for name in ('loss', 'policy_loss', 'baseline_loss', 'entropy', 'grad_norm', 'learning_rate')}
    return {'frames': frames, 'learner_steps': frames // 640, **losses}


def silent() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=100)


def terminal(width: int = 100) -> Console:
    return Console(
        file=io.StringIO(), force_terminal=True, width=width, legacy_windows=False, _environ={'TERM': 'xterm'}
    )


def shown(console: Console) -> str:
    """What was written; colours are left out."""
    assert isinstance(console.file, io.StringIO)
    return re.sub(r'\x1b\[[0-9;]*m', '', console.file.getvalue())


def rows(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / METRICS).read_text().splitlines()]


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


def test_histograms_reach_the_file_and_tensorboard(tmp_path):
    histogram = Histogram([0.0, 1.0, 4.0], [5, 7])
    with MetricsLogger(tmp_path, FRAMES, console=silent()) as logger:
        logger.write({'frames': 640, 'log_rho_histogram': histogram})
    (row,) = rows(tmp_path)
    assert row['log_rho_histogram'] == {'edges': [0.0, 1.0, 4.0], 'counts': [5, 7]}
    (found,) = [
        value.histo for event in _events(tmp_path) for value in event.summary.value if value.tag == 'log_rho_histogram'
    ]
    assert (list(found.bucket_limit), list(found.bucket), found.num) == ([1.0, 4.0], [5.0, 7.0], 12.0)


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


def _events(workdir: Path) -> list:
    from tensorboardX.proto import event_pb2

    (path,) = (workdir / TENSORBOARD).iterdir()
    content, events = path.read_bytes(), []
    while content:
        (size,) = struct.unpack('<Q', content[:8])  # TFRecord: size, its checksum, the data, its checksum
        events.append(event_pb2.Event.FromString(content[12 : 12 + size]))  # pyright: ignore[reportAttributeAccessIssue]
        content = content[16 + size :]
    return events


def test_tensorboard_counts_frames(tmp_path):
    logger = MetricsLogger(tmp_path, FRAMES, console=silent())
    logger.resume(640)
    logger.write(learner_row(1280))
    events = _events(tmp_path)  # before close: a kill loses nothing
    logger.close()
    scalars = {value.tag: (event.step, value.simple_value) for event in events for value in event.summary.value}
    assert scalars['loss'] == (1280, 1.5)
    assert {'frames_per_second', 'learner_steps'} <= set(scalars)
    assert [event.step for event in events if event.HasField('session_log')] == [641]


def test_a_run_goes_on_without_tensorboard(tmp_path, caplog):
    (tmp_path / TENSORBOARD).write_text('in the way')
    with MetricsLogger(tmp_path, FRAMES, console=silent()) as logger:
        logger.write(learner_row(640))
        logger.write(learner_row(1280))
    assert len(rows(tmp_path)) == 2
    assert len([record for record in caplog.records if 'TensorBoard' in record.getMessage()]) == 1


def test_plain_lines_now_and_then(tmp_path, monkeypatch):
    console = silent()
    with MetricsLogger(tmp_path, FRAMES, console=console) as logger:
        for step in range(1, 51):
            logger.write(learner_row(640 * step) | {'episode_return_last_100': 2.5, 'policy_lag_mean': 1.0})
        assert len(shown(console).splitlines()) == 1
        monkeypatch.setattr(progress, '_PLAIN_INTERVAL_S', 0.0)
        logger.write(learner_row(640 * 51))
        monkeypatch.setattr(progress, '_PLAIN_INTERVAL_S', 100.0)
        logger.write(learner_row(64_000))
    first, _, last = shown(console).splitlines()
    assert '1.0 %  640/64k frames' in first and 'return 2.50' in first and 'lag 1.0' in first and ' left' in first
    assert last.startswith('100.0 %')
    assert '\x1b' not in shown(console)


def test_the_progress_line_gives_the_terminal_back(tmp_path):
    console = terminal()
    root, own = logging.getLogger(), logging.StreamHandler(sys.stderr)
    root.addHandler(own)
    before, streams = list(root.handlers), (sys.stdout, sys.stderr)
    try:
        with (
            pytest.raises(RuntimeError, match='stop'),
            MetricsLogger(tmp_path, FRAMES, console=console) as logger,
        ):
            assert own not in root.handlers
            logger.write(learner_row(32_000) | {'episode_return_last_100': 2.5})
            logging.getLogger('impala_jax.test').warning('environment 3 was rebuilt')
            raise RuntimeError('stop')
        assert sorted(map(id, root.handlers)) == sorted(map(id, before))
    finally:
        root.removeHandler(own)
    assert (sys.stdout, sys.stderr) == streams
    assert shown(console).count('\x1b[?25l') == shown(console).count('\x1b[?25h') == 1, 'the cursor is shown again'
    assert '32k/64k frames' in shown(console) and 'return 2.50' in shown(console)
    warning = next(line for line in shown(console).splitlines() if 'environment 3 was rebuilt' in line)
    assert 'frames/s' not in warning


@pytest.mark.parametrize('width', [30, 60, 100, 200])
def test_the_progress_line_is_one_line(tmp_path, width):
    console = terminal(width)
    with MetricsLogger(tmp_path, FRAMES, console=console) as logger:
        logger.write(learner_row(32_000) | {'episode_return_last_100': -12345.678, 'policy_lag_mean': 1.0})
    assert '\x1b[1A' not in shown(console), 'the cursor never goes up a line'


def test_broken_pipe_at_the_end_is_no_error(tmp_path):
    file = io.StringIO()
    logger = MetricsLogger(tmp_path, FRAMES, console=Console(file=file))
    logger.write(learner_row(640))
    logger.write(learner_row(1280))
    file.close()
    logger.close()


@pytest.mark.parametrize(
    ('value', 'text'),
    [
        (0, '0'),
        (9.5, '9.5'),
        (640, '640'),
        (999.7, '1k'),
        (12_345, '12.3k'),
        (999_900, '1M'),
        (2e8, '200M'),
        (2.5e9, '2.5G'),
    ],
)
def test_compact_numbers(value, text):
    assert format_number(value) == text


@pytest.mark.parametrize(
    ('seconds', 'text'),
    [(0.2, '0 s'), (59.6, '1 min 00 s'), (61, '1 min 01 s'), (3700, '1 h 01 min'), (2e5, '2 d 7 h')],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


def test_run_config(tmp_path):
    config = Config(seed=3, vtrace=config_lib.VTraceConfig(rho_bar=math.inf))
    write_run_config(tmp_path / 'runs' / 'a', config)
    content = json.loads((tmp_path / 'runs' / 'a' / 'config.json').read_text())
    assert config_lib.from_dict(content['config']) == config and content['format'] == 2
    assert content['versions'].keys() >= {'python', 'jax', 'jaxlib', 'flax', 'optax', 'rlax', 'chex', 'numpy'}
    assert [path.name for path in (tmp_path / 'runs' / 'a').iterdir()] == ['config.json']


def test_a_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(ConfigError, match='cannot write to --workdir .*file/run: Not a directory; give') as error:
        write_run_config(tmp_path / 'file' / 'run', CONFIG)
    assert '\n' not in str(error.value)


def test_summary(tmp_path, capsys):
    workdir = tmp_path / 'a run'
    workdir.mkdir()
    assert '--workdir' in summary(workdir)
    append_row(workdir / METRICS, {'frames': 640, 'wall_time_s': 1.0, 'episodes': 0})
    assert 'no training episode' in summary(workdir)
    append_row(
        workdir / METRICS,
        {'frames': 1_280_000, 'wall_time_s': 754.0, 'episodes': 400, 'episode_return_last_100': 19.256},
    )
    append_row(
        workdir / EVALUATIONS,
        {
            'frames': 1_280_000,
            'learner_steps': 1,
            'episodes': 20,
            'mean_return': 20.5,
            'median_return': 21.0,
            'stderr': 0.2,
        },
    )
    print_summary(workdir)
    text = capsys.readouterr().out
    assert '1,280,000 frames in 12 min 34 s' in text
    assert '19.26, mean of the last 100 training episodes' in text
    assert '20.50, mean of 20 episodes, standard error 0.20, median 21.00 (at 1,280,000 frames)' in text
    assert text.splitlines()[-1].endswith(f"impala evaluate --workdir '{workdir}' --episodes 100")


_NOISE = """
import logging, warnings
from impala_jax.system.quiet import quiet_libraries
quiet_libraries()
from absl import logging as absl_logging
absl_logging.warning('noise of a library')
logging.getLogger('jax._src.xla_bridge').warning('No GPU/TPU found, falling back to CPU. (noise)')
logging.getLogger('jax._src.xla_bridge').warning('An NVIDIA GPU may be present, but JAX has no use for a GPU: kept')
warnings.warn_explicit('noise', UserWarning, 'gymnasium/core.py', 1, module='gymnasium.core')
warnings.warn('noise', DeprecationWarning)
warnings.warn('\\x1b[33mWARN: noise of gymnasium')
warnings.warn('kept, ours')
absl_logging.error('kept, an error')
logging.getLogger('impala_jax.actor').warning('kept, ours too')
"""


def test_libraries_are_quiet_and_we_are_not():
    result = subprocess.run(
        [sys.executable, '-c', _NOISE],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != 'PYTHONWARNINGS'},
        timeout=120,
        check=True,
    )
    output = result.stdout + result.stderr
    assert 'noise' not in output, output
    for message in ('a GPU: kept', 'kept, ours', 'kept, an error', 'kept, ours too'):
        assert message in output, output


def test_a_write_to_a_full_disk_names_its_file():
    """The system's own error of a write has no name: 'which file?' would be all that a person can ask."""
    named = pytest.raises(OSError, match="No space left on device: 'results.csv'")
    with named, errors_name(Path('results.csv')), open('/dev/full', 'w') as file:
        file.write('a row')

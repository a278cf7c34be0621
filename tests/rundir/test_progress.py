"""Progress on the console: lines, or one line that stays."""

import io
import logging
import sys

import pytest
from rich.console import Console

from impala_jax.rundir import progress
from impala_jax.rundir.metrics import MetricsLogger
from impala_jax.rundir.progress import format_duration, format_number
from tests.helpers.metrics import FRAMES, learner_row, shown, silent, terminal


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
def test_numbers_are_compact(value, text):
    assert format_number(value) == text


@pytest.mark.parametrize(
    ('seconds', 'text'),
    [(0.2, '0 s'), (59.6, '1 min 00 s'), (61, '1 min 01 s'), (3700, '1 h 01 min'), (2e5, '2 d 7 h')],
)
def test_durations_are_compact(seconds, text):
    assert format_duration(seconds) == text

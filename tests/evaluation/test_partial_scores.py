"""The file of what an evaluation has played so far: what counts, and what happens to the rest."""

import pytest

from impala_jax.config import ConfigError
from impala_jax.evaluation import partial_scores
from impala_jax.evaluation.partial_scores import PartialScores

ROW = {'returns': [1.0, 2.5], 'truncated_episodes': 0}


@pytest.fixture
def open_file(tmp_path):
    return lambda **changes: PartialScores(tmp_path / 'rows', {'seed': 3, 'sizes': (1, 2), **changes}, 2)


def test_rows_come_back(open_file):
    open_file().add('a', ROW)
    scores = open_file()
    scores.add('b', ROW)
    assert {task: row['returns'] for task, row in open_file().rows.items()} == {'a': [1.0, 2.5], 'b': [1.0, 2.5]}
    scores.remove()
    assert not open_file().rows


def test_a_torn_line_does_not_spoil_the_next(open_file, tmp_path):
    open_file().add('a', ROW)
    whole = (tmp_path / 'rows').read_bytes()
    for size in (len(whole) - 2, len(whole) // 2):
        (tmp_path / 'rows').write_bytes(whole + whole[:size].replace(b'"a"', b'"b"'))
        scores = open_file()
        assert list(scores.rows) == ['a']
        scores.add('c', ROW)
        assert list(open_file().rows) == ['a', 'c']


@pytest.mark.parametrize(
    'row', [{'returns': [1.0]}, {'returns': [1.0, 'x']}, {'returns': 2}, {'truncated_episodes': None}]
)
def test_a_damaged_row_does_not_count(row, open_file):
    scores = open_file()
    scores.add('a', ROW | row)
    scores.add('b', ROW)
    assert list(open_file().rows) == ['b']


def test_rows_of_another_evaluation_are_removed(open_file, tmp_path, caplog):
    open_file(seed=4, greedy=True).add('a', ROW)
    scores = open_file()
    assert not scores.rows and not (tmp_path / 'rows').exists()
    assert 'a different evaluation (seed 4 instead of 3): all tasks are played' in caplog.text
    scores.add('b', ROW)
    assert list(open_file().rows) == ['b']


def test_a_file_of_something_else_is_left_alone(open_file, tmp_path):
    (tmp_path / 'rows').write_text('{"frames": 3}\n')
    with pytest.raises(ConfigError, match='rows does not contain the scores'):
        open_file()
    (tmp_path / 'rows').unlink()
    (tmp_path / 'rows').mkdir()
    with pytest.raises(ConfigError, match='rows cannot be read: Is a directory'):
        open_file()


def test_a_full_disk_costs_no_scores(open_file, monkeypatch, caplog, tmp_path):
    scores, append = open_file(), partial_scores.append_row

    def fail(path, row):
        path.write_bytes(path.read_bytes() + b'{"task"')
        raise OSError(28, 'No space left on device')

    scores.add('a', ROW)
    monkeypatch.setattr(partial_scores, 'append_row', fail)
    scores.add('b', ROW)
    monkeypatch.setattr(partial_scores, 'append_row', append)
    scores.add('c', ROW)
    assert list(scores.rows) == ['a', 'b', 'c'] and list(open_file().rows) == ['a', 'c']
    assert 'No space left on device; a restart would play b again' in caplog.text

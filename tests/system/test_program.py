"""How a program was started."""

import sys

import pytest

from impala_jax.system import program


@pytest.mark.parametrize(
    'argv, orig_argv, itself, commands',
    [
        (
            ['launch/tpu_pod.py', '--a', '1'],
            ['python', '-u', 'launch/tpu_pod.py', '--a', '1'],
            ['-u', 'launch/tpu_pod.py'],
            ['python launch/local.py', 'python launch/plot.py', 'make doctor'],
        ),
        (
            ['impala pod', '--a', '1'],
            ['python', '/bin/impala', 'pod', '--a', '1'],
            ['/bin/impala', 'pod'],
            ['impala train', 'impala plot', 'impala doctor'],
        ),
        (
            ['python -m impala_jax pod'],
            ['python', '-m', 'impala_jax', 'pod'],
            ['-m', 'impala_jax', 'pod'],
            [f'python -m impala_jax {name}' for name in ('train', 'plot', 'doctor')],
        ),
    ],
    ids=['script', 'command', 'module'],
)
def test_a_program_knows_how_it_was_started(monkeypatch, argv, orig_argv, itself, commands):
    monkeypatch.setattr(sys, 'argv', argv)
    monkeypatch.setattr(sys, 'orig_argv', orig_argv)
    assert program.itself() == [sys.executable, *itself]
    assert [program.command(name) for name in ('train', 'plot', 'doctor')] == commands

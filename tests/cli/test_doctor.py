"""The doctor tells what is missing or broken, in one line each, and never hangs or hides it."""

import importlib.util
import io
import os
import sys

import pytest
from rich.console import Console

from impala_jax.cli import doctor
from impala_jax.cli.doctor import Check, Result
from impala_jax.system import machine
from tests.helpers.programs import STAND_INS


def _run(code, **kwargs):
    return doctor.run_check(Check('part', code, 'mend it'), **kwargs)


def _report(*results):
    console = Console(file=io.StringIO(), width=60)
    works = doctor.report(list(results), console)
    return works, console.file.getvalue()


@pytest.mark.parametrize(
    'code, state, detail',
    [
        ("print('noise'); print('1.2.3')", 'works', '1.2.3'),
        ('import no_such_module', 'missing', "ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise ValueError('two\\nlines')", 'fails', 'ValueError: two lines'),
        ("raise RuntimeError('x') from ModuleNotFoundError('y')", 'missing', 'RuntimeError: x'),
        ("import sys; sys.exit('gone')", 'fails', 'SystemExit: gone'),
        ('import os; os._exit(7)', 'fails', 'exit code 7'),
        ("import os, sys; sys.stderr.write('last words'); sys.stderr.flush(); os.abort()", 'fails', 'last words'),
    ],
)
def test_outcome_of_a_check(code, state, detail):
    result = _run(code)
    assert result.state == state
    assert detail in result.detail
    assert '\n' not in result.detail


def test_a_crash_names_the_signal():
    assert 'SIGABRT' in _run('import os; os.abort()').detail


def test_a_check_that_hangs_is_ended():
    assert _run('import time; time.sleep(60)', timeout_s=0.5) == Result(
        Check('part', 'import time; time.sleep(60)', 'mend it'), 'fails', 'no answer within 0.5 s'
    )


def test_report_shows_each_problem_and_its_remedy_unwrapped():
    message, mend = 'ImportError: ' + 'why ' * 40, 'python -m pip install ' + 'something ' * 20 + "'jax[tpu]'"
    works, text = _report(
        Result(Check('core', '', '', required=True), 'works', '1.0'),
        Result(Check('extra', '', mend), 'fails', message),
    )
    assert works
    assert message in text and mend in text


@pytest.mark.parametrize('state', ['missing', 'fails'])
def test_the_core_is_required(state):
    works, text = _report(Result(Check('core', '', 'make install', required=True), state, 'gone'))
    assert not works
    assert 'does not work' in text


def test_exit_code_and_every_part_on_this_machine(capsys, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['impala doctor'])
    with pytest.raises(SystemExit) as ended:
        doctor.main()
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for check in doctor.CHECKS:
        assert check.name in text
    assert 'The core works.' in text
    assert not os.listdir(machine.own_folder())  # Checks leave no files.


@pytest.mark.launchpad
def test_launchpad_works_here():
    (check,) = [check for check in doctor.CHECKS if check.name == 'runtime launchpad']
    result = doctor.run_check(check)
    assert result.state == 'works', result.detail


@pytest.mark.atari
def test_atari_works_here():
    (check,) = [check for check in doctor.CHECKS if check.name == 'Atari']
    result = doctor.run_check(check)
    assert result.state == 'works', result.detail


def test_deepmind_lab_with_the_stand_in_and_without(monkeypatch):
    (check,) = [check for check in doctor.CHECKS if check.name == 'DeepMind Lab']
    if importlib.util.find_spec('deepmind_lab') is None:
        result = doctor.run_check(check)
        assert result.state == 'missing' and 'docs/dmlab.md' in result.detail
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join([str(STAND_INS), os.environ.get('PYTHONPATH', '')]))
    result = doctor.run_check(check)
    assert result.state == 'works' and '(72, 96, 3) uint8' in result.detail and '(16,) int32' in result.detail

"""The command `impala`, and the scripts that start its parts."""

import ast
import subprocess
import sys

import pytest

from impala_jax.cli import main as cli
from impala_jax.system import program
from tests.helpers.programs import ROOT


@pytest.mark.parametrize(
    'arguments, status, words',
    [
        ([], 2, ['a command is missing', '--help']),
        (['trian'], 2, ["'trian'", "'train'"]),
        (['--verbose'], 2, ['--verbose', '--help']),
        (['train', '--confg', 'catch'], 2, ['--config']),
    ],
)
def test_bad_commands_get_one_line(monkeypatch, capsys, arguments, status, words):
    monkeypatch.setattr('impala_jax.system.quiet.quiet_libraries', lambda: None)
    monkeypatch.setattr(sys, 'argv', ['impala', *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == status
    (line,) = capsys.readouterr().err.splitlines()
    assert all(word in line for word in words), line


def test_an_unknown_variant_of_the_kernels_gets_one_line(monkeypatch):
    """Before any module of the command is imported: they load the kernels."""
    monkeypatch.setattr('impala_jax.system.quiet.quiet_libraries', lambda: None)
    monkeypatch.setattr(cli.importlib, 'import_module', lambda name: pytest.fail(f'{name} is imported'))
    monkeypatch.setattr(sys, 'argv', ['impala', 'train', '--config', 'catch'])
    monkeypatch.setenv('IMPALA_JAX_KERNELS', 'none')
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 'error: IMPALA_JAX_KERNELS=none is unknown; it must be auto, off, avx512 or avx2'


def test_every_command_says_what_it_takes(monkeypatch, capsys):
    monkeypatch.setattr('impala_jax.system.quiet.quiet_libraries', lambda: None)
    monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
    for name in cli.COMMANDS:
        monkeypatch.setattr(sys, 'argv', ['impala', name, '--help'])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        output = capsys.readouterr().out
        assert not ended.value.code and f'usage: impala {name}' in output, output


def test_programs_listen_to_signals_before_they_import_anything_that_takes_time():
    for path in [*(ROOT / 'launch').glob('*.py'), ROOT / 'impala_jax' / '__main__.py']:
        first, second = ast.parse(path.read_text()).body[1:3]
        assert ast.unparse(first) == 'from impala_jax.system import stopping'
        assert ast.unparse(second) == 'stopping.begin()'
    code = """
import impala_jax.system.stopping, sys
impala_jax.system.stopping.begin = lambda: print(sorted({'jax', 'numpy', 'rich', 'tyro'} & set(sys.modules)))
import impala_jax.__main__
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout.strip() == '[]', done.stderr


def test_every_command_but_the_doctor_is_a_script_too(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['launch/local.py'])
    scripts = {program.command(name) for name in cli.COMMANDS}
    assert scripts == {f'python launch/{path.name}' for path in (ROOT / 'launch').glob('*.py')} | {'make doctor'}

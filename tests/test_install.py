"""Which Python `make train` and `make test` take; real interpreters, as many as this machine has."""

import glob
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.programs import ROOT

INSTALL = ROOT / 'requirements' / 'install.sh'
VERSIONS = ('3.10', '3.11', '3.12', '3.13', '3.14')
TOOLS = ('basename', 'bash', 'cat', 'cksum', 'dirname', 'sed', 'uname')
LAUNCHPAD = ' '.join(os.uname()[::4]) == 'Linux x86_64'  # Where it has wheels.


def _run(python, code):
    done = subprocess.run([python, '-c', code], capture_output=True, text=True, timeout=30)
    return done.stdout.strip() if done.returncode == 0 else None


@pytest.fixture(scope='module')
def pythons():
    """Version -> interpreter that is outside a virtual environment and can make one."""
    found = {}
    for version in VERSIONS:
        candidates = [os.path.realpath(sys.executable), shutil.which(f'python{version}')]
        candidates += glob.glob(str(Path.home() / '.pyenv' / 'versions' / f'{version}.*' / 'bin' / 'python'))
        for candidate in filter(None, candidates):
            if _run(candidate, 'import sys, ensurepip, venv; print("%d.%d" % sys.version_info[:2])') == version:
                # The one behind a shim of pyenv.
                found[version] = _run(candidate, 'import os, sys; print(os.path.realpath(sys.executable))')
                break
    return found


@pytest.fixture
def machine(tmp_path):
    """Runs install.sh on a machine that has these commands and no others."""

    def run(*arguments, commands=(), **environment):
        folder = tmp_path / 'bin'
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, path in [*((name, shutil.which(name)) for name in TOOLS), *dict(commands).items()]:
            (folder / name).symlink_to(path)
        environment = {'PATH': str(folder), 'HOME': str(tmp_path / 'home')} | environment
        return subprocess.run(
            [folder / 'bash', INSTALL, *arguments], env=environment, capture_output=True, text=True, timeout=60
        )

    return run


def chosen(done):
    """Version and reason, from the one line that is printed."""
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = done.stdout.splitlines()
    return re.fullmatch(r'install: \S+ (?:gets|has) Python (3\.\d+)\.\w+(?: \(.+?\))?, (.+)', line).groups()


def refusal(done):
    assert done.returncode == 1 and done.stdout == ''
    (line,) = done.stderr.splitlines()
    return line


@pytest.mark.parametrize('version', VERSIONS)
@pytest.mark.parametrize('name', ['python3', 'python'])
def test_the_only_python_is_taken(version, name, machine, pythons, tmp_path):
    if version not in pythons:
        pytest.skip(f'there is no Python {version}')
    if version == '3.10' and not LAUNCHPAD:
        pytest.skip('Launchpad has no wheels for this platform')
    taken, why = chosen(machine('--which', 'auto', tmp_path / '.venv', commands={name: pythons[version]}))
    assert taken == version
    assert why.startswith('which Launchpad and Reverb need' if version == '3.10' else 'the newest that was found')


def test_launchpads_python_comes_first_and_then_the_newest(machine, pythons, tmp_path):
    commands = {f'python{version}': path for version, path in pythons.items()}
    while commands:
        best = 'python3.10' if LAUNCHPAD and 'python3.10' in commands else max(commands)
        taken, _ = chosen(machine('--which', 'auto', tmp_path / '.venv', commands=commands))
        assert f'python{taken}' == best
        del commands[best]


def test_without_any_python_the_line_says_what_to_install(machine, tmp_path):
    line = refusal(machine('--which', 'auto', tmp_path / '.venv'))
    assert '3.14 3.13 3.12 3.11 was found' in line and 'python3-venv' in line and 'uv' in line


def test_a_command_that_does_not_run_is_passed_over(machine, pythons, tmp_path):
    """A shim of pyenv is on PATH for a version that is not active, and only says so."""
    shim = tmp_path / 'shim'
    shim.write_text('#!/bin/sh\necho "pyenv: command not found" >&2\nexit 127\n')
    shim.chmod(0o755)
    version, path = max(pythons.items())
    commands = {'python3.10': shim, 'python3.14': shim, 'python3': path}
    assert chosen(machine('--which', 'auto', tmp_path / '.venv', commands=commands))[0] == version


def test_a_version_that_is_asked_for_is_taken_or_refused(machine, pythons, tmp_path):
    version, path = max(pythons.items())
    other = max(set(VERSIONS) - {version})
    asked = ['--which', version, tmp_path / '.venv']
    assert chosen(machine(*asked, commands={'python3': path})) == (version, 'as asked for')
    asked[1] += '.99'  # As Docker's images of Python set the variable.
    assert chosen(machine(*asked, commands={'python3': path})) == (version, 'as asked for')
    line = refusal(machine('--which', other, tmp_path / '.venv', commands={'python3': path}))
    assert f'no Python {other} was found' in line and f'PYTHON=/path/to/python{other}' in line
    assert 'no pins for Python 3.9' in refusal(machine('--which', '3.9', tmp_path / '.venv'))


def test_an_interpreter_can_be_named(machine, pythons, tmp_path):
    version, path = max(pythons.items())
    assert chosen(machine('--which', 'auto', tmp_path / '.venv', PYTHON=path)) == (version, 'which PYTHON names')
    assert 'PYTHON=/nowhere' in refusal(machine('--which', PYTHON='/nowhere'))
    other = min(set(VERSIONS) - {version})
    assert f'is not a Python {other}' in refusal(machine('--which', other, tmp_path / '.venv', PYTHON=path))


def _environment(folder, python, stamp):
    subprocess.run([python, '-m', 'venv', '--without-pip', folder], check=True, timeout=60)
    if stamp:
        (folder / '.installed').write_text(f'{ROOT}\n')


def test_a_complete_environment_is_kept_and_another_is_not(machine, pythons, tmp_path):
    """It keeps its Python although a better one turned up, unless that one is asked for."""
    ranked = sorted(pythons, key=lambda version: (not (version == '3.10' and LAUNCHPAD), version != max(pythons)))
    if len(ranked) < 2:
        pytest.skip('there is only one Python')
    best, worse = ranked[0], ranked[-1]
    commands = {'python3': pythons[best]}
    _environment(tmp_path / '.venv', pythons[worse], stamp=True)
    taken, why = chosen(machine('--which', 'auto', tmp_path / '.venv', commands=commands))
    assert taken == worse and 'is there already' in why
    assert chosen(machine('--which', best, tmp_path / '.venv', commands=commands)) == (best, 'as asked for')
    _environment(tmp_path / '.venv-cut-off', pythons[worse], stamp=False)
    assert chosen(machine('--which', 'auto', tmp_path / '.venv-cut-off', commands=commands))[0] == best


def test_the_python_behind_an_active_environment_is_taken(machine, pythons, tmp_path):
    """That environment may be the one that is deleted and made again."""
    python = max(pythons.items())[1]
    _environment(tmp_path / '.venv', python, stamp=False)
    path = f'{tmp_path}/.venv/bin:{tmp_path}/bin'
    done = machine('--which', 'auto', tmp_path / '.venv', PATH=path)
    chosen(done)
    assert f'({python})' in done.stdout


def test_uv_is_asked_when_no_python_is_found(machine, pythons, tmp_path):
    if (uv := shutil.which('uv')) is None:
        pytest.skip('there is no uv')
    newer = {version: path for version, path in pythons.items() if version != '3.10'}
    if not newer:
        pytest.skip('there is only Python 3.10')
    version, path = max(newer.items())
    environment = {'UV_PYTHON_INSTALL_DIR': str(tmp_path / 'managed'), 'UV_CACHE_DIR': str(tmp_path / 'cache')}
    done = machine('--which', 'auto', tmp_path / '.venv', commands={'uv': uv}, **environment)
    assert done.stdout == f'install: {tmp_path}/.venv gets a Python that uv downloads, because no other was found\n'
    full = _run(path, 'import platform; print(platform.python_version())')
    managed = tmp_path / 'managed' / f'cpython-{full}-linux-{os.uname().machine}-gnu'
    managed.mkdir(parents=True)
    for part in Path(path).parents[1].iterdir():
        (managed / part.name).symlink_to(part)
    done = machine('--which', 'auto', tmp_path / '.venv', commands={'uv': uv}, **environment)
    assert chosen(done) == (version, "the newest of uv's, because no other was found")

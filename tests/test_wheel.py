"""The package as a stranger has it: a wheel, installed without a checkout, and commands in an empty folder."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from impala_jax.kernels import cpu
from impala_jax.kernels.variants import VARIANTS
from impala_jax.rundir.code_version import code_version
from tests.helpers.programs import ROOT

SOURCES = ('impala_jax', 'configs', 'setup.py', 'pyproject.toml', 'README.md', 'LICENSE')
TINY = '--runtime threads --total-frames 2000 --evaluator.episodes 2 --actor.num-actors 1 --actor.num-envs 4'.split()


def python(*arguments, cwd, **environment):
    """Runs this Python, or a script of its own, as a person does, with one device; returns what it prints."""
    inherited = {name: value for name, value in os.environ.items() if name not in ('XLA_FLAGS', 'PYTHONPATH')}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        **{'cwd': cwd, 'env': inherited | environment, 'timeout': 240, 'capture_output': True, 'text': True},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    """Built from a copy: what earlier builds have left in a checkout would get into it."""
    folder = tmp_path_factory.mktemp('build')
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns('*.so', '__pycache__'))
        else:
            shutil.copy(ROOT / name, folder)
    python('-m', 'pip', 'wheel', '-q', '--no-index', '--no-build-isolation', '--no-deps', '-w', 'dist', '.', cwd=folder)
    (path,) = (folder / 'dist').glob('*.whl')
    return path


@pytest.fixture(scope='module')
def impala(wheel, tmp_path_factory):
    """Runs `impala ...` of the installed wheel in a folder that was empty at first; returns what it prints."""
    target, folder = tmp_path_factory.mktemp('installed'), tmp_path_factory.mktemp('empty')
    python('-m', 'pip', 'install', '-q', '--no-index', '--no-deps', '--target', target, wheel, cwd=folder)

    def run(*arguments, program=(target / 'bin' / 'impala',)):
        return python(*program, *arguments, cwd=folder, PYTHONPATH=str(target))

    run.folder, run.target = folder, target
    return run


def test_it_holds_the_package_with_its_data_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if '.dist-info/' not in name}
    for folder, inside in (('impala_jax', 'impala_jax'), ('configs', 'impala_jax/configs')):
        for path in (ROOT / folder).rglob('*'):
            if path.suffix in ('.py', '.csv', '.cc') or path.name == 'py.typed':
                names.remove(f'{inside}/{path.relative_to(ROOT / folder).as_posix()}')
    assert all(name.startswith('impala_jax/kernels/_kernels') for name in names), names
    if not cpu.REASON:  # Where this checkout has kernels, the wheel has them for other processors as well.
        assert sorted(name.split('.')[0].rpartition('_kernels_')[2] for name in names) == sorted(VARIANTS)


def test_it_is_the_same_code_as_the_checkout(impala):
    """Actors and learners, one from a wheel and one from a checkout, work together."""
    code = 'import impala_jax; from impala_jax.rundir.code_version import code_version'
    file, version = impala('-c', f'{code}; print(impala_jax.__file__); print(code_version())', program=()).splitlines()
    assert Path(file) == impala.target / 'impala_jax' / '__init__.py'
    assert version == code_version()


def test_commands_in_an_empty_folder(impala):
    assert 'Trained     2,' in (trained := impala('train', '--config', 'catch', '--workdir', 'runs/catch', *TINY))
    assert 'Evaluate    impala evaluate --workdir' in trained
    impala('evaluate', '--workdir', 'runs/catch', '--episodes', '3', '--json', 'scores.json')
    assert json.loads((impala.folder / 'scores.json').read_text())['episodes'] == 3
    if importlib.util.find_spec('matplotlib') is not None:
        impala('plot', 'curve', '--workdir', 'runs/catch', '--output', 'catch.png')
        assert (impala.folder / 'catch.png').stat().st_size > 10_000
    assert len(impala('ablate', '--grid', 'table2', '--output', 'sweep', '--list').splitlines()) == 720


def test_the_doctor_needs_no_checkout(impala):
    text = impala('doctor')
    assert 'The core works.' in text and 'make -C' not in text


def test_a_program_that_starts_itself_again(impala):
    """A population, whose members are processes, by `python -m impala_jax`."""
    options = ['--config', 'catch', '--workdir', 'runs/population', '--members', '1', *TINY]
    text = impala('pbt', *options, '--learner.num-devices', '1', program=('-m', 'impala_jax'))
    assert 'Evaluate   python -m impala_jax evaluate' in text

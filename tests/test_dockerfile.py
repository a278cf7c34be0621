"""The Dockerfile: there may be no Docker here, but CI runs what it runs."""

import re
import shlex

from tests.helpers.programs import ROOT


def _lines():
    """Instruction and arguments of each line of the Dockerfile, with continued lines joined."""
    text = (ROOT / 'Dockerfile').read_text().replace('\\\n', ' ')
    return [line.split(maxsplit=1) for line in text.splitlines() if line.strip() and not line.startswith('#')]


def test_what_an_image_runs_is_what_ci_runs():
    """Except for the packages of the system, which CI finds installed."""
    commands = [argument for instruction, argument in _lines() if instruction == 'RUN']
    (system,) = [command for command in commands if command.startswith('apt-get update && ')]
    assert {'g++', 'make'} <= set(shlex.split(system))
    checks = re.findall(r"^check '.+?' (make .+)$", (ROOT / '.ci' / 'run').read_text(), re.MULTILINE)
    # Without the build argument for an accelerator, and on the Python of CI or that of the image.
    plain = [re.sub(r' (EXTRA|PYTHON_VERSION)=\S+', '', command) for command in commands if command != system]
    assert plain == ['make install', 'make doctor']
    assert set(plain) <= {re.sub(r' PYTHON_VERSION=\S+', '', command) for command in checks}


def test_its_arguments_are_known():
    """An extra that there is, and a Python that there are pins for."""
    arguments = dict(argument.split('=') for instruction, argument in _lines() if instruction == 'ARG')
    assert (ROOT / 'requirements' / f'py{arguments["PYTHON"].replace(".", "")}.txt').exists()
    assert arguments['EXTRA'] == ''
    assert '\ncuda = ' in (ROOT / 'pyproject.toml').read_text()
    assert 'make install EXTRA=$EXTRA' in [argument for instruction, argument in _lines() if instruction == 'RUN']


def test_what_was_built_here_stays_out_of_an_image():
    ignored = (ROOT / '.dockerignore').read_text().splitlines()
    assert {'.git', '.venv*', 'build', 'runs', '**/*.so', '**/__pycache__'} <= set(ignored)

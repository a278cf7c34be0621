"""Runs whose standard streams are closed, or whose locale has no UTF-8."""

import os
import shutil
import subprocess
import sys

import pytest

from impala_jax import evaluate, run
from impala_jax.config import ConfigError
from tests.helpers.configs import small
from tests.helpers.programs import ROOT, marked_processes
from tests.helpers.runs import SMALL, rows_of

RUNTIMES = [
    'threads',
    pytest.param('ray', marks=pytest.mark.ray),
    pytest.param('launchpad', marks=pytest.mark.launchpad),
]
ASCII = {'LC_ALL': 'C', 'PYTHONCOERCECLOCALE': '0', 'PYTHONUTF8': '0', 'PYTHONIOENCODING': 'ascii'}
BROKEN = """
from impala_jax.environments.catch import Catch

class Broken(Catch):
    def step(self, action):
        raise ValueError('schön: ' + __file__)
"""


def shell(tmp_path, redirections, *arguments, environment=None):
    """A run whose standard streams a shell has closed."""
    command = ['launch/local.py', '--config', 'configs/catch.py', '--workdir', str(tmp_path / 'run'), *arguments]
    inherited = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'}
    return subprocess.run(
        ['sh', '-c', f'exec "$@" {redirections}', 'sh', sys.executable, *command],
        cwd=ROOT,
        env=inherited | {'PYTHONPATH': str(ROOT), 'RUN_MARK': str(tmp_path)} | (environment or {}),
        capture_output=True,
        timeout=240,
    )


@pytest.mark.parametrize('redirections', ['2>&-', '1>&-', '1>&- 2>&-', '0<&- 1>&- 2>&-'])
def test_a_reason_is_said_where_it_can_be(redirections, tmp_path):
    result = shell(tmp_path, redirections, *SMALL, '--runtime', 'nope')
    assert result.returncode == 1
    if redirections.count('>') < 2:
        assert b"error: unknown runtime 'nope'" in result.stdout + result.stderr
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('runtime', RUNTIMES)
def test_a_run_without_streams_writes_its_files_only(runtime, tmp_path):
    """A file opened in place of a closed stream would receive what libraries write there."""
    result = shell(tmp_path, '0<&- 1>&- 2>&-', *SMALL, '--runtime', runtime)
    assert result.returncode == 0
    assert rows_of(tmp_path / 'run')[-1]['frames'] == 1600
    lines = (tmp_path / 'run' / 'metrics.jsonl').read_bytes().splitlines()
    assert len(rows_of(tmp_path / 'run')) == len(lines)


def test_a_failure_is_reported_in_ascii(tmp_path):
    result = fails_in_ascii('', 'threads', tmp_path)
    assert b'the last time at step 1: ValueError: sch' in result.stderr.strip().splitlines()[-1], result.stderr


@pytest.mark.parametrize('runtime', RUNTIMES)
def test_a_failure_without_standard_error_is_reported(runtime, tmp_path):
    result = fails_in_ascii('2>&-', runtime, tmp_path)
    assert b'the last time at step 1: ValueError: sch' in result.stdout, result.stdout


def fails_in_ascii(redirections, runtime, tmp_path):
    """A run whose traceback names a folder that the locale cannot encode."""
    folder = tmp_path / 'übung'
    folder.mkdir()
    (folder / 'broken.py').write_text(BROKEN, encoding='utf-8')
    result = shell(
        tmp_path,
        redirections,
        *[*SMALL, '--runtime', runtime, '--environment.name', 'broken:Broken', '--environment.processes', '1'],
        environment=ASCII | {'PYTHONPATH': f'{ROOT}:{folder}'},
    )
    assert result.returncode == 1
    assert not marked_processes(tmp_path)
    return result


def test_a_workdir_that_the_locale_cannot_name_is_refused_at_once(tmp_path):
    result = shell(tmp_path / 'ü', '', *SMALL, '--runtime', 'threads', environment=ASCII)
    (line,) = result.stderr.splitlines()
    assert result.returncode == 1 and b'this name needs UTF-8, but the locale is ascii; set LC_ALL=C.UTF-8' in line
    assert not (tmp_path / 'ü').exists()


def test_a_workdir_of_other_letters(tmp_path):
    assert run(small(), tmp_path / 'übung', 'threads').learner_steps == 10
    unreadable = tmp_path / os.fsdecode(b'\xff')
    with pytest.raises(ConfigError, match='needs UTF-8'):
        run(small(), unreadable, 'threads')
    shutil.copytree(tmp_path / 'übung', unreadable)
    with pytest.raises(ConfigError, match='needs UTF-8'):  # And not that its checkpoints are damaged.
        evaluate(unreadable)

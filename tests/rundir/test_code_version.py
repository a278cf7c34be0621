"""What programs that work on one run must have in common, and what may differ."""

from pathlib import Path

import pytest

import impala_jax
from impala_jax.kernels import cpu
from impala_jax.rundir.code_version import SUFFIXES, code_version

PACKAGE = Path(impala_jax.__file__).parent


@pytest.fixture
def version_of(tmp_path, monkeypatch):
    """The version of a package with one source, one kernel and one table, and with other content in one file."""

    def version(name='', content=''):
        files = {'__init__.py': '', 'kernels.cc': 'int a;', 'data/scores.csv': '1,2'}
        files |= {name: content} if name else {}
        folder = tmp_path / f'{name} {content}'.replace('/', ' ')
        for path, text in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text)
        monkeypatch.setattr(impala_jax, '__file__', str(folder / '__init__.py'))
        return code_version.__wrapped__()

    return version


@pytest.mark.parametrize(
    ('name', 'content'), [('__init__.py', '#'), ('kernels.cc', 'int b;'), ('data/scores.csv', '1,3'), ('b.py', '')]
)
def test_everything_that_computes_counts(version_of, name, content):
    assert version_of(name, content) != version_of() == version_of('__init__.py', '')


@pytest.mark.parametrize(
    'name', ['_kernels.cpython-310-x86_64-linux-gnu.so', '__pycache__/a.cpython-310.pyc', 'configs/catch.py']
)
def test_processors_and_configurations_that_come_along_may_differ(version_of, name):
    assert version_of(name, 'compiled') == version_of()


def test_every_kind_of_file_is_known():
    files = (path for path in PACKAGE.rglob('*') if path.is_file() and '__pycache__' not in path.parts)
    # `py.typed` is empty, and only tells type checkers that the package has types.
    assert {path.suffix for path in files} - {'.so', '.typed'} == set(SUFFIXES)


@pytest.mark.skipif(bool(cpu.REASON), reason=f'kernels {cpu.REASON}')
def test_kernels_of_another_source_are_not_loaded(tmp_path, monkeypatch):
    """As after a pull without an installation: XLA's convolutions are right, and old kernels need not be."""
    source = (PACKAGE / 'kernels' / 'kernels.cc').read_bytes()
    monkeypatch.setattr(cpu, '__file__', str(tmp_path / 'cpu.py'))
    (tmp_path / 'kernels.cc').write_bytes(source)
    assert not cpu._load()
    (tmp_path / 'kernels.cc').write_bytes(source + b'// Mended.')
    assert cpu._load() == 'compiled from a different kernels.cc: reinstall this project'

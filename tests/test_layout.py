"""Where tests stand, and what they share."""

import ast
import collections
import re
from pathlib import Path

from tests.helpers.programs import ROOT

TESTS = ROOT / 'tests'
PACKAGE = ROOT / 'impala_jax'
FILES = [path for path in sorted(TESTS.rglob('*.py')) if 'stand_ins' not in path.parts]
WITHOUT_A_WING = {'', 'core', 'runs', 'chaos'}  # The product, the package's top, whole runs, and broken runs.


def imports_of(path):
    """Names that a program imports, and those that the programs import that it holds as texts."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f'{node.module or ""}.{name.name}' for name in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            for line in re.findall(r'^ *(?:from|import) .*$', node.value, re.MULTILINE):
                yield from re.findall(r'[\w.]+', line)


def test_nothing_imports_a_test_module():
    """A test module that is imported by another drags its tests along; what they share stands in tests/helpers."""
    found = {
        str(path.relative_to(ROOT)): names
        for path in FILES
        if (names := [name for name in imports_of(path) if re.search(r'\btest_\w+', name)])
    }
    assert not found
    assert 'tests.helpers.programs.ROOT' in imports_of(Path(__file__)), 'imports are not found'


def test_tests_of_a_module_stand_in_its_wing():
    """tests/rundir/test_lock.py tests impala_jax/rundir/lock.py; tests/core the modules at the package's top."""
    wings = collections.defaultdict(set)  # by the names of their modules
    folders = set(WITHOUT_A_WING)
    for module in PACKAGE.rglob('*.py'):
        folder = str(module.parent.relative_to(PACKAGE)).replace('.', 'core')
        folders.add(folder)
        wings[module.stem].add(folder)
        wings[module.parent.name] |= {folder, str(Path(folder).parent)}  # Of a package as a whole.
    for test in (path.relative_to(TESTS) for path in FILES if path.name.startswith('test_')):
        folder = str(test.parent).removeprefix('.')
        assert folder in folders, f'tests/{test}: impala_jax has no {folder}'
        expected = wings.get(test.stem.removeprefix('test_'), {folder})
        assert folder in expected, f'tests/{test} belongs to tests/{" or tests/".join(expected)}'


def test_every_folder_is_a_package():
    """Else pytest takes two files of one name for the same module."""
    assert {path.parent for path in FILES} == {path.parent for path in FILES if path.name == '__init__.py'}

"""The pins, the extras, and which module may import which."""

import ast
import functools
import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import impala_jax
from tests.helpers.programs import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it.

PACKAGE = ROOT / 'impala_jax'
PINS = sorted((ROOT / 'requirements').glob('py*.txt'))

# The package's layers. Each of these modules may import those of the sets named after it, and no others of the table,
# directly or by way of other modules.
LAYERS = {
    'types': set(),
    'config': set(),
    'data': set(),
    'networks': {'types', 'config'},
    'agent': {'types', 'config', 'networks'},
    'environments': {'types', 'config', 'data'},
    'trajectory_queue': {'types', 'config'},
    'parameter_store': {'types', 'config'},
    'vtrace': {'types', 'config', 'networks', 'agent'},
    'popart': {'types', 'config'},
    'loss': {'types', 'config', 'networks', 'agent', 'vtrace'},
    'inference': {'types', 'config', 'networks', 'agent'},
    'optimizer': {'types', 'config'},
    'learner': {
        'types',
        'config',
        'optimizer',
        'networks',
        'agent',
        'vtrace',
        'popart',
        'loss',
        'trajectory_queue',
        'parameter_store',
    },
    'actor': {'types', 'config', 'data', 'networks', 'agent', 'environments', 'trajectory_queue', 'parameter_store'},
}
TOP = {'runtimes', 'studies', 'cli', '__main__'}  # May import everything below; nothing below imports them.
SEAMS = {'impala_jax.trajectory_queue', 'impala_jax.parameter_store'}
# By runtime: what only its modules import.
OF_RUNTIMES = {
    r'runtimes/(launchpad|reverb)': {'launchpad', 'reverb', 'tensorflow', 'courier'},
    'ray_runtime/': {'ray'},
}


def _module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


MODULES = {_module_name(path): path for path in sorted(PACKAGE.rglob('*.py'))}


def _imports(tree: ast.AST, module: str, is_package: bool) -> set[str]:
    """Dotted names of what is imported anywhere in `tree`; `from a import b` gives a and a.b."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ''
            if node.level:
                parents = module.split('.')[: None if is_package and node.level == 1 else -node.level + is_package]
                base = '.'.join([*parents, *filter(None, [node.module])])
            names.add(base)
            names.update(f'{base}.{alias.name}' for alias in node.names)
    return names


@functools.cache
def _graph() -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports, at its top or inside a function."""
    graph = {}
    for module, path in MODULES.items():
        found = _imports(ast.parse(path.read_text(encoding='utf-8')), module, path.name == '__init__.py')
        graph[module] = {name for name in found if name in MODULES} - {module, 'impala_jax'}
    return graph


def _part(module: str) -> str:
    """'impala_jax.environments.catch' -> 'environments'."""
    return module.split('.')[1] if '.' in module else ''


def _reachable(graph: dict[str, set[str]], start: str) -> dict[str, list[str]]:
    """Module -> a way there from `start`."""
    ways, todo = {start: [start]}, [start]
    while todo:
        module = todo.pop()
        for other in graph[module] - ways.keys():
            ways[other] = [*ways[module], other]
            todo.append(other)
    return ways


@pytest.mark.parametrize('module', sorted(set(MODULES) - {'impala_jax'}))
def test_imports_point_one_way(module):
    part = _part(module)
    for other, way in _reachable(_graph(), module).items():
        if _part(other) == part or part in TOP:
            continue
        assert _part(other) not in TOP, f'{" -> ".join(way)}: {part} may not depend on {_part(other)}'
        if part in LAYERS and _part(other) in LAYERS:
            assert _part(other) in LAYERS[part], f'{" -> ".join(way)}: {part} may not depend on {_part(other)}'


def test_imports_are_found_at_all():
    graph = _graph()
    assert 'impala_jax.networks' in graph['impala_jax.agent']
    tree = ast.parse('from . import a\nfrom .b import c\nimport impala_jax.d\ndef f():\n    from ..e import g')
    found = _imports(tree, 'impala_jax.runtimes.x', False)
    assert found >= {'impala_jax.runtimes.a', 'impala_jax.runtimes.b', 'impala_jax.d', 'impala_jax.e'}
    assert 'impala_jax.runtimes.a' in _imports(tree, 'impala_jax.runtimes', True)


def test_actor_and_learner_do_not_know_each_other():
    graph = _graph()
    assert 'impala_jax.learner' not in _reachable(graph, 'impala_jax.actor')
    assert 'impala_jax.actor' not in _reachable(graph, 'impala_jax.learner')


@pytest.mark.parametrize('part', 'types networks agent vtrace loss popart optimizer frame_stacks learner'.split())
def test_what_is_pure_knows_nothing_of_files_configurations_of_runs_or_runtimes(part):
    """Neither checkpoints, metrics, populations, nor what makes the parts of a run."""
    reached = {_part(module) for module in _reachable(_graph(), f'impala_jax.{part}')}
    assert not reached & {'rundir', 'training', 'build', 'runtimes', 'studies', 'evaluation', 'cli', 'environments'}


@pytest.mark.parametrize('module', ['impala_jax.actor', 'impala_jax.learner'])
def test_actor_and_learner_know_only_the_protocols(module):
    """Neither a transport nor an implementation of the queue or the store."""
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding='utf-8'))):
        if isinstance(node, ast.ImportFrom) and node.module in SEAMS:
            for alias in node.names:
                assert not re.match(r'(Local|Replay|Reverb)', alias.name), f'{module} imports {alias.name}'


@pytest.mark.parametrize('module', sorted(MODULES))
def test_only_a_runtime_imports_its_engine(module):
    path = MODULES[module]
    found = {name.split('.')[0] for name in _imports(ast.parse(path.read_text(encoding='utf-8')), module, False)}
    for owner, packages in OF_RUNTIMES.items():
        if not re.search(owner, path.as_posix()):
            assert not found & packages


def test_nothing_in_the_package_imports_scripts_configs_or_tests():
    for module, path in MODULES.items():
        found = {name.split('.')[0] for name in _imports(ast.parse(path.read_text(encoding='utf-8')), module, False)}
        assert not found & {'launch', 'configs', 'tests', 'benchmarks'}, module


def test_importing_the_package_loads_no_engine():
    code = f"""
import sys
import impala_jax, impala_jax.learner, impala_jax.actor, impala_jax.runtimes.threads, impala_jax.runtimes.lockstep
print(sorted({set.union(*OF_RUNTIMES.values())!r} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == '[]'


def test_there_are_pins_for_every_supported_python():
    stems = [path.stem for path in PINS]
    assert stems == ['py310', 'py311', 'py312', 'py313', 'py314']
    (locked,) = re.findall(r'^LOCKED := (.+)$', (ROOT / 'Makefile').read_text(), re.MULTILINE)
    assert [f'py{version.replace(".", "")}' for version in locked.split()] == stems
    (tried,) = re.findall(r"^newest_first='(.+)'$", (ROOT / 'requirements' / 'install.sh').read_text(), re.MULTILINE)
    assert ['py310', *sorted(f'py{version.replace(".", "")}' for version in tried.split())] == stems
    assert METADATA['requires-python'] == '>=3.10,<3.15'


@pytest.mark.parametrize('path', PINS, ids=lambda path: path.stem)
def test_pins_are_exact_and_nothing_else(path):
    lines = path.read_text(encoding='utf-8').splitlines()
    for line in lines:
        assert re.fullmatch(r'[a-z0-9][a-z0-9._-]*==[0-9][a-z0-9.+]*', line), line
    names = [line.split('==')[0] for line in lines]
    assert len(names) == len(set(names))
    assert {'jax', 'jaxlib', 'flax', 'ale-py', 'imageio-ffmpeg', 'pytest', 'ruff', 'setuptools'} <= set(names)
    assert ('dm-launchpad' in names) == (path.stem == 'py310') == ('ray' not in names)  # They exclude each other.


PYPROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))
METADATA = PYPROJECT['project']


def _requirements(extra: str) -> list[Requirement]:
    """What an extra asks for; those of other extras that it names are in it."""
    found = []
    for requirement in map(Requirement, METADATA['optional-dependencies'][extra]):
        if requirement.name == METADATA['name']:
            found += [other for name in sorted(requirement.extras) for other in _requirements(name)]
        else:
            found.append(requirement)
    return found


def test_extras_include_what_they_promise():
    extras = {
        name: {str(requirement) for requirement in _requirements(name)} for name in METADATA['optional-dependencies']
    }
    assert set(extras) == {'atari', 'video', 'plot', 'launchpad', 'ray', 'dev', 'notebooks', 'tpu', 'cuda'}
    assert extras['plot'] | extras['video'] <= extras['dev'] & extras['notebooks']
    assert all('python_version < "3.11"' in requirement for requirement in extras['launchpad'])


@pytest.mark.parametrize('path', PINS, ids=lambda path: path.stem)
def test_pins_satisfy_the_requirements(path):
    """`make lock` was run after the last change of a requirement."""
    pins = dict(line.split('==') for line in path.read_text(encoding='utf-8').splitlines())
    environment = {'python_version': f'3.{path.stem.removeprefix("py3")}'}
    wanted = [*map(Requirement, METADATA['dependencies'])]
    extras = ['atari', 'video', 'dev', 'launchpad', *(['ray'] if path.stem != 'py310' else [])]
    wanted += [requirement for extra in extras for requirement in _requirements(extra)]
    for requirement in wanted:
        if requirement.marker is None or requirement.marker.evaluate(environment):
            name = re.sub(r'[-_.]+', '-', requirement.name).lower()
            assert pins[name] in requirement.specifier, requirement


def test_what_builds_the_documentation_is_pinned_apart_from_the_package():
    """In a folder of its own, with whatever it needs: `make docs` installs it without resolving anything."""
    pins = dict(line.split('==') for line in (ROOT / 'requirements' / 'docs.txt').read_text().splitlines())
    wanted = [Requirement(text) for text in PYPROJECT['dependency-groups']['docs']]
    assert {requirement.name for requirement in wanted} == {'furo', 'myst-parser', 'sphinx'}
    for requirement in wanted:
        assert pins[requirement.name] in requirement.specifier, requirement
    for path in PINS:
        assert 'sphinx' not in path.read_text(), path


def test_the_version_stands_in_one_place():
    assert 'version' in METADATA['dynamic'] and 'version' not in METADATA
    changes = (ROOT / 'CHANGELOG.md').read_text(encoding='utf-8')
    assert re.findall(r'^## (\d+\.\d+\.\d+)', changes, re.MULTILINE)[0] == impala_jax.__version__


def test_the_licence_is_the_whole_text_of_apache_2():
    content = (ROOT / 'LICENSE').read_bytes()
    assert hashlib.sha256(content).hexdigest() == 'cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30'
    assert METADATA['license'] == 'Apache-2.0'

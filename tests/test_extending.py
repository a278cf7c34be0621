"""docs/extending.md: its examples run as they stand, and what they bring is used."""

import re
import shlex
from pathlib import Path

import pytest

import impala_jax
from impala_jax.config import import_object
from impala_jax.rundir.rows import read_rows
from tests.helpers import programs
from tests.helpers.programs import finish

BLOCKS = re.findall(
    r'^```(\w+)\n(.*?)^```', (programs.ROOT / 'docs' / 'extending.md').read_text(), re.MULTILINE | re.DOTALL
)
PYTHON = [block for language, block in BLOCKS if language == 'python']
FILES = {block.split('\n', 1)[0][2:]: block for block in PYTHON if block.startswith('# my_')}
COMMANDS = [block.strip() for language, block in BLOCKS if language == 'bash']
SMALL = '--runtime lockstep --total-frames 1600 --evaluator.episodes 0 --actor.num-actors 1 --actor.num-envs 16'.split()


@pytest.fixture
def folder(tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    return tmp_path


def test_by_hand_it_learns(tmp_path):
    (example,) = [block for block in PYTHON if block not in FILES.values()]
    script = tmp_path / 'example.py'
    script.write_text(example)
    code, stdout, stderr = finish(programs.start(tmp_path, str(script)))
    assert code == 0, stderr
    assert float(stdout) > 0.8  # A random policy's is -0.6.


@pytest.mark.parametrize('command', COMMANDS, ids=lambda command: re.search(r'runs/(\w+)', command)[1])
def test_by_name(command, folder):
    arguments = [word.replace('runs/', f'{folder}/runs/') for word in shlex.split(command)[1:]]
    process = programs.start(folder, *arguments, *SMALL, environment={'PYTHONPATH': f'{folder}:{programs.ROOT}'})
    code, _, stderr = finish(process)
    assert code == 0, stderr
    (workdir,) = (folder / 'runs').iterdir()
    row = read_rows(workdir / 'metrics.jsonl')[-1]
    assert ('logit_penalty' in row) == (workdir.name == 'my_loss')


@pytest.mark.parametrize(
    'option, reason',
    [
        ('--network', "network.module 'nowhere:Thing' cannot be imported: No module named 'nowhere'"),
        ('--loss', "loss.function 'nowhere:Thing' cannot be imported: No module named 'nowhere'"),
        ('--optimizer', "optimizer.name 'nowhere:Thing' cannot be imported: No module named 'nowhere'"),
    ],
)
def test_what_is_not_there_is_refused(option, reason, tmp_path):
    command = ['launch/local.py', '--config', 'configs/catch.py', '--workdir', str(tmp_path / 'run'), *SMALL]
    code, _, stderr = finish(programs.start(tmp_path, *command, option, 'nowhere:Thing'))
    assert (code, stderr.splitlines()[-1]) == (1, f'error: {reason}')
    assert not (tmp_path / 'run' / 'config.json').exists()


@pytest.mark.parametrize('path', [':Thing', '.nowhere:Thing', 'nowhere:'])
def test_what_is_not_a_name_is_refused(path):
    with pytest.raises(impala_jax.ConfigError, match='is not module:name; give both names, the module absolute$'):
        import_object('loss.function', path)


def test_all_public_names_are_there():
    assert dir(impala_jax) == impala_jax.__all__
    for name in impala_jax.__all__:
        getattr(impala_jax, name)
    assert 'os' not in dir(impala_jax)
    assert Path(impala_jax.networks.__file__).name == 'networks.py'

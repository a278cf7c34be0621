"""Parts of a user's own by name: refusals, and the closed list of names. test_readme.py runs docs/extending.md."""

from pathlib import Path

import pytest

import impala_jax
from impala_jax.config import import_object
from tests.helpers.programs import finish, start

SMALL = '--runtime lockstep --total-frames 1600 --evaluator.episodes 0 --actor.num-actors 1 --actor.num-envs 16'.split()


@pytest.mark.parametrize(
    'option, field',
    [('--network', 'network.module'), ('--loss', 'loss.function'), ('--optimizer', 'optimizer.name')],
)
def test_what_is_not_there_is_refused(option, field, tmp_path):
    reason = (
        f"{field} 'nowhere:Thing': cannot import 'nowhere' (No module named 'nowhere'); is its folder on PYTHONPATH?"
    )
    command = ['launch/local.py', '--config', 'configs/catch.py', '--workdir', str(tmp_path / 'run'), *SMALL]
    code, _, stderr = finish(start(tmp_path, *command, option, 'nowhere:Thing'))
    assert (code, stderr.splitlines()[-1]) == (1, f'error: {reason}')
    assert not (tmp_path / 'run' / 'config.json').exists()


@pytest.mark.parametrize('path', [':Thing', '.nowhere:Thing', 'nowhere:'])
def test_what_is_not_a_name_is_refused(path):
    with pytest.raises(impala_jax.ConfigError, match='is not module:name; give both names, with an absolute module$'):
        import_object('loss.function', path)


def test_all_public_names_are_there():
    assert dir(impala_jax) == impala_jax.__all__
    for name in impala_jax.__all__:
        getattr(impala_jax, name)
    assert 'os' not in dir(impala_jax)
    assert Path(impala_jax.networks.__file__).name == 'networks.py'

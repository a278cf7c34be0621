"""A run's config.json."""

import json
import math

import pytest

from impala_jax import config as config_lib
from impala_jax.config import Config, ConfigError
from impala_jax.rundir.run_config import write_run_config
from tests.helpers.metrics import CONFIG


def test_the_configuration_is_written_whole(tmp_path):
    config = Config(seed=3, vtrace=config_lib.VTraceConfig(rho_bar=math.inf))
    write_run_config(tmp_path / 'runs' / 'a', config)
    content = json.loads((tmp_path / 'runs' / 'a' / 'config.json').read_text())
    assert config_lib.from_dict(content['config']) == config and content['format'] == 2
    assert content['versions'].keys() >= {'python', 'jax', 'jaxlib', 'flax', 'optax', 'rlax', 'chex', 'numpy'}
    assert [path.name for path in (tmp_path / 'runs' / 'a').iterdir()] == ['config.json']


def test_a_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(ConfigError, match='cannot write to --workdir .*file/run: Not a directory; give') as error:
        write_run_config(tmp_path / 'file' / 'run', CONFIG)
    assert '\n' not in str(error.value)

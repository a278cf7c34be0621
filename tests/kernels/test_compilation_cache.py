"""Compiled programs are kept on disk, and a second process finds them."""

import json
import os
import subprocess
import sys

import pytest

_PROGRAM = """
import json, sys
import jax
from jax import monitoring
events = []
monitoring.register_event_listener(lambda event, **_: events.append(event))
jax.numpy.zeros(3).block_until_ready()  # JAX has looked for a cache already.
from impala_jax.kernels import compilation_cache
folder = compilation_cache.enable_cache()
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
print(json.dumps([str(folder), float(jax.jit(lambda x: (x ** 3).sum())(jax.numpy.arange(4.0))),
                  '/jax/compilation_cache/cache_hits' in events]))
"""


def _run(**environment):
    process = subprocess.run(
        [sys.executable, '-W', 'error', '-c', _PROGRAM],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    assert process.stderr == ''
    return json.loads(process.stdout)


def test_a_second_process_compiles_nothing(tmp_path):
    folder, value, hit = _run(XDG_CACHE_HOME=str(tmp_path))
    assert folder.startswith(str(tmp_path / 'impala_jax'))
    assert (value, hit) == (36.0, False)
    assert _run(XDG_CACHE_HOME=str(tmp_path)) == [folder, 36.0, True]


@pytest.mark.parametrize(
    'environment, folder',
    [
        ({'JAX_COMPILATION_CACHE_DIR': '{tmp}/own'}, '{tmp}/own'),
        ({'JAX_ENABLE_COMPILATION_CACHE': 'false'}, 'None'),
        ({'XDG_CACHE_HOME': '/proc/nowhere'}, 'None'),
    ],
    ids=['own', 'forbidden', 'unwritable'],
)
def test_variables_of_the_environment_decide_the_folder(tmp_path, environment, folder):
    environment = {name: value.format(tmp=tmp_path) for name, value in environment.items()}
    assert _run(**{'XDG_CACHE_HOME': str(tmp_path / 'default'), **environment})[:2] == [
        folder.format(tmp=tmp_path),
        36.0,
    ]
    assert not (tmp_path / 'default').exists()

"""Learning is proved by solving: the shipped configurations reach what the README says of them."""

import dataclasses
from pathlib import Path

import pytest

import impala_jax
from impala_jax.command_line import load_config_file

CONFIGS = Path(__file__).parent.parent / 'configs'


def one_device(name):
    """A shipped configuration on one device, as a person has, and not on the tests' eight."""
    config = load_config_file(str(CONFIGS / name))
    return dataclasses.replace(config, learner=dataclasses.replace(config.learner, num_devices=1))


def test_catch_is_solved(tmp_path):
    """In lockstep, so that the result is the same every time."""
    result = impala_jax.run(one_device('catch.py'), tmp_path, runtime='lockstep')
    assert len(result.evaluation.returns) == 100
    assert result.evaluation.mean >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize('runtime', ['threads', pytest.param('launchpad', marks=pytest.mark.launchpad)])
def test_catch_is_solved_asynchronously(runtime, tmp_path):
    assert impala_jax.run(one_device('catch.py'), tmp_path, runtime=runtime).evaluation.mean >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize('core, solved', [('lstm', True), ('feedforward', False)])
def test_memory_catch_needs_the_lstm(core, solved, tmp_path):
    config = one_device('catch_lstm.py')
    config = dataclasses.replace(config, network=dataclasses.replace(config.network, core=core))
    mean = impala_jax.run(config, tmp_path, runtime='lockstep').evaluation.mean
    assert mean >= 0.95 if solved else mean < 0

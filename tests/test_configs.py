"""The shipped configurations."""

import numpy as np
import pytest

from impala_jax.cli import command_line
from impala_jax.cli.command_line import load_config_file
from impala_jax.environments import suites
from tests.helpers.programs import ROOT


@pytest.mark.parametrize('path', sorted((ROOT / 'configs').glob('*.py')), ids=lambda path: path.stem)
def test_every_configuration_file_is_valid(path):
    load_config_file(str(path))


def test_the_papers_settings():
    """Appendices D and G, and the released code's of DMLab-30."""
    atari, dmlab = (load_config_file(str(ROOT / 'configs' / name)) for name in ('atari57.py', 'dmlab30.py'))
    for config in (atari, dmlab):
        assert (config.network.torso, config.network.lstm_size) == ('deep', 256)
        assert (config.loss.discount, config.loss.baseline_cost, config.learner.batch_size) == (0.99, 0.5, 32)
        optimizer = config.optimizer
        assert (optimizer.name, optimizer.decay, optimizer.momentum, optimizer.schedule) == (
            'rmsprop',
            0.99,
            0,
            'linear',
        )
        assert config.environment.frames_per_step == 4
        suites.assign(config.environment, config.actor.num_actors, config.actor.num_envs)
    assert (atari.network.core, dmlab.network.core) == ('feedforward', 'lstm')
    assert (atari.total_frames, atari.learner.unroll_length, atari.loss.reward_clip) == (11_400_000_000, 20, 'unit')
    assert (atari.loss.entropy_cost, atari.optimizer.learning_rate, atari.optimizer.epsilon) == (0.01, 6e-4, 0.01)
    assert atari.optimizer.max_grad_norm == 40
    assert (dmlab.total_frames, dmlab.learner.unroll_length, dmlab.loss.reward_clip) == (10**10, 100, 'asymmetric')
    assert dmlab.loss.entropy_cost == 0.0033391318945337044
    assert (dmlab.optimizer.learning_rate, dmlab.optimizer.epsilon) == (0.00031866995608948655, 0.1)
    assert dmlab.optimizer.max_grad_norm == np.inf
    # The slowest trajectory of real levels that was thought of, see the file.
    assert dmlab.timeout_s >= 2 * 5 * 45 + 5 * 8 + 110


@pytest.mark.parametrize('path', sorted((ROOT / 'configs' / 'ablations').glob('*.py')), ids=lambda path: path.stem)
def test_the_ready_grids_are_valid(path):
    if path.stem == 'tasks':
        pytest.skip('no grid')
    cells = command_line.load_grid_file(str(path)).cells()
    assert len(cells) > 10 and len({cell.config.seed for cell in cells}) >= 5

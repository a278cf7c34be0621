"""What tests of commands share."""

import pytest

from impala_jax.rundir import checkpoint
from tests.helpers.commands import train


@pytest.fixture
def finished(call, tmp_path):
    """Workdir of a run that has ended, with two checkpoints."""
    assert train(call, tmp_path)[0] == 0
    assert train(call, tmp_path, '--total-frames', '800')[0] == 0
    assert checkpoint.steps(tmp_path / 'checkpoints') == [10, 20]
    return tmp_path

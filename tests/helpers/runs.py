"""Whole runs through the command line: started, and what they left."""

from pathlib import Path

import jax
import numpy as np
import pytest

from impala_jax.rundir import checkpoint
from impala_jax.rundir.files import METRICS
from impala_jax.rundir.lock import LOCK
from impala_jax.rundir.rows import read_rows
from tests.helpers import programs
from tests.helpers.programs import finish

TIMES = ('wall_time_s', 'frames_per_second', 'learner_wait_fraction')
# 40 updates of 4 trajectories of 10 steps; a row after each fourth.
SMALL = (
    '--total-frames 1600 --learner.batch-size 4 --learner.unroll-length 10 --learner.num-devices 1 '
    '--evaluator.episodes 0 --actor.num-actors 2 --actor.num-envs 2 --logging.interval-updates 4 --network.mlp-sizes 16'
).split()
LOCKSTEP = ['--runtime', 'lockstep', '--total-frames', '4000', *SMALL[2:]]  # 100 updates
# The same frames in half a batch of them; the replay overflows.
REPLAY = [*LOCKSTEP, *'--learner.batch-size 8 --replay.fraction 0.5 --replay.capacity 300 --policy-lag 3'.split()]
ENDLESS = ['--total-frames', '100000000', '--evaluator.episodes', '0', '--learner.num-devices', '1']

RUNTIMES = [
    ['--runtime', 'threads'],
    pytest.param(['--runtime', 'ray'], marks=pytest.mark.ray),
    pytest.param(['--runtime', 'launchpad'], marks=pytest.mark.launchpad),
    # Every process imports TensorFlow, one after the other where there are two cores.
    pytest.param(
        ['--runtime', 'launchpad', '--launch-type', 'local_mp'], marks=[pytest.mark.launchpad, pytest.mark.slow]
    ),
]
IDS = ['threads', 'ray', 'launchpad', 'launchpad_processes']


def start(workdir, *arguments, config='configs/catch.py', **kwargs):
    """A run in a process of its own, whose streams are pipes."""
    command = ['launch/local.py', '--config', config, '--workdir', str(workdir), *arguments]
    return programs.start(workdir, *command, **kwargs)


def train(workdir, *arguments, **kwargs):
    """Output of a run that ends well, and says nothing on standard error."""
    code, stdout, stderr = finish(start(workdir, *arguments, **kwargs))
    assert code == 0, stdout + stderr
    assert not stderr.strip(), stderr
    return stdout


def rows_of(workdir):
    """Rows of a run, which may still be going on."""
    return read_rows(Path(workdir) / METRICS)


def learned(workdir):
    """Rows without times and the last state of the learner, which must repeat."""
    rows = [{name: value for name, value in row.items() if name not in TIMES} for row in rows_of(workdir)]
    return rows, checkpoint.restore(workdir, {'learner': None}).state


def assert_same(a, b):
    """Asserts that two results of `learned` are bit-identical."""
    assert a[0] == b[0]
    jax.tree.map(np.testing.assert_array_equal, a[1], b[1])


def files(folder):
    """Contents and times of all files in a folder but the lock, which is touched every few seconds."""
    return {
        path: (path.read_bytes(), path.stat().st_mtime_ns) if path.is_file() else None
        for path in Path(folder).rglob('*')
        if path.name != LOCK
    }

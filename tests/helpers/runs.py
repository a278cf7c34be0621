"""Whole runs through the command line: started, and what they left."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from impala_jax.rundir import checkpoint
from impala_jax.rundir.lock import LOCK
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
    pytest.param(['--runtime', 'launchpad'], marks=pytest.mark.launchpad),
    # Every process imports TensorFlow, one after the other where there are two cores.
    pytest.param(
        ['--runtime', 'launchpad', '--launch-type', 'local_mp'], marks=[pytest.mark.launchpad, pytest.mark.slow]
    ),
]
IDS = ['threads', 'launchpad', 'launchpad_processes']


def start(workdir, *arguments, config='configs/catch.py', **kwargs):
    command = ['launch/local.py', '--config', config, '--workdir', str(workdir), *arguments]
    return programs.start(workdir, *command, **kwargs)


def train(workdir, *arguments, **kwargs):
    code, stdout, stderr = finish(start(workdir, *arguments, **kwargs))
    assert code == 0, stdout + stderr
    assert not stderr.strip(), stderr
    return stdout


def rows_of(workdir):
    path = Path(workdir) / 'metrics.jsonl'
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith('}')] if path.exists() else []


def learned(workdir):
    """What must repeat: rows without times, and the last parameters."""
    rows = [{name: value for name, value in row.items() if name not in TIMES} for row in rows_of(workdir)]
    return rows, checkpoint.restore(workdir, {'learner': None}).state


def assert_same(a, b):
    assert a[0] == b[0]
    jax.tree.map(np.testing.assert_array_equal, a[1], b[1])


def files(folder):
    """All there is in a folder but the lock, which is touched every few seconds: contents and times of files."""
    return {
        path: (path.read_bytes(), path.stat().st_mtime_ns) if path.is_file() else None
        for path in Path(folder).rglob('*')
        if path.name != LOCK
    }

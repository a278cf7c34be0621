"""Environments can end or hold up their worker, never the program; and nothing of theirs outlives it."""

import logging
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from impala_jax import environments
from impala_jax.config import ConfigError, EnvironmentConfig
from impala_jax.types import FIRST, MID
from tests.helpers import programs
from tests.helpers.programs import ROOT, alive, children, wait_for


def make(name, num_envs=1, **kwargs):
    return environments.make(EnvironmentConfig(name, processes=1), num_envs, 0, **kwargs)


@pytest.mark.parametrize(
    'name, reason',
    [
        ('tests.helpers.hostile:exits', 'cannot be built: SystemExit: 0'),
        ('tests.helpers.hostile:aborts', r'cannot be built: the worker .* died with exit code -6 \(SIGABRT\)'),
        ('tests.helpers.hostile:vanishes', 'cannot be built: the worker .* died with exit code 0'),
        ('tests.helpers.hostile:interrupts', 'cannot be built: the worker .* died with exit code'),
        (
            'tests.helpers.hostile:hangs',
            "cannot be used: waited 4 s for the worker process .* to answer 'spec'; raise timeout_s",
        ),
        ('tests.helpers.exits_when_imported:make', 'cannot be built: SystemExit: 0'),
    ],
)
def test_the_first_environment_cannot_end_the_program(name, reason):
    with pytest.raises(ConfigError, match=f"environment '{name}' {reason}") as error:
        environments.spec(EnvironmentConfig(name), timeout_s=4.0 if 'hangs' in name else 60.0)
    assert '\n' not in str(error.value)
    assert not children()


def test_a_spec_that_the_first_observation_contradicts_is_refused():
    with pytest.raises(
        ConfigError, match=r"'tests.helpers.factories:wrong_shape' cannot be used: .* but its spec says \(3,\)"
    ) as error:
        environments.spec(EnvironmentConfig('tests.helpers.factories:wrong_shape'))
    assert '\n' not in str(error.value)


def test_one_that_exits_in_a_step_is_rebuilt(caplog):
    environment = make('tests.helpers.hostile:exits_later', max_episode_steps=None)
    try:
        environment.reset()
        types = [int(environment.step([0])[0].step_type[0]) for _ in range(4)]
        assert types == [MID, MID, FIRST, MID]
        assert (
            "environment 0 of 'tests.helpers.hostile:exits_later' failed at step 3 and is rebuilt: SystemExit: 0"
            in caplog.messages
        )
    finally:
        environment.close()


def test_warnings_of_workers_reach_the_program(caplog):
    with caplog.at_level(logging.WARNING):
        environment = make('tests.helpers.factories:scripted')
        environment.reset()
        environment.step([3])
        environment.close()
    (record,) = caplog.records
    assert record.name == 'impala_jax.environments.serial' and record.levelno == logging.WARNING
    assert record.getMessage() == (
        "environment 0 of 'tests.helpers.factories:scripted' failed at step 1 and is rebuilt: "
        'ZeroDivisionError: as the action said'
    )


def test_an_environment_may_have_children():
    environment = make('tests.helpers.hostile:multiprocesses', num_envs=2)
    environment.reset()
    for _ in range(12):
        timestep, _ = environment.step([1, 1])
    start = time.monotonic()
    environment.close()
    assert time.monotonic() - start < 5
    assert not children()


@pytest.mark.parametrize('name', ['tests.helpers.hostile:starts', 'tests.helpers.hostile:starts_a_session'])
def test_children_of_an_environment_end_with_it(name):
    environment = make(name)
    pid = int(environment.reset().observation[0, 0, 0])
    assert alive(pid)
    environment.close()
    wait_for(lambda: not alive(pid), timeout_s=10)


@pytest.mark.parametrize('name', ['tests.helpers.hostile:starts', 'tests.helpers.hostile:starts_a_session'])
def test_a_killed_worker_whose_children_hold_its_pipe_is_noticed_at_once(name, caplog):
    environment = make(name)
    try:
        pid = int(environment.reset().observation[0, 0, 0])
        os.kill(children(name)[0], signal.SIGKILL)
        start = time.monotonic()
        timestep, info = environment.step([0])
        assert time.monotonic() - start < 10
        assert timestep.step_type == [FIRST] and info.restarts == [1]
        wait_for(lambda: not alive(pid), timeout_s=10)
    finally:
        environment.close()


PARENT = """
import sys, time
from impala_jax.config import EnvironmentConfig
from impala_jax.environments import make
from tests.helpers.programs import children
environment = make(EnvironmentConfig(sys.argv[2], processes=1), 1, 0)
print(int(environment.reset().observation[0, 0, 0]), *children(), flush=True)
if sys.argv[1] == 'raise':
    raise ZeroDivisionError
time.sleep(60)
"""


@pytest.mark.parametrize('name', ['tests.helpers.hostile:starts', 'tests.helpers.hostile:starts_a_session'])
@pytest.mark.parametrize('ending', ['kill', 'terminate', 'raise'])
def test_nothing_of_an_environment_outlives_the_program(tmp_path, ending, name):
    script = tmp_path / 'parent.py'
    script.write_text(PARENT)
    parent = programs.start(tmp_path, str(script), ending, name)
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    if ending != 'raise':
        getattr(parent, ending)()
    parent.wait(20)
    wait_for(lambda: not any(map(alive, pids)), timeout_s=20)
    parent.communicate(timeout=10)


def test_signals_to_the_process_group_are_left_to_the_program(tmp_path):
    """SLURM, timeout and systemd signal whole groups: workers must live until the program has stopped."""
    script = tmp_path / 'parent.py'
    script.write_text("""
import signal, sys
from impala_jax.config import EnvironmentConfig
from impala_jax.environments import make
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, lambda *_: None)
environment = make(EnvironmentConfig('tests.helpers.factories:scripted', processes=2), 2, 0)
environment.reset()
print('ready', flush=True)
for line in sys.stdin:
    timestep, info = environment.step([0, 0])
    print(info.restarts.sum(), flush=True)
environment.close()
""")
    parent = subprocess.Popen(
        [sys.executable, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
    )
    assert parent.stdin is not None and parent.stdout is not None
    assert parent.stdout.readline() == 'ready\n'
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.killpg(parent.pid, number)
        parent.stdin.write('step\n')
        parent.stdin.flush()
        assert parent.stdout.readline() == '0\n'
    parent.communicate(timeout=20)
    assert parent.returncode == 0


def test_a_message_that_never_ends_is_bounded():
    """A worker that was stopped while it wrote an answer."""
    environment = make('tests.helpers.factories:scripted', timeout_s=60.0)
    try:
        environment.reset()
        environment._workers[0]._timeout_s = 2.0  # After the start, which takes longer.
        (worker,) = children()
        os.kill(worker, signal.SIGSTOP)
        with pytest.raises(TimeoutError, match="waited 2 s for the worker process .* to answer 'step'"):
            environment.step(np.zeros(1, np.int32))
    finally:
        environment.close()
    assert not children()

"""Environments that fail, worker processes that die, and what is left of them."""

import logging
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from impala_jax.config import ConfigError, EnvironmentConfig
from impala_jax.environments import EnvironmentFailure, make
from impala_jax.environments.processes import ProcessVectorEnvironment
from impala_jax.environments.serial import SerialVectorEnvironment
from impala_jax.types import FIRST, LAST, MID
from tests.helpers import factories
from tests.helpers.factories import DIE, GO_ON, HANG, RAISE, TERMINATE
from tests.helpers.programs import ROOT, alive, children, wait_for

N = 4
CONFIG = EnvironmentConfig('tests.helpers.factories:scripted', max_failures=3, processes=2)


def serial(factory=factories.scripted):
    return SerialVectorEnvironment(factory, N, seed=0, name='scripted', max_failures=3)


def processes(timeout_s=60.0):
    return ProcessVectorEnvironment(CONFIG, N, seed=0, processes=2, timeout_s=timeout_s)


@pytest.fixture(params=[serial, processes])
def environment(request):
    environment = request.param()
    environment.reset()
    yield environment
    environment.close()


def seeds(timestep):
    return timestep.observation['pair'][0][:, 0]


def test_a_failure_rebuilds_one_environment(environment, caplog):
    before, _ = environment.step([GO_ON] * N)
    with caplog.at_level(logging.WARNING):
        timestep, info = environment.step([GO_ON, RAISE, GO_ON, GO_ON])
    np.testing.assert_array_equal(timestep.step_type, [MID, FIRST, MID, MID])
    np.testing.assert_array_equal(timestep.reward, [2, 0, 2, 2])
    np.testing.assert_array_equal(timestep.discount, 1)
    np.testing.assert_array_equal(timestep.previous_action, 0)
    np.testing.assert_array_equal(info.restarts, [0, 1, 0, 0])
    assert not info.episode_ended.any()
    np.testing.assert_array_equal(seeds(timestep) == seeds(before), [True, False, True, True])
    if isinstance(environment, SerialVectorEnvironment):
        assert 'environment 1' in caplog.text
        assert 'ZeroDivisionError: as the action said' in caplog.text

    timestep, info = environment.step([TERMINATE] * N)  # What it received before it failed is not counted.
    np.testing.assert_array_equal(timestep.step_type, LAST)
    np.testing.assert_array_equal(info.episode_return, [1 + 2 + 3, 1, 1 + 2 + 3, 1 + 2 + 3])
    np.testing.assert_array_equal(info.restarts, 0)


def test_too_many_failures_end_the_run_with_the_traceback(environment):
    environment.step([GO_ON, RAISE, GO_ON, GO_ON])
    environment.step([GO_ON, RAISE, GO_ON, GO_ON])
    with pytest.raises(EnvironmentFailure, match='environment 1 .* failed 3 times') as failure:
        environment.step([GO_ON, RAISE, GO_ON, GO_ON])
    assert 'ZeroDivisionError: as the action said' in str(failure.value)
    if isinstance(environment, SerialVectorEnvironment):
        cause = failure.value.__cause__
        assert isinstance(cause, ZeroDivisionError)
        assert cause.__traceback__ is not None
    else:
        assert re.search(r'factories.py", line \d+, in step', str(failure.value))


def test_a_finished_episode_forgives_failures(environment):
    for _ in range(4):
        environment.step([RAISE] * N)
        environment.step([RAISE] * N)
        environment.step([TERMINATE] * N)
        timestep, _ = environment.step([GO_ON] * N)
        np.testing.assert_array_equal(timestep.step_type, FIRST)


def test_failures_are_counted_for_each_environment(environment):
    for i in (0, 1, 2, 3, 3, 2, 1, 0):
        environment.step(np.where(np.arange(N) == i, RAISE, GO_ON))


def test_a_restored_state_remembers_failures(environment):
    environment.step([RAISE, GO_ON, GO_ON, GO_ON])
    environment.step([RAISE, GO_ON, GO_ON, GO_ON])
    state = environment.get_state()
    environment.step([TERMINATE] * N)
    environment.set_state(state)
    with pytest.raises(EnvironmentFailure, match='environment 0'):
        environment.step([RAISE, GO_ON, GO_ON, GO_ON])


def test_an_environment_that_cannot_be_rebuilt_ends_the_run():
    built = []

    def factory(seed):
        built.append(seed)
        if len(built) > N:
            raise OSError('the level is gone')
        return factories.scripted(seed)

    environment = serial(factory)
    environment.reset()
    with pytest.raises(EnvironmentFailure, match='OSError: the level is gone'):
        environment.step([GO_ON, GO_ON, GO_ON, RAISE])
    assert len(set(built)) == N + 2  # Every attempt has a seed of its own.


def test_an_observation_unlike_the_spec_is_a_failure():
    environment = serial(factories.wrong_shape)
    with pytest.raises(EnvironmentFailure, match=r'shape \(\), but its spec says \(3,\)'):
        environment.reset()


def test_a_dead_worker_is_replaced(caplog):
    environment = processes()
    try:
        before = environment.reset()
        environment.step([GO_ON] * N)
        timestep, info = environment.step([GO_ON, GO_ON, GO_ON, DIE])
        np.testing.assert_array_equal(timestep.step_type, [MID, MID, FIRST, FIRST])
        np.testing.assert_array_equal(timestep.observation['count'], [2, 2, 0, 0])
        np.testing.assert_array_equal(info.restarts, [0, 0, 1, 1])
        assert not info.episode_ended.any()
        np.testing.assert_array_equal(seeds(timestep) == seeds(before), [True, True, False, False])
        assert 'worker process of environments 2 to 3' in caplog.text
        assert 'exit code 7' in caplog.text

        os.kill(children('environments 0 to 1')[0], signal.SIGKILL)
        wait_for(lambda: not children('environments 0 to 1'))
        timestep, info = environment.step([GO_ON] * N)
        np.testing.assert_array_equal(timestep.step_type, [FIRST, FIRST, MID, MID])
        np.testing.assert_array_equal(info.restarts, [1, 1, 0, 0])
        assert 'exit code -9' in caplog.text
    finally:
        environment.close()


def test_a_worker_that_keeps_dying_ends_the_run():
    environment = processes()
    try:
        environment.reset()
        environment.step([GO_ON, GO_ON, GO_ON, DIE])
        environment.step([TERMINATE] * N)  # forgives
        environment.step([GO_ON] * N)
        environment.step([GO_ON, GO_ON, GO_ON, DIE])
        environment.step([GO_ON, GO_ON, GO_ON, DIE])
        with pytest.raises(EnvironmentFailure, match='environments 2 to 3 .* exit code 7.* 3 times'):
            environment.step([GO_ON, GO_ON, GO_ON, DIE])
    finally:
        environment.close()


def test_a_silent_worker_is_an_error_that_says_who_waits_for_whom():
    environment = processes()
    for worker in environment._workers:
        worker._timeout_s = 0.5  # after the start, which takes longer
    environment.reset()
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"waited 0.5 s for the worker process of environments 0 to 1 .* 'step'"):
        environment.step([GO_ON, HANG, GO_ON, GO_ON])
    environment.close()
    assert time.monotonic() - start < 15
    assert not children()


def test_close_leaves_no_process_and_does_no_harm_twice():
    environment = make(CONFIG, N, 0)
    environment.reset()
    assert len(children()) == 2
    environment.close()
    environment.close()
    assert not children()


def test_a_failed_start_leaves_no_process():
    with pytest.raises(ConfigError, match='no such level'):
        make(EnvironmentConfig('tests.helpers.factories:raises_when_built', processes=2), N, 0)
    assert not children()


PARENT = """
import signal, sys, time
# A shell that runs the tests in the background has SIGINT ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
from impala_jax.config import EnvironmentConfig
from impala_jax.environments import make
from tests.helpers.programs import children
if __name__ == '__main__':
    environment = make(EnvironmentConfig('catch', processes=2), 2, 0)
    print(*children(), flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize('ending', [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_parent(tmp_path, ending):
    script = tmp_path / 'parent.py'
    script.write_text(PARENT)
    parent = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, cwd=ROOT, env={**os.environ, 'PYTHONPATH': str(ROOT)}
    )
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    for pid in pids:
        os.kill(pid, signal.SIGINT)  # as a terminal's interrupt does; workers leave it to their parent
    time.sleep(0.3)
    assert all(map(alive, pids))
    parent.send_signal(ending)
    parent.wait(20)
    parent.stdout.close()
    deadline = time.monotonic() + 20
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, pids))


def test_workers_do_not_run_the_script(tmp_path):
    """Neither what it does, which here would start workers without end, nor what it imports, such as JAX."""
    script = tmp_path / 'script.py'
    script.write_text("""
print('once', flush=True)
from impala_jax.config import EnvironmentConfig
from impala_jax.environments import make
environment = make(EnvironmentConfig('catch', processes=2), 2, 0)
environment.reset()
environment.close()
""")
    done = subprocess.run(
        [sys.executable, str(script)], env={**os.environ, 'PYTHONPATH': str(ROOT)}, capture_output=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b'once\n', b'')

"""Catch with the troubles of real simulators, by name: `chaos.environments:steady`. Each lives in a worker process.

CHAOS_SWITCH names a file; while it exists the trouble of CHAOS_TROUBLE happens after CHAOS_AFTER steps of a process.
With CHAOS_ONCE it happens to one process only, the one that removes the file.
"""

import os
import subprocess
import sys
import time

import numpy as np

from impala_jax.environments.catch import Catch

LONG_RESET_S = 15
_IGNORES_SIGTERM = 'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)'

_num_steps = 0  # of this process
_children = []  # Not of an environment: those can then be saved.


class Troubled(Catch):
    """Raises, exits, dies, hangs or returns nonsense in a step, as the process's environment says."""

    def step(self, action):
        global _num_steps
        _num_steps += 1
        timestep = super().step(action)
        if 'CHAOS_TROUBLE' not in os.environ or _num_steps <= int(os.environ['CHAOS_AFTER']) or not _is_due():
            return timestep
        open(f'{os.environ["CHAOS_SWITCH"]}.struck', 'a').close()  # Tells the harness.
        trouble = os.environ['CHAOS_TROUBLE']
        if trouble == 'raises':
            raise ZeroDivisionError('the emulator is on fire')
        if trouble == 'exits':
            sys.exit(0)
        if trouble == 'dies':
            os._exit(7)
        if trouble == 'aborts':
            os.abort()
        if trouble == 'hangs':
            time.sleep(600)
        return timestep._replace(observation=np.full((3,), np.nan, np.float64))  # `nonsense`


class SlowToReset(Catch):
    """While the switch is there, a reset waits for a shell that inherits all files, as map compilers are started."""

    def reset(self):
        if os.path.exists(os.environ['CHAOS_SWITCH']):
            subprocess.run(['sh', '-c', f'sleep {LONG_RESET_S}; true'], close_fds=False, check=False)
        return super().reset()


def steady(seed):
    return Troubled(seed=seed)


def slow(seed):
    return SlowToReset(seed=seed)


def children(seed):
    """Has a child in a session of its own that ignores SIGTERM, as some engines are started."""
    _children.append(subprocess.Popen([sys.executable, '-c', _IGNORES_SIGTERM], start_new_session=True))
    return Troubled(seed=seed)


def _is_due():
    if 'CHAOS_ONCE' not in os.environ:
        return os.path.exists(os.environ['CHAOS_SWITCH'])
    try:
        os.unlink(os.environ['CHAOS_SWITCH'])
    except FileNotFoundError:
        return False
    return True

"""`impala doctor`: shows what works on this machine, and the command that repairs what does not.

Each check uses the real library in its own process, so a crash or a hang becomes a line of the table. The exit code is
0 if the core works, even if optional parts are missing. This module imports no third-party package but rich, because
any other one may be broken.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple, NoReturn

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from impala_jax.system import stopping
from impala_jax.system.machine import PARENT, START, kill_marked, own_folder

_TIMEOUT_S = 30.0
_CHECKOUT = Path(__file__).resolve().parent.parent.parent
_PINS = _CHECKOUT / 'requirements' / f'py{sys.version_info.major}{sys.version_info.minor}.txt'
_PIP = f'{sys.executable} -m pip install'
_PIP_PINNED = f'{_PIP} -c {_PINS}' if _PINS.exists() else _PIP
if (_CHECKOUT / 'Makefile').exists():
    _ANEW = _LAUNCHPAD = f'make -C {_CHECKOUT} clean-venv install'
else:
    _ANEW = f'install impala_jax again, as it was installed before, with {_PIP} --force-reinstall'
    _LAUNCHPAD = f"{_PIP} 'impala_jax[launchpad]'  (Python 3.10)"
_RAY = f"{_PIP_PINNED} 'ray>=2.60'  (not beside Launchpad, which needs an older protobuf)"


class Check(NamedTuple):
    """One line of the table."""

    name: str
    code: str  # Python; prints the details
    remedy: str  # A command, or a sentence if no command can repair it.
    required: bool = False
    cpu: bool = True  # False: run on JAX's default devices.


class Result(NamedTuple):
    """Outcome of one check."""

    check: Check
    state: str  # 'works', 'missing' or 'fails'
    detail: str  # one line


def _steps(name: str) -> str:
    """Code that builds and steps an environment of this package."""
    return f"""
import numpy as np
from impala_jax import environments
from impala_jax.config import EnvironmentConfig
from impala_jax.environments.base import leaves
environment = environments.make(EnvironmentConfig(name={name!r}, level_cache=''), 1, seed=0)
environment.reset()
timestep, _ = environment.step(np.zeros(1, np.int32))
print('{name} steps, observations', *(f'{{leaf.shape[1:]}} {{leaf.dtype}}' for leaf in leaves(timestep.observation)))
environment.close()
"""


CHECKS = (
    Check(
        'Python',
        """
import platform, sys
assert (3, 10) <= sys.version_info[:2] <= (3, 14), f'Python {platform.python_version()}; 3.10 to 3.14 are supported'
print(platform.python_version(), platform.machine(), platform.system())
""",
        f'install a Python of 3.10 to 3.14, then: {_ANEW}',
        required=True,
    ),
    Check(
        'JAX',
        """
import jax
devices = [f'{device.platform}:{device.id} ({device.device_kind})' for device in jax.devices()]
print(jax.__version__, 'on', jax.default_backend() + ';', len(devices), 'device(s):', ', '.join(devices))
""",
        f"{_ANEW}  (for a GPU: {_PIP} 'jax[cuda12]'; for a TPU: {_PIP} 'jax[tpu]')",
        required=True,
        cpu=False,
    ),
    Check(
        'core packages',
        """
from importlib.metadata import version
import chex, dm_env, flax, numpy, optax, orbax.checkpoint, rich, tensorboardX, tyro
import impala_jax
print(*(f'{name} {version(name)}' for name in ('flax', 'optax', 'chex', 'orbax-checkpoint', 'numpy')), sep=', ')
""",
        _ANEW,
        required=True,
    ),
    Check(
        'rlax',
        """
import warnings
warnings.simplefilter('ignore')
import jax.numpy as jnp, rlax
from impala_jax import vtrace
row = jnp.arange(1.0, 7.0).reshape(3, 2) / 7
arrays = dict(log_rhos=row, discounts=row, rewards=row, values=row, bootstrap_value=row[0])
ours, theirs = (vtrace.from_importance_weights(**arrays, implementation=name) for name in ('auto', 'rlax'))
difference = float(jnp.max(jnp.abs(jnp.array(ours) - jnp.array(theirs))))
assert difference < 1e-5, difference
print(f'{rlax.__version__}; imported only for --vtrace.implementation rlax, which agrees with auto to {difference:.0e}')
""",
        _ANEW,
    ),
    Check(
        'CPU kernels',
        """
import jax.numpy as jnp
from impala_jax.kernels import cpu
if cpu.REASON:
    raise ModuleNotFoundError(cpu.REASON)
convolution = cpu.Convolution(stride=1, padding='SAME', relu=False, pool=False)
outputs, _ = cpu.conv(convolution, jnp.ones([1, 8, 8, 16]), jnp.ones([3, 3, 16, 16]), jnp.zeros(16))
assert outputs[0, 4, 4, 0] == 9 * 16, outputs[0, 4, 4, 0]
print('convolutions compiled for this processor')
""",
        f'convolutions on the CPU take several times as long; on Linux and x86-64 install g++, then: {_ANEW}',
    ),
    Check(
        'runtime launchpad',
        """
import sys
if sys.version_info >= (3, 11):
    raise ModuleNotFoundError('dm-launchpad exists for Python 3.10 only')
import reverb, launchpad
from importlib.metadata import version
server = reverb.Server([reverb.Table.queue('queue', 1)])
reverb.Client(f'localhost:{server.port}').server_info(timeout=10)
server.stop()
print('Launchpad', version('dm-launchpad') + '; a Reverb', version('dm-reverb'), 'server answers')
""",
        _LAUNCHPAD,
    ),
    Check(
        'runtime ray',
        """
import threading, ray
from impala_jax.runtimes.ray_runtime.engine import LocalEngine
engine = LocalEngine(1, 0, 60.0)
try:
    engine.connect(threading.Event())
    assert ray.get(ray.remote(lambda: 42).remote(), timeout=60) == 42
finally:
    engine.close()
print(f'Ray {ray.__version__}; an engine starts, and its processes answer')
""",
        _RAY,
    ),
    Check('runtime threads', "import impala_jax.runtimes.threads; print('imports')", _ANEW, required=True),
    Check('runtime lockstep', "import impala_jax.runtimes.lockstep; print('imports')", _ANEW, required=True),
    Check('runtime device', "import impala_jax.runtimes.device; print('imports')", _ANEW, required=True),
    Check('Catch', _steps('catch'), _ANEW, required=True),
    Check('Atari', _steps('atari/pong'), f"{_PIP_PINNED} 'ale-py>=0.12' 'gymnasium>=1.1'"),
    Check(
        'Gymnasium',
        """
import gymnasium
environment = gymnasium.make('CartPole-v1')
environment.reset(seed=0)
environment.step(0)
environment.close()
print(gymnasium.__version__ + '; CartPole-v1 steps')
""",
        f'{_PIP_PINNED} gymnasium',
    ),
    Check(
        'bsuite',
        """
import bsuite
environment = bsuite.load_from_id('catch/0')
environment.reset()
environment.step(0)
from importlib.metadata import version
print(version('bsuite') + '; catch/0 steps')
""",
        f'{_PIP_PINNED} bsuite',
    ),
    Check(
        'DeepMind Lab',
        # In the parent process first: its error distinguishes a missing module from a failing one.
        """
from impala_jax.config import EnvironmentConfig
from impala_jax.environments import dmlab
dmlab.factory(EnvironmentConfig(name='dmlab/rooms_watermaze', level_cache=''))
"""
        + _steps('dmlab/rooms_watermaze'),
        'not available from a package index; see docs/dmlab.md',
    ),
    Check(
        'video',
        """
import os, tempfile
import imageio.v2 as imageio
import numpy as np
with tempfile.TemporaryDirectory() as directory:
    path = os.path.join(directory, 'video.mp4')
    imageio.mimwrite(path, [np.zeros((32, 32, 3), np.uint8)] * 4, fps=4)
    print('mp4 written,', os.path.getsize(path), 'bytes')
""",
        f"{_PIP_PINNED} imageio imageio-ffmpeg 'pillow>=11'",
    ),
    Check(
        'figures',
        """
import io
import matplotlib
from matplotlib.figure import Figure
Figure().savefig(io.BytesIO(), format='png')
print('matplotlib', matplotlib.__version__, 'draws')
""",
        f"{_PIP_PINNED} 'matplotlib>=3.9'",
    ),
)

# Prints an exception of a check as one line; exit code 3 means that a module is not installed.
_WRAPPER = """
import sys, warnings
warnings.simplefilter('ignore')
try:
    exec(sys.argv[1], {'__name__': '__main__'})
except BaseException as error:
    cause, missing = error, False
    while cause is not None and not missing:
        missing, cause = isinstance(cause, ModuleNotFoundError), cause.__cause__
    print(f'{type(error).__name__}: ' + ' '.join(str(error).split()), flush=True)
    sys.exit(3 if missing else 1)
"""


def run_check(check: Check, timeout_s: float = _TIMEOUT_S) -> Result:
    """Runs one check in its own process; a failure there is part of the result, never an exception."""
    home = own_folder()
    env = {**os.environ, 'TF_CPP_MIN_LOG_LEVEL': '3', PARENT: home, START: home}
    if check.cpu:
        env['JAX_PLATFORMS'] = 'cpu'
    try:
        # For files that a check leaves behind, such as those of Reverb's checkpointer.
        with tempfile.TemporaryDirectory(dir=home, ignore_cleanup_errors=True) as folder:
            done = subprocess.run(
                [sys.executable, '-c', _WRAPPER, check.code],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors='replace',
                timeout=timeout_s,
                env={**env, 'TMPDIR': folder},
                start_new_session=True,  # Ctrl-C reaches the parent process only.
            )
    except subprocess.TimeoutExpired:
        return Result(check, 'fails', f'no answer within {timeout_s:g} s')
    except OSError as error:
        return Result(check, 'fails', str(error))
    printed = (done.stdout.strip() or done.stderr.strip()).splitlines()
    detail = printed[-1] if printed else ''
    if done.returncode < 0:
        return Result(check, 'fails', f'killed by {signal.Signals(-done.returncode).name}. {detail}'.strip())
    state = {0: 'works', 3: 'missing'}.get(done.returncode, 'fails')
    return Result(check, state, detail or f'exit code {done.returncode}')


def diagnose(checks: tuple[Check, ...] = CHECKS) -> list[Result]:
    """Runs all checks, one per core at a time; an interrupt ends the running ones."""
    with concurrent.futures.ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        futures = [pool.submit(run_check, check) for check in checks]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            while not all(future.done() for future in futures):  # A check may be about to start its process.
                kill_marked(f'{START}={own_folder()}')
                time.sleep(0.1)
            raise


def report(results: list[Result], console: Console) -> bool:
    """Prints the table and, below it, each problem with its remedy; returns whether the core works."""
    table = Table(title='impala_jax on this machine', title_justify='left')
    table.add_column('what', no_wrap=True)
    table.add_column('state', no_wrap=True)
    table.add_column('details', overflow='fold')
    problems = [result for result in results if result.state != 'works']
    for result in results:
        color = {'works': 'green', 'missing': 'yellow'}.get(result.state, 'red')
        if result in problems and result.check.required:
            color = 'red'
        detail = result.detail if result.state == 'works' else 'see below'
        table.add_row(escape(result.check.name), f'[{color}]{result.state}[/]', escape(detail))
    console.print(table)
    for name, state, detail, remedy in ((r.check.name, r.state, r.detail, r.check.remedy) for r in problems):
        # Not wrapped, so that the command can be copied.
        console.print(f'{name} {state}: {detail}\n    {remedy}', markup=False, highlight=False, soft_wrap=True)
    works = not any(result.check.required for result in problems)
    console.print('The core works.' if works else 'The core does not work; see above.', highlight=False)
    return works


def main() -> NoReturn:
    """Runs the command and ends the process."""
    argparse.ArgumentParser(description='Shows what works on this machine, and how to repair the rest.').parse_args()
    stopping.interruptible()
    try:
        status, line = (0 if report(diagnose(), Console()) else 1), ''
    except BaseException as error:
        stopped = stopping.cause(error)
        if stopped is None:
            raise
        status, line = 128 + stopped.signal_number, str(stopped)
    stopping.end(status, line)

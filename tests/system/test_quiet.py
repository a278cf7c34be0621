"""Libraries are quiet."""

import os
import subprocess
import sys

from tests.helpers.programs import ROOT

_NOISE = """
import logging, warnings
from impala_jax.system.quiet import quiet_libraries
quiet_libraries()
from absl import logging as absl_logging
absl_logging.warning('noise of a library')
logging.getLogger('jax._src.xla_bridge').warning('No GPU/TPU found, falling back to CPU. (noise)')
logging.getLogger('jax._src.xla_bridge').warning('An NVIDIA GPU may be present, but JAX has no use for a GPU: kept')
warnings.warn_explicit('noise', UserWarning, 'gymnasium/core.py', 1, module='gymnasium.core')
warnings.warn('noise', DeprecationWarning)
warnings.warn('\\x1b[33mWARN: noise of gymnasium')
warnings.warn('kept, ours')
absl_logging.error('kept, an error')
logging.getLogger('impala_jax.actor').warning('kept, ours too')
"""


def test_libraries_are_quiet_and_we_are_not():
    result = subprocess.run(
        [sys.executable, '-c', _NOISE],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != 'PYTHONWARNINGS'},
        timeout=120,
        check=True,
    )
    output = result.stdout + result.stderr
    assert 'noise' not in output, output
    for message in ('a GPU: kept', 'kept, ours', 'kept, an error', 'kept, ours too'):
        assert message in output, output

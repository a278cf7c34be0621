"""An environment that waits in each step until a file is there."""

import os
import time
from pathlib import Path

from impala_jax.environments.catch import Catch

FREE = 'PACED_UNTIL'
"""Environment variable with the path of the file."""


class Paced(Catch):
    """Takes 50 ms per step until the file exists."""

    def step(self, action):
        if not Path(os.environ[FREE]).exists():
            time.sleep(0.05)
        return super().step(action)


def paced(seed):
    return Paced(seed=seed)

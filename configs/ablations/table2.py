"""Grid for table 2 of the paper on small tasks: four corrections, without and with replay.

The actors lag 8 updates behind, similar to asynchronous actors.
"""

import tasks

from impala_jax.studies.ablation import Grid


def get_grid() -> Grid:
    """Returns the grid."""
    return Grid(
        tasks=tasks.TASKS,
        axes={
            'vtrace.correction': ('vtrace', 'one_step_is', 'epsilon_correction', 'none'),
            'replay.fraction': (0.0, 0.5),
            'policy_lag': (8,),
            'seed': tasks.SEEDS,
        },
    )

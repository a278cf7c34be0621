"""Table 2 of the paper on small tasks: four corrections, without and with replay.

Without replay the actors lag 8 updates behind, as asynchronous ones do.
"""

import tasks

from impala_jax.studies.ablation import Grid


def get_grid() -> Grid:
    return Grid(
        tasks=tasks.TASKS,
        axes={
            'vtrace.correction': ('vtrace', 'one_step_is', 'epsilon_correction', 'none'),
            'replay.fraction': (0.0, 0.5),
            'policy_lag': (8,),
            'seed': (0, 1, 2, 3, 4),
        },
    )

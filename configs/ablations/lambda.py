"""Grid over lambda, the factor of the trace coefficients (remark 2), from one-step targets (0) to V-trace (1)."""

import tasks

from impala_jax.studies.ablation import Grid


def get_grid() -> Grid:
    """Returns the grid."""
    return Grid(
        tasks=tasks.TASKS,
        axes={
            'vtrace.lambda': (0.0, 0.5, 0.8, 0.9, 0.95, 1.0),
            'replay.fraction': (0.5,),
            'policy_lag': (8,),
            'seed': tasks.SEEDS,
        },
    )

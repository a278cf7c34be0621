"""lambda multiplies the traces (remark 2): between one-step targets (0) and V-trace of n steps (1)."""

import tasks

from impala_jax.studies.ablation import Grid


def get_grid() -> Grid:
    return Grid(
        tasks=tasks.TASKS,
        axes={
            'vtrace.lambda': (0.0, 0.5, 0.8, 0.9, 0.95, 1.0),
            'replay.fraction': (0.5,),
            'policy_lag': (8,),
            'seed': (0, 1, 2, 3, 4),
        },
    )

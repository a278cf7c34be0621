"""Grid over policy lag, without and with replay: how far off policy each correction works."""

import tasks

from impala_jax.studies.ablation import Grid


def get_grid() -> Grid:
    """Returns the grid."""
    return Grid(
        tasks=tasks.TASKS,
        axes={
            'vtrace.correction': ('vtrace', 'one_step_is', 'epsilon_correction', 'none'),
            'replay.fraction': (0.0, 0.5),
            'policy_lag': (0, 2, 8, 32, 128),
            'seed': tasks.SEEDS,
        },
    )

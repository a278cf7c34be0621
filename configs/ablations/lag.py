"""Grid over policy lag: the lag that each correction tolerates."""

import tasks

from impala_jax.studies.ablation import Grid


def get_grid() -> Grid:
    """Returns the grid."""
    return Grid(
        tasks=tasks.TASKS,
        axes={
            'vtrace.correction': ('vtrace', 'one_step_is', 'epsilon_correction', 'none'),
            'policy_lag': (0, 4, 16, 64),
            'seed': (0, 1, 2, 3, 4),
        },
    )

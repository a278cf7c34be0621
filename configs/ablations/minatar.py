"""Grid over policy lag and replay on two games of MinAtar, for the runtime `device`. Five seeds: CPUs take minutes."""

import tasks

from impala_jax.studies.ablation import Grid


def get_grid() -> Grid:
    """Returns the grid."""
    return Grid(
        tasks=tasks.GAMES,
        axes={
            'vtrace.correction': ('vtrace', 'one_step_is', 'epsilon_correction', 'none'),
            'replay.fraction': (0.0, 0.5),
            'policy_lag': (0, 32),
            'seed': tasks.SEEDS[:5],
        },
    )

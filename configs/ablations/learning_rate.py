"""Grid over hyperparameters for each correction, as in the paper's figure of ranked sets (launch/plot.py ranked)."""

import tasks

from impala_jax.studies.ablation import Grid


def get_grid() -> Grid:
    """Returns the grid."""
    return Grid(
        tasks={'catch': tasks.CATCH},
        axes={
            'vtrace.correction': ('vtrace', 'one_step_is', 'epsilon_correction', 'none'),
            'optimizer.learning_rate': (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
            'loss.entropy_cost': (1e-4, 1e-3, 1e-2),
            'replay.fraction': (0.5,),
            'policy_lag': (8,),
            'seed': tasks.SEEDS[:10],
        },
    )

"""Grid over the truncation levels of V-trace, far off policy: rho_bar determines the fixed point, c_bar the speed.

The paper tried rho_bar in {1, 10, 100} and never varied c_bar. The cells with c_bar > rho_bar need --outside-theory.
"""

import dataclasses
import math

import tasks

from impala_jax.studies.ablation import Grid

LEVELS = (1.0, 2.0, 4.0, 10.0, 100.0, math.inf)


def get_grid() -> Grid:
    """Returns the grid."""
    return Grid(
        tasks={name: dataclasses.replace(tasks.TASKS[name], total_frames=50_000) for name in ('catch', 'cartpole')},
        axes={
            'seed': tasks.SEEDS[:10],  # first, so that an interrupted sweep has complete grids
            'vtrace.rho_bar': LEVELS,
            'vtrace.c_bar': LEVELS,
            'replay.fraction': (0.5,),
            'policy_lag': (8, 32),
        },
    )

"""The truncation levels of V-trace, far off policy: rho_bar decides what is converged to, c_bar how fast.

The paper tried rho_bar in {1, 10, 100} and never varied c_bar. The cells with c_bar > rho_bar need --outside-theory.
The budget is half of what Catch needs, so that the returns tell how fast it was learned.
"""

import dataclasses
import math

import tasks

from impala_jax.ablation import Grid

LEVELS = (1.0, 2.0, 4.0, 10.0, 100.0, math.inf)


def get_grid() -> Grid:
    return Grid(
        tasks={'catch': dataclasses.replace(tasks.CATCH, total_frames=30_000)},
        axes={
            'vtrace.rho_bar': LEVELS,
            'vtrace.c_bar': LEVELS,
            'replay.fraction': (0.5,),
            'policy_lag': (32,),
            'seed': (0, 1, 2, 3, 4),
        },
    )

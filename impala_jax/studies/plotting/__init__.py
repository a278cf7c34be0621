"""Figures of runs and of sweeps; `launch/plot.py` draws them from the command line.

A sweep's table has one row for each log point of each cell, which is one run: first the column `cell` (its name) and
the fields of `Config` that were swept, by their dotted names, then `frames` and the metrics, among them `final_return`,
the mean return of the final evaluation, the same on every row of a cell.

Means are over runs that differ in nothing but their seed. Where another field would be averaged over in silence, the
functions refuse, and say which. Intervals are 95 % percentile bootstrap intervals over the seeds of a mean.

matplotlib is imported by the first figure only. A figure belongs to the caller, not to pyplot: save it with `save`,
or show it in a notebook after `%matplotlib inline`.
"""

from __future__ import annotations

from impala_jax.studies.plotting.bars import experts, suite
from impala_jax.studies.plotting.figures import FORMATS, check_output, save
from impala_jax.studies.plotting.frames import curves, learning_curve, pbt
from impala_jax.studies.plotting.grids import Matrix, heatmap
from impala_jax.studies.plotting.hyperparameters import bias_variance, ranked, sensitivity
from impala_jax.studies.plotting.tables import Table, left_out, read_table, select
from impala_jax.studies.plotting.text_tables import results_table
from impala_jax.studies.statistics import bootstrap_interval

__all__ = [
    'FORMATS',
    'Matrix',
    'Table',
    'bias_variance',
    'bootstrap_interval',
    'check_output',
    'curves',
    'experts',
    'heatmap',
    'learning_curve',
    'left_out',
    'pbt',
    'ranked',
    'read_table',
    'results_table',
    'save',
    'select',
    'sensitivity',
    'suite',
]

"""Figures of runs and sweeps; `launch/plot.py` draws them from the command line.

The table of a sweep has one row per log point of each cell, where a cell is one run. The first columns are `cell`, the
cell's name, and the swept fields of `Config`, by their dotted names. Then follow `frames` and the metrics, among them
`final_return`, the mean return of the final evaluation, which is the same in all rows of a cell.

Means are over runs that differ only in their seed. If a mean would include runs that differ in another field, the
functions raise an error that names the field. Intervals are 95 % percentile bootstrap intervals over seeds. Instead of
the mean, figures of sweeps can show the interquartile mean or the median (`STATISTICS`). With fewer than five seeds,
figures and tables say so, because intervals are then too narrow.

matplotlib is imported when the first figure is drawn. Figures are not registered with pyplot: save them with `save`, or
show them in a notebook after `%matplotlib inline`.
"""

from __future__ import annotations

from impala_jax.studies.plotting.bars import experts, suite
from impala_jax.studies.plotting.figures import FORMATS, check_output, save
from impala_jax.studies.plotting.frames import curves, learning_curve, pbt
from impala_jax.studies.plotting.grids import Matrix, heatmap
from impala_jax.studies.plotting.hyperparameters import bias_variance, ranked, sensitivity
from impala_jax.studies.plotting.profiles import profile, profile_table
from impala_jax.studies.plotting.tables import STATISTICS, Table, left_out, read_table, select
from impala_jax.studies.plotting.text_tables import results_table
from impala_jax.studies.statistics import bootstrap_interval

__all__ = [
    'FORMATS',
    'STATISTICS',
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
    'profile',
    'profile_table',
    'ranked',
    'read_table',
    'results_table',
    'save',
    'select',
    'sensitivity',
    'suite',
]

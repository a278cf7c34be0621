"""Tables of sweeps: reading them, and grouping their runs into means.

Means are over runs that differ only in their seed. If a mean would include runs that differ in another field,
`group_cells` raises an error that names the field.
"""

from __future__ import annotations

import collections
import csv
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from impala_jax.config import ConfigError, closest
from impala_jax.studies.plotting.labels import CORRECTIONS, plain_text
from impala_jax.studies.statistics import bootstrap_interval, interquartile_mean

Table = dict[str, np.ndarray]
"""Columns by name, each [rows], of float64 (NaN for empty entries in the file) or strings."""
STATISTICS = {'mean': 'mean', 'iqm': 'interquartile mean', 'median': 'median'}
"""Statistics over runs, and their names in figures and tables."""
_FUNCTIONS: dict[str, Callable[..., Any]] = {'mean': np.mean, 'iqm': interquartile_mean, 'median': np.median}
_POINTS = 500  # largest number of points of a mean curve
_ENOUGH_SEEDS = 5


class Cell(NamedTuple):
    """A run with its fields, and the log points that have a value of one metric."""

    name: str
    fields: dict[str, Any]
    frames: np.ndarray  # [N], ascending
    values: np.ndarray  # [N], finite

    @property
    def final(self) -> float:
        """The last value of the metric."""
        return float(self.values[-1])


def read_table(path: Path | str) -> Table:
    """Reads a sweep's `results.csv`.

    A column is numeric if all of its entries are numbers, including `inf`. Entries may only be missing in columns after
    `frames`.

    Raises:
      ConfigError: The file cannot be read, or is not a sweep's table.
    """
    path = Path(path)
    try:
        with path.open(newline='', encoding='utf-8') as file:
            header, *rows = list(csv.reader(file)) or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f'cannot read {path}: {getattr(error, "strerror", None) or error}') from error
    for name in ('cell', 'frames'):
        if name not in header:
            raise ConfigError(f'{path} is not a table of a sweep: it has no column {name!r}')
    if not rows:
        raise ConfigError(f'{path} has no rows')
    for number, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise ConfigError(f'{path}: row {number} has {len(row)} values for {len(header)} columns')
    table = {}
    for index, name in enumerate(header):
        column = [row[index] for row in rows]
        # Names of cells are hexadecimal, and some look like decimal numbers.
        numbers = None if name == 'cell' else _numbers(column, missing=index > header.index('frames'))
        table[name] = np.array(column) if numbers is None else numbers
    if table['frames'].dtype.kind != 'f' or np.isnan(table['frames']).any():
        raise ConfigError(f"{path}: the column 'frames' has a value that is not a number")
    return table


def select(table: Table, values: Mapping[str, Any]) -> Table:
    """Selects rows by the values of columns.

    Args:
      table: Table of a sweep.
      values: Value by column; it may be a string as in the file.

    Returns:
      A table of the rows in which all columns have these values.

    Raises:
      ConfigError: A column is unknown, or does not contain the value.
    """
    for name, wanted in values.items():
        column = _column(table, name)
        if column.dtype.kind == 'f':
            numbers = _numbers([str(wanted)], missing=False)
            keep = np.zeros(len(column), bool) if numbers is None else column == numbers
        else:
            keep = column == str(wanted)
        if not keep.any():
            held = ', '.join(plain_text(value) for value in _distinct(column)[:20])
            raise ConfigError(f'no row has {name}={wanted}; the values of {name} are {held}')
        table = {other: column[keep] for other, column in table.items()}
    return table


def left_out(table: Table, metric: str = 'final_return') -> list[str]:
    """Returns the cells without a value of `metric`, such as unfinished ones; figures of it do not include them.

    Raises:
      ConfigError: The column is unknown or not numeric.
    """
    known = set(table['cell'][np.isfinite(numeric_column(table, metric))])
    return [name for name in _distinct(table['cell']) if name not in known]


def field_values(table: Table, name: str | None) -> list[Any]:
    """Returns the values of a field in the order of display; [None] if `name` is None."""
    if name is None:
        return [None]
    values = _distinct(_column(table, name))
    if name == 'vtrace.correction' and set(values) <= set(CORRECTIONS):
        values.sort(key=list(CORRECTIONS).index)
    return values


def swept_fields(table: Table) -> list[str]:
    """Returns the swept fields: the columns before `frames`, without `cell`."""
    names = list(table)
    return [name for name in names[: names.index('frames')] if name != 'cell']


def cells_of(table: Table, metric: str) -> list[Cell]:
    """Returns the runs that have a value of `metric`."""
    fields, metric_column = swept_fields(table), numeric_column(table, metric)
    known = np.flatnonzero(np.isfinite(metric_column))
    known = known[np.argsort(table['frames'][known], kind='stable')]
    _, inverse = np.unique(table['cell'][known], return_inverse=True)
    cells = []
    for rows in np.split(known[np.argsort(inverse, kind='stable')], np.cumsum(np.bincount(inverse))[:-1]):
        if len(rows):
            values = {field: table[field][rows[0]].item() for field in fields}
            cells.append(Cell(str(table['cell'][rows[0]]), values, table['frames'][rows], metric_column[rows]))
    return cells


def group_cells(
    table: Table, metric: str, names: Sequence[str | None], over: Sequence[str]
) -> dict[tuple[Any, ...], list[Cell]]:
    """Groups runs by their values of the fields `names`, such that runs of a group differ only in the fields `over`.

    Args:
      table: Table of a sweep.
      metric: Name of a numeric column.
      names: Names of the fields to group by; the value for None is None.
      over: Names of the fields in which runs of a group may differ.

    Returns:
      Runs by their values of the fields `names`.

    Raises:
      ConfigError: A field or column is unknown, no run has a value of the metric, or runs of a group differ in another
        field.
    """
    fields = swept_fields(table)
    for name in [*names, *over]:
        # 'seed' is the default of `over`, and need not have been swept.
        if name is not None and name not in fields and (name != 'seed' or name in names):
            raise ConfigError(f'{name!r} is not a field of this sweep; {closest(name, fields)}')
    cells = cells_of(table, metric)
    if not cells:
        raise ConfigError(f'no run has a value of {metric!r} yet')
    groups: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        groups.setdefault(tuple(name if name is None else cell.fields[name] for name in names), []).append(cell)
    for field in fields:
        if field in names or field in over:
            continue
        for group in groups.values():
            values = {cell.fields[field] for cell in group}
            if len(values) > 1:
                raise ConfigError(
                    f'{field} varies within one mean ({", ".join(map(plain_text, sorted(values)))}): '
                    f'choose one with --where {field}=..., show it (as --panel), or average with --over'
                )
    return groups


class Estimate(NamedTuple):
    """A statistic over runs and its bootstrap interval, each [...]."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


def estimate(cells: Sequence[Cell], over: Sequence[str], statistic: str = 'mean', values: Any = None) -> Estimate:
    """Computes a statistic over runs and its bootstrap interval.

    Only seeds are resampled, because the values of the other fields in `over` were chosen.

    Args:
      cells: The runs.
      over: Names of the fields that are averaged over.
      statistic: Name of the statistic, in `STATISTICS`.
      values: Values of the runs, [runs, ...]; None for their last values.

    Returns:
      The statistic and its interval, each [...].
    """
    values = np.array([cell.final for cell in cells]) if values is None else values
    function = statistic_function(statistic)
    low, high = bootstrap_interval(values, strata=_strata(cells, over), statistic=function)
    return Estimate(function(values, axis=0), low, high)


def statistic_function(name: str) -> Callable[..., Any]:
    """Returns the function of (values, axis) that computes a statistic.

    Raises:
      ConfigError: The name is not in `STATISTICS`.
    """
    if name not in STATISTICS:
        raise ConfigError(f'{name!r} is not a statistic; choose {", ".join(STATISTICS)}')
    return _FUNCTIONS[name]


def caption(groups: Iterable[Sequence[Cell]], over: Sequence[str], statistic: str) -> str:
    """Returns the caption of a figure of these groups of runs: the statistic unless it is the mean, and `few_seeds`."""
    label = '' if statistic == 'mean' else STATISTICS[statistic]
    return '; '.join(filter(None, [label, few_seeds(groups, over)]))


def few_seeds(groups: Iterable[Sequence[Cell]], over: Sequence[str]) -> str:
    """Returns the warning that statistics over these groups of runs have fewer than five seeds; empty otherwise."""
    return few_seeds_text([count for cells in groups for count in collections.Counter(_strata(cells, over)).values()])


def few_seeds_text(counts: Sequence[int]) -> str:
    """Returns the warning for statistics with these numbers of seeds; empty if there are at least five everywhere."""
    fewest = min(counts)
    if fewest >= _ENOUGH_SEEDS:
        return ''
    seeds = f'{fewest} seed{"s" * (fewest > 1)}'
    return f'only {seeds}' if fewest == max(counts) else f'as few as {seeds}'


def _strata(cells: Sequence[Cell], over: Sequence[str]) -> list[Any]:
    return [tuple(cell.fields[name] for name in over if name != 'seed') for cell in cells]


def align(cells: Sequence[Cell]) -> tuple[np.ndarray, np.ndarray]:
    """Interpolates runs to common frames.

    Args:
      cells: The runs.

    Returns:
      Frames that all runs cover, [P], and the values there, [runs, P], interpolated between log points.

    Raises:
      ConfigError: The runs have no frames in common.
    """
    first, last = max(cell.frames[0] for cell in cells), min(cell.frames[-1] for cell in cells)
    if first > last:
        raise ConfigError(
            f'no mean can be drawn: the runs {", ".join(cell.name for cell in cells)} have no frames in common'
        )
    frames = np.unique(np.concatenate([cell.frames for cell in cells]))
    frames = frames[(frames >= first) & (frames <= last)]
    if len(frames) > _POINTS:
        frames = np.linspace(first, last, _POINTS)
    return frames, np.stack([np.interp(frames, cell.frames, cell.values) for cell in cells])


def numeric_column(table: Table, name: str) -> np.ndarray:
    """Returns a column, [rows] float64.

    Raises:
      ConfigError: The column is unknown or not numeric.
    """
    column = _column(table, name)
    if column.dtype.kind != 'f':
        raise ConfigError(f'the column {name!r} contains {column[0]!r}, not only numbers')
    return column


def _column(table: Table, name: str) -> np.ndarray:
    if name not in table:
        raise ConfigError(f'unknown column {name!r}; {closest(name, table)}')
    return table[name]


def _numbers(column: Sequence[str], missing: bool) -> np.ndarray | None:
    """Converts a column of strings to numbers, with NaN for empty entries if `missing`; None if that is impossible."""
    try:
        numbers = np.array([float(value) if value else math.nan for value in column])
    except ValueError:
        return None
    return numbers if missing or not np.isnan(numbers).any() else None


def _distinct(column: np.ndarray) -> list[Any]:
    """Returns distinct values: numbers in ascending order, strings by their first row, the order of the sweep."""
    return np.unique(column).tolist() if column.dtype.kind == 'f' else list(dict.fromkeys(column.tolist()))

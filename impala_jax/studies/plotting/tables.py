"""Tables of sweeps: reading them, and the runs in them that a mean is taken over.

Means are over runs that differ in nothing but their seed. Where another field would be averaged over in silence,
`group_cells` refuses, and says which.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from impala_jax.config import ConfigError, closest
from impala_jax.studies.plotting.labels import CORRECTIONS, plain_text
from impala_jax.studies.statistics import bootstrap_interval

Table = dict[str, np.ndarray]
"""Column -> its values, [rows]: float64 (NaN where the file has nothing), or strings."""
_POINTS = 500  # at most, of a mean curve


class Cell(NamedTuple):
    """A run: its fields, and where one metric of it is known."""

    name: str
    fields: dict[str, Any]
    frames: np.ndarray  # [N], ascending
    values: np.ndarray  # [N], finite

    @property
    def final(self) -> float:
        return float(self.values[-1])


def read_table(path: Path | str) -> Table:
    """Reads a sweep's `results.csv`.

    A column is numeric if all that it holds are numbers (`inf` is one) and, in front of `frames`, nothing is missing.

    Raises:
      ConfigError: there is no such file, or it is not a sweep's table.
    """
    path = Path(path)
    try:
        with path.open(newline='', encoding='utf-8') as file:
            header, *rows = list(csv.reader(file)) or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f'cannot read {path}: {getattr(error, "strerror", None) or error}') from error
    for name in ('cell', 'frames'):
        if name not in header:
            raise ConfigError(f'{path} is no table of a sweep: it has no column {name!r}')
    if not rows:
        raise ConfigError(f'{path} has no rows')
    for number, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise ConfigError(f'{path}: row {number} has {len(row)} values for {len(header)} columns')
    table = {}
    for index, name in enumerate(header):
        column = [row[index] for row in rows]
        # Names of cells are hexadecimal: some look like numbers.
        numbers = None if name == 'cell' else _numbers(column, missing=index > header.index('frames'))
        table[name] = np.array(column) if numbers is None else numbers
    if table['frames'].dtype.kind != 'f' or np.isnan(table['frames']).any():
        raise ConfigError(f"{path}: the column 'frames' holds something that is no number")
    return table


def select(table: Table, values: Mapping[str, Any]) -> Table:
    """The rows whose columns have these values, which may be given as they are written in the file.

    Raises:
      ConfigError: an unknown column, or a value that it does not hold.
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
            raise ConfigError(f'no row has {name}={wanted}; {name} holds {held}')
        table = {other: column[keep] for other, column in table.items()}
    return table


def left_out(table: Table, metric: str = 'final_return') -> list[str]:
    """The cells that have no value of `metric`, as those that have not ended; no figure of it counts them.

    Raises:
      ConfigError: an unknown column, or one that is not numeric.
    """
    known = set(table['cell'][np.isfinite(numeric_column(table, metric))])
    return [name for name in _distinct(table['cell']) if name not in known]


def field_values(table: Table, name: str | None) -> list[Any]:
    """The values of a field, in the order in which they are shown; [None] for no field."""
    if name is None:
        return [None]
    values = _distinct(_column(table, name))
    if name == 'vtrace.correction' and set(values) <= set(CORRECTIONS):
        values.sort(key=list(CORRECTIONS).index)
    return values


def swept_fields(table: Table) -> list[str]:
    """The swept fields: the columns in front of `frames`, without `cell`."""
    names = list(table)
    return [name for name in names[: names.index('frames')] if name != 'cell']


def cells_of(table: Table, metric: str) -> list[Cell]:
    """The runs that have a value of `metric`."""
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
    """Values of the fields `names` (None for None) -> the runs with these, which differ only in the fields `over`."""
    fields = swept_fields(table)
    for name in [*names, *over]:
        # Without this one, 'seed' need not have been swept.
        if name is not None and name not in fields and (name != 'seed' or name in names):
            raise ConfigError(f'{name!r} is no field of this sweep; {closest(name, fields)}')
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


def mean_interval(cells: Sequence[Cell], over: Sequence[str], values: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """The interval of the mean of `values` [runs, ...] of these runs, by default of their last ones.

    Only seeds are drawn: the values of the other fields in `over` were chosen.
    """
    strata = [tuple(cell.fields[name] for name in over if name != 'seed') for cell in cells]
    return bootstrap_interval([cell.final for cell in cells] if values is None else values, strata=strata)


def align(cells: Sequence[Cell]) -> tuple[np.ndarray, np.ndarray]:
    """Frames [P] where all the runs are known, and their values there, [runs, P], interpolated between log points."""
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
    column = _column(table, name)
    if column.dtype.kind != 'f':
        raise ConfigError(f'the column {name!r} holds {column[0]!r}, not only numbers')
    return column


def _column(table: Table, name: str) -> np.ndarray:
    if name not in table:
        raise ConfigError(f'unknown column {name!r}; {closest(name, table)}')
    return table[name]


def _numbers(column: Sequence[str], missing: bool) -> np.ndarray | None:
    """The numbers in a column of strings, NaN for nothing if that is allowed; or None."""
    try:
        numbers = np.array([float(value) if value else math.nan for value in column])
    except ValueError:
        return None
    return numbers if missing or not np.isnan(numbers).any() else None


def _distinct(column: np.ndarray) -> list[Any]:
    """Numbers ascending; strings by their first row, which is the order of the sweep."""
    return np.unique(column).tolist() if column.dtype.kind == 'f' else list(dict.fromkeys(column.tolist()))
